"""`value_and_grad` in two jitted phases, so that what is kept between them is real."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lance_jax import jaxprs
from lance_jax.micro_batches import Accumulated, trace_accumulated
from lance_jax.paths import leaves_with_path, matching
from lance_jax.phases import Phases, trace_phases

# What jax reads while it traces, beside the arguments.
_SETTINGS = ("jax_default_matmul_precision", "jax_numpy_dtype_promotion")

Trainable = str | Sequence[str] | Callable[[str], bool] | None


def value_and_grad(
    loss_fn: Callable,
    *,
    trainable: Trainable = None,
    has_aux: bool = False,
    micro_batch: int | None = None,
) -> "ValueAndGrad":
    """Like `jax.value_and_grad`, as two jitted phases whose intermediate lives and dies visibly.

    Args:
      loss_fn: a function of (params, *args, **kwargs) to a scalar, or to (scalar, aux).
      trainable: which parameters to differentiate: a regular expression or several
        (`re.search` over paths joined by `/`), or a function of a path; None: all floating ones.
        The others cost no gradient and no residual.
      has_aux: whether `loss_fn` returns (scalar, aux).
      micro_batch: the number of samples to go through the network at a time, None: all. The arrays
        among the positional arguments are divided along their first axis (scalars, and what is
        given by keyword, are passed whole each time), and the gradients are summed in one loop.
        Exact for a loss that is a mean over samples. Auxiliary outputs are averaged too, weighted
        by the number of samples. Between the phases only the gradients live.

    Returns:
      An object `vg` with

      * `vg(params, *args) -> (value, grads)`, where value is (scalar, aux) with `has_aux`, and
        grads has the structure of params with None for what is not trained;
      * `vg.forward(params, *args) -> (value, saved)` and
        `vg.backward(saved, params, *args) -> grads`: `saved` is a pytree of arrays that holds no
        parameter, no argument and nothing that `loss_fn` closes over;
      * `vg.partition(params) -> (trainable, frozen)` and `vg.merge(trainable, frozen) -> params`,
        both parts with None in the other's places, for optax.

    Raises:
      ValueError: when called, if `trainable` matches no floating parameter, the loss is no floating
        scalar, or the arguments or auxiliary outputs cannot be divided into micro-batches.

    Example:
      >>> import jax.numpy as jnp
      >>> vg = value_and_grad(lambda p, x: jnp.sum(p["w"] * x), trainable="w")
      >>> value, saved = vg.forward({"w": jnp.ones(2), "b": jnp.ones(3)}, jnp.arange(2.0))
      >>> vg.backward(saved, {"w": jnp.ones(2), "b": jnp.ones(3)}, jnp.arange(2.0))
      {'b': None, 'w': Array([0., 1.], dtype=float32)}
    """
    whole = isinstance(micro_batch, int | np.integer) and not isinstance(micro_batch, bool)
    if micro_batch is not None and not (whole and micro_batch >= 1):
        raise ValueError(f"micro_batch is {micro_batch!r}; it must be None or at least 1")
    return ValueAndGrad(loss_fn, trainable, has_aux, micro_batch and int(micro_batch))


class ValueAndGrad:
    """What `value_and_grad` returns: called like `loss_fn`, it gives (value, grads)."""

    def __init__(
        self, loss_fn: Callable, trainable: Trainable, has_aux: bool, micro_batch: int | None
    ):
        self._loss_fn = loss_fn
        self._trainable = trainable
        self._has_aux = has_aux
        self._micro_batch = micro_batch
        self._phases: dict[Any, Phases | Accumulated] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, saved = self.forward(params, *args, **kwargs)
        return value, self.backward(saved, params, *args, **kwargs)

    def forward(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(value, saved): the first phase, and the arrays that it keeps for the second."""
        phases, arrays = self._traced(params, args, kwargs)
        (value, aux), saved = phases.forward(arrays)
        return ((value, aux) if self._has_aux else value), saved

    def backward(self, saved: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The gradients, from what `forward` saved with the same arguments."""
        phases, arrays = self._traced(params, args, kwargs)
        grads = iter(phases.backward(saved, arrays))
        return _fill(params, [next(grads) if use else None for use in phases.chosen])

    def partition(self, params: Any) -> tuple[Any, Any]:
        """(trainable, frozen), each with None in the other's places."""
        chosen, leaves = choose(params, self._trainable), jax.tree.leaves(params)
        pairs = list(zip(leaves, chosen, strict=True))
        trainable = _fill(params, [leaf if use else None for leaf, use in pairs])
        return trainable, _fill(params, [None if use else leaf for leaf, use in pairs])

    def merge(self, trainable: Any, frozen: Any) -> Any:
        """The parameters again, from both parts."""

        def pick(a, b):
            return b if a is None else a

        return jax.tree.map(pick, trainable, frozen, is_leaf=lambda leaf: leaf is None)

    def _traced(self, params, args, kwargs) -> tuple[Phases | Accumulated, list[Any]]:
        arrays, static = jaxprs.split((params, args, kwargs))
        settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
        key = static, tuple(map(_abstract, arrays)), settings
        try:
            phases = self._phases.get(key)
        except TypeError as error:
            raise ValueError(
                f"an argument that is no array must be hashable, since it is static: {error}"
            ) from None
        if phases is None:
            chosen = choose(params, self._trainable)
            trace = trace_phases
            if self._micro_batch is not None:
                trace = functools.partial(trace_accumulated, self._micro_batch)
            phases = trace(self._loss_fn, chosen, self._has_aux, params, args, kwargs)
            consts = jax.tree.leaves(phases.consts)
            if not any(isinstance(const, jax.core.Tracer) for const in consts):
                self._phases[key] = phases
        return phases, arrays


def _abstract(array: Any) -> Any:
    return array.shape, array.dtype, getattr(array, "weak_type", False)


def _fill(params: Any, leaves: Sequence[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def choose(params: Any, trainable: Trainable) -> list[bool]:
    """For every leaf of params, whether it is trained."""
    leaves = leaves_with_path(params)
    for path, leaf in leaves:
        if isinstance(leaf, float | complex):
            raise ValueError(f"parameter {path!r} is the Python number {leaf}; make it an array")
    floating = [jaxprs.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for _, x in leaves]
    if trainable is None:
        chosen = floating
    elif callable(trainable):
        pairs = zip(leaves, floating, strict=True)
        chosen = [is_float and bool(trainable(path)) for (path, _), is_float in pairs]
    else:
        hits = matching(trainable, [path for path, _ in leaves], "trainable", "parameter")
        chosen = [hit and is_float for hit, is_float in zip(hits, floating, strict=True)]
    if not any(chosen):
        raise ValueError(f"trainable is {trainable!r}: it selects no floating parameter")
    return chosen
