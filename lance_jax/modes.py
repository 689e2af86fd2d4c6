"""Mode products, and the cheapest order for a chain of them."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# (axis, size before, size after) of each mode product of a chain
Steps = tuple[tuple[int, int, int], ...]

# Elements behind an axis from which on a CPU is faster with a product for each place before it.
_COLUMNS = 40


def mode_product(x: jax.Array, matrix: jax.Array, axis: int, precision: Any = None) -> jax.Array:
    """x with its `axis` contracted with the first axis of `matrix` (n, r): size n becomes r.

    Accumulates in at least float32 and returns x's dtype.
    """
    matrix = matrix.astype(x.dtype)
    if axis == x.ndim - 1:
        return _last_axis_product(x, matrix, precision)
    default = functools.partial(_moved_product, axis=axis, precision=precision)
    if math.prod(x.shape[axis + 1 :]) < _COLUMNS:
        return default(x, matrix)
    on_cpu = functools.partial(_batched_product, axis=axis, precision=precision)
    return lax.platform_dependent(x, matrix, cpu=on_cpu, default=default)


def _last_axis_product(x: jax.Array, matrix: jax.Array, precision: Any) -> jax.Array:
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, matrix, dims, precision, accumulator(x.dtype)).astype(x.dtype)


def _moved_product(x: jax.Array, matrix: jax.Array, axis: int, precision: Any) -> jax.Array:
    """One product, whose layout the compiler chooses."""
    dims = (((axis,), (0,)), ((), ()))
    out = lax.dot_general(x, matrix, dims, precision, accumulator(x.dtype))
    return jnp.moveaxis(out.astype(x.dtype), -1, axis)


def _batched_product(x: jax.Array, matrix: jax.Array, axis: int, precision: Any) -> jax.Array:
    """A small product for each place before the axis: on a CPU nothing has to be transposed."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    n, r = matrix.shape
    size = math.prod(before)
    matrices = jnp.broadcast_to(matrix.T, (size, r, n))
    dims = (((2,), (1,)), ((0,), (0,)))
    columns = x.reshape(size, n, math.prod(after))
    out = lax.dot_general(matrices, columns, dims, precision, accumulator(x.dtype))
    return out.astype(x.dtype).reshape(*before, r, *after)


def accumulator(dtype: Any) -> Any:
    """The dtype in which products of this dtype are summed: at least float32."""
    return wider(dtype, jnp.float32)


def wider(a: Any, b: Any) -> Any:
    """The floating dtype of more bits, whatever the promotion rules."""
    return jnp.dtype(a) if jnp.finfo(a).bits >= jnp.finfo(b).bits else jnp.dtype(b)


@functools.lru_cache(maxsize=4096)
def cheapest_chain(size: int, steps: Steps) -> tuple[int, Steps]:
    """(MACs, order) of the cheapest order of mode products on a tensor of `size` elements."""
    return min((chain_macs(size, order), order) for order in itertools.permutations(steps))


def chain_macs(size: int, steps: Steps) -> int:
    """MACs of mode products one after another on a tensor of `size` elements."""
    macs = 0
    for _, before, after in steps:
        macs += size * after
        size = size // before * after if before else 0
    return macs


def apply_chain(
    x: jax.Array,
    matrices: dict[int, jax.Array],
    order: Steps,
    precision: Any,
) -> jax.Array:
    """Mode products by axis in the given order; axes keep their places."""
    for axis, _, _ in order:
        x = mode_product(x, matrices[axis], axis, precision)
    return x
