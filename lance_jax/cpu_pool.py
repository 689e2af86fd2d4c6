"""Max-pooling that keeps the place of each maximum, one byte, instead of its input."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lance_jax import windows

_NOWHERE = 255  # the place of no window


def fits(eqn: Any) -> bool:
    """Whether an equation is a max-pool that `max_pool` can compute."""
    return (
        eqn.primitive is lax.reduce_window_max_p
        and math.prod(eqn.params["window_dimensions"]) <= _NOWHERE
        and set(eqn.params["base_dilation"]) == {1}
        and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    )


def max_pool(x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """`lax.reduce_window_max_p` of these parameters; the gradient goes to the first maximum."""
    size, strides, dilation = (
        params[name] for name in ("window_dimensions", "window_strides", "window_dilation")
    )
    places = [
        [t * d for t, d in zip(tap, dilation, strict=True)]
        for tap in itertools.product(*map(range, size))
    ]
    reach, low = places[-1], [pad for pad, _ in params["padding"]]
    x_shape, dtype = x.shape, x.dtype
    padding = [(before, after, 0) for before, after in params["padding"]]
    y_shape = [
        (n + before + after - r - 1) // s + 1
        for n, (before, after, _), r, s in zip(x_shape, padding, reach, strides, strict=True)
    ]

    def with_place(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = windows.padded(x, padding, -np.inf)
        best, *rest = (windows.under(x, at, y_shape, strides) for at in places)
        place = jnp.zeros(y_shape, jnp.uint8)
        for i, value in enumerate(rest, 1):
            place = jnp.where(value > best, jnp.uint8(i), place)
            best = jnp.maximum(best, value)
        return best, place

    @jax.custom_vjp
    def pool(x: jax.Array) -> jax.Array:
        return with_place(x)[0]

    def backward(place: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        """Every element of x gathers from the windows in which it is the maximum."""
        dilated = [1] * dy.ndim
        axes = zip(x_shape, dilated, y_shape, strides, reach, low, strict=True)
        spread = [windows.spread(*axis) for axis in axes]
        place, dy = windows.padded(place, spread, _NOWHERE), windows.padded(dy, spread)
        dx = jnp.zeros(x_shape, dtype)
        for i, at in enumerate(places):
            opposite = [r - a for r, a in zip(reach, at, strict=True)]
            here = windows.under(place, opposite, x_shape, dilated) == jnp.uint8(i)
            found = windows.under(dy, opposite, x_shape, dilated)
            dx = dx + jnp.where(here, found, jnp.zeros((), dtype))
        return (dx,)

    pool.defvjp(with_place, backward)
    return pool(x)
