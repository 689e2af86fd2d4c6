"""Sliding windows over padded arrays, as XLA computes them fast on a CPU: whole shifted slices.

What lies under place `at` of every window of x is `under(x, at, ...)`; an element of x gathers from
the windows it lies in through `spread`, which lays their outputs out so that the same holds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Sizes = Sequence[int]
Padding = Sequence[tuple[int, int, int]]


def padded(x: jax.Array, padding: Padding, value: float = 0) -> jax.Array:
    """`lax.pad` with a constant, kept as an array of its own.

    Fused into what reads it, a pad would test every element's place anew for every window place.
    """
    if not any(map(any, padding)):
        return x
    return lax.optimization_barrier(lax.pad(x, jnp.array(value, x.dtype), padding))


def under(x: jax.Array, at: Sizes, sizes: Sizes, strides: Sizes) -> jax.Array:
    """x[at + strides * i] for all i below `sizes`."""
    limits = [a + (n - 1) * s + 1 for a, n, s in zip(at, sizes, strides, strict=True)]
    return lax.slice(x, at, limits, strides)


def spread(
    size: int, x_dilation: int, outputs: int, stride: int, reach: int, low: int
) -> tuple[int, int, int]:
    """The padding of one axis of the outputs, for gathering at `reach` - at by steps `x_dilation`.

    size, x_dilation, low: the axis of x, its dilation and its low padding; outputs, stride: the
    number of windows and their distance; reach: where in a window its last place lies.
    """
    before = reach - low
    wanted = (size - 1) * x_dilation + 1 + reach
    return before, wanted - before - (outputs - 1) * stride - 1, stride - 1
