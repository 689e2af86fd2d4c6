"""What all networks of the program have in common."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STATISTICS = ("frozen", "trained")


class Network(nn.Module, kw_only=True):
    """A network over NHWC pictures in [-1, 1] that divides into a frozen prefix and a suffix.

    Blocks ``start`` to ``stop`` (numbers as in a slice) are run; they are named `blocks_0`,
    `blocks_1`, ... . So ``network.clone(stop=k)`` is a prefix whose output can be cached, and
    ``network.clone(start=k, classes=n)`` the suffix that is trained on it.

    From `start` 0 the input is a batch of pictures (n, *picture) and the stem is run, else the
    input is the output of block `start` - 1. With `classes` the output is logits (n, classes), of
    the layers behind the last block and of `head`; else it is that of the last block run.

    Attributes:
      resolution: height and width of a picture in pixels.
      batch_stats: of batch norm; "frozen": the running averages are used and stay as they are;
        "trained": the batch's own are used, and with ``mutable=["batch_stats"]`` the running
        averages follow them with torch's momentum of 0.1 (torch's running variance is the unbiased
        one, n / (n - 1) times Flax's). No effect in a network without batch norm.
    """

    resolution: int
    start: int = 0
    stop: int | None = None
    classes: int | None = None
    batch_stats: str = "frozen"

    @property
    def picture(self) -> tuple[int, int, int]:
        """Shape of one picture: height, width, channels."""
        return self.resolution, self.resolution, 3

    @nn.nowrap
    def names(self) -> dict[str, str]:
        """Modules of the published weights -> modules here ("fc" -> "head").

        Parameters outside any module have the same name in both. Each kind of network that weights
        are loaded into says its own; one without them can still be trained from scratch.
        """
        raise NotImplementedError(f"there are no published weights of a {type(self).__name__}")


def shapes(network: Network) -> Any:
    """Shapes of the variables, by collection ("params", and "batch_stats" with batch norm)."""
    picture = jax.ShapeDtypeStruct((1, *network.picture), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), picture)


def as_params(variables: Any) -> Any:
    """One tree of parameters and, where there are some, the statistics under "batch_stats"."""
    statistics = {k: v for k, v in variables.items() if k == "batch_stats"}
    return {**variables["params"], **statistics}


def as_variables(params: Any) -> Any:
    """The inverse of `as_params`."""
    statistics = {k: v for k, v in params.items() if k == "batch_stats"}
    return {"params": {k: v for k, v in params.items() if k != "batch_stats"}, **statistics}


def apply_fn(network: Network) -> Callable[..., Any]:
    """outputs = f(params, inputs), for params as `as_params` gives them.

    Where `network` trains its statistics: (outputs, {"batch_stats": the new ones}). Keys of random
    numbers are given by keyword: `dropout=key`.
    """
    mutable = ["batch_stats"] if network.batch_stats == "trained" else False

    def apply(params: Any, inputs: Any, **rngs: Any) -> Any:
        return network.apply(as_variables(params), inputs, rngs=rngs, mutable=mutable)

    return apply
