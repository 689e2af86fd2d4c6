"""What LANCE is compared with and the program does not offer, and the bytes that it keeps.

* `hosvd`: the decomposition of every step's own layer inputs (Nguyen et al., Activation Map
  Compression through Tensor Decomposition, NeurIPS 2024, arXiv 2411.06346), as there: of all modes
  with that of the batch, cores and factors in float32. Here by a Gram matrix and `eigh` for each
  mode, which is faster than a singular value decomposition.
* `checkpoint_bytes`: of `jax.checkpoint` of every block (`train.loss_in_blocks`).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lance_jax
from lance_jax import loop, train
from lance_jax.config import Config, names
from lance_jax.loader import Loader
from lance_jax.problem import Problem

MODES = ("batch", "height", "width", "channel")  # of a convolution's input, by axis
Ranks = Mapping[str, Mapping[str, int]]  # path of the layer -> mode -> rank

# --- the decomposition of each step's own inputs --------------------------------------------------


def hosvd(
    config: Config, problem: Problem, ranks: Ranks | None = None
) -> Callable[[Any, Any], Any]:
    """`problem.train_fn`, compressed with the factors of the very batch that it is called with.

    A rank is the smallest that reaches `config.energy`. It differs from batch to batch, which one
    compiled program cannot follow: factors have all their columns, those beyond the rank zero. The
    gradients are the same; for times, `ranks` cuts the factors to what one batch needs.
    """

    def cut(path: str, mode: str, values: jax.Array, vectors: jax.Array) -> jax.Array:
        if ranks is None:
            return vectors * _needed(values, config.energy)
        return vectors[:, : ranks[path][mode]]

    def apply(params: Any, x: Any) -> Any:
        factors = {
            path: lance_jax.LayerFactors(
                {mode: cut(path, mode, *pair) for mode, pair in found.items()}
            )
            for path, found in decompositions(config, problem, params, x).items()
        }
        return lance_jax.compress(problem.train_fn, factors)(params, x)

    return apply


def decompositions(config: Config, problem: Problem, params: Any, x: Any) -> dict[str, dict]:
    """Eigenvalues and eigenvectors by path and mode, leading first, of one batch's inputs."""
    # Else the products would choose the layout of what the network computes.
    inputs = jax.lax.optimization_barrier(
        layer_inputs(problem, *jax.lax.stop_gradient((params, x)))
    )
    axes = {mode: MODES.index(mode) for mode in names(config.modes)}
    return {
        path: {mode: decompose(gram(given, axis)) for mode, axis in axes.items()}
        for path, given in inputs.items()
    }


def layer_inputs(problem: Problem, params: Any, x: Any) -> dict[str, jax.Array]:
    """The trained layers' inputs (batch, height, width, channel) by path of their kernel.

    The compiled step computes them once, and not once more for the step itself.
    """
    found = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if path in problem.layers:
            found[f"{path}/kernel"] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        problem.train_fn(params, x)
    return found


def gram(x: jax.Array, axis: int) -> jax.Array:
    """The Gram matrix (n, n) of one axis of x, as one product of contiguous matrices."""
    n = x.shape[axis]
    if axis == x.ndim - 1:
        columns = x.reshape(-1, n)
        return columns.T @ columns
    rows = jnp.moveaxis(x, axis, 0).reshape(n, -1)
    return rows @ rows.T


def decompose(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues in falling order and their eigenvectors, in the dtype of `gram`."""
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    return values[::-1], vectors[:, ::-1]


def _needed(values: jax.Array, energy: float) -> jax.Array:
    """1 for the fewest leading directions that reach the share `energy`, 0 for the others."""
    values = jnp.maximum(values, 0)
    before = jnp.cumsum(values) - values
    return (before < energy * values.sum()).astype(values.dtype)


def batch_ranks(config: Config, problem: Problem, params: Any, n: int) -> list[Ranks]:
    """The ranks of the first `n` training batches."""

    def of_batch(params: Any, x: Any) -> Any:
        found = decompositions(config, problem, params, x)
        return {
            path: {mode: _needed(v, config.energy).sum() for mode, (v, _) in by_mode.items()}
            for path, by_mode in found.items()
        }

    ranks = jax.jit(loop.for_device(of_batch))
    order = Loader(len(problem.train.labels), config.batch_size, config.seed)
    batches = (problem.train.read(indices) for indices in itertools.islice(order, n))
    return [
        jax.tree.map(int, jax.device_get(ranks(params, jnp.asarray(batch)))) for batch in batches
    ]


def hosvd_bytes(config: Config, problem: Problem, ranks: Sequence[Ranks]) -> dict[str, int]:
    """Bytes kept, mean over steps of these ranks: cores, and factors, which are each step's own."""
    apply_fn, params, picture = problem.network
    trainable = train.trainable_patterns("backprop", problem.layers)
    batch = _batch(config.batch_size, picture, problem)
    report = lance_jax.report(loop.loss_of(apply_fn), params, *batch, trainable=trainable)
    layers = {f"{layer}/kernel" for layer in problem.layers}
    rest = [row.bytes for row in report.layers if row.path not in layers]
    shapes = {
        layer.path: layer.modes
        for layer in lance_jax.layers(
            problem.train_fn, problem.params, batch_input(config, problem)
        )
    }

    def of_layer(path: str, ranks: Mapping[str, int]) -> int:
        factors = sum(shapes[path][mode] * rank for mode, rank in ranks.items())
        return 4 * (math.prod(ranks.values()) + factors)

    kept = np.mean([sum(of_layer(path, one) for path, one in step.items()) for step in ranks])
    layer_inputs = round(kept) + sum(rest)
    masks = report.saved_bytes.total - report.saved_bytes.layer_inputs
    return {"layer_inputs": layer_inputs, "total": layer_inputs + masks}


def batch_input(config: Config, problem: Problem) -> jax.ShapeDtypeStruct:
    """Shape of one batch that the trained part of the network takes."""
    shape = problem.train.read(np.arange(1)).shape[1:]
    return jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32)


# --- checkpoints ----------------------------------------------------------------------------------


def checkpoint_bytes(config: Config, problem: Problem) -> dict[str, int]:
    """Bytes kept between the phases, and the most that one block needs when it is run again."""
    train_fn, params, picture = problem.network
    trainable = train.trainable_patterns("backprop", problem.layers)
    loss = train.loss_in_blocks(loop.loss_of(train_fn))
    batch = _batch(config.batch_size, picture, problem)
    report = lance_jax.report(loss, params, *batch, trainable=trainable)
    return {"total": report.saved_bytes.total, "transient": report.transient}


def _batch(size: int, picture: tuple[int, ...], problem: Problem) -> tuple[Any, Any]:
    return (
        jax.ShapeDtypeStruct((size, *picture), jnp.float32),
        jax.ShapeDtypeStruct((size,), problem.train.labels.dtype),
    )
