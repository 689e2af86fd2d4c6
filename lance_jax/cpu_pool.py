"""Max-pooling that keeps the place of each maximum, one byte, instead of its input."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def fits(eqn: Any) -> bool:
    """Whether an equation is a max-pool that `max_pool` can compute."""
    return (
        eqn.primitive is lax.reduce_window_max_p
        and math.prod(eqn.params["window_dimensions"]) < 256
        and set(eqn.params["base_dilation"]) == {1}
        and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    )


def max_pool(x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """`lax.reduce_window_max_p` of these parameters; the gradient goes to the first maximum."""
    x_shape, dtype = x.shape, x.dtype
    window, strides, dilation = (
        params[name] for name in ("window_dimensions", "window_strides", "window_dilation")
    )
    padding = [(low, high, 0) for low, high in params["padding"]]
    taps = list(itertools.product(*map(range, window)))
    y_shape = [
        (n + low + high - (k - 1) * d - 1) // s + 1
        for n, k, d, s, (low, high, _) in zip(
            x_shape, window, dilation, strides, padding, strict=True
        )
    ]

    def windows(x: jax.Array) -> Iterator[jax.Array]:
        x = lax.optimization_barrier(lax.pad(x, jnp.array(-np.inf, dtype), padding))
        for tap in taps:
            starts = [t * d for t, d in zip(tap, dilation, strict=True)]
            spans = [(n - 1) * s + 1 for n, s in zip(y_shape, strides, strict=True)]
            limits = [a + n for a, n in zip(starts, spans, strict=True)]
            yield lax.slice(x, starts, limits, strides)

    @jax.custom_vjp
    def pool(x: jax.Array) -> jax.Array:
        first, *rest = windows(x)
        for value in rest:
            first = jnp.maximum(first, value)
        return first

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        best, *rest = windows(x)
        place = jnp.zeros(y_shape, jnp.uint8)
        for i, value in enumerate(rest, 1):
            place = jnp.where(value > best, jnp.uint8(i), place)
            best = jnp.maximum(best, value)
        return best, place

    def backward(place: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        """Every element of x gathers from the windows in which it is the maximum."""
        reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
        spread = [
            (r - low, n + low - (m - 1) * s - 1, s - 1)
            for r, (low, _, _), n, m, s in zip(
                reach, padding, x_shape, y_shape, strides, strict=True
            )
        ]
        nowhere = jnp.uint8(255)
        place = lax.pad(place, nowhere, spread)
        dy = lax.pad(dy, jnp.zeros((), dy.dtype), spread)
        place, dy = lax.optimization_barrier((place, dy))
        dx = jnp.zeros(x_shape, dtype)
        for i, tap in enumerate(taps):
            starts = [r - t * d for r, t, d in zip(reach, tap, dilation, strict=True)]
            limits = [a + n for a, n in zip(starts, x_shape, strict=True)]
            here = lax.slice(place, starts, limits) == jnp.uint8(i)
            dx = dx + jnp.where(here, lax.slice(dy, starts, limits), jnp.zeros((), dtype))
        return (dx,)

    pool.defvjp(forward, backward)
    return pool(x)
