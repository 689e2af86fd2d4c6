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
# Inputs for each output from which on the gradient is scattered: gathering it passes over all
# inputs once for each place of a window.
_SPARSE = 16


def fits(eqn: Any) -> bool:
    """Whether an equation is a max-pool that `max_pool` can compute."""
    return (
        eqn.primitive is lax.reduce_window_max_p
        and math.prod(eqn.params["window_dimensions"]) <= _NOWHERE
        and set(eqn.params["base_dilation"]) == {1}
        and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
        and 0 not in eqn.outvars[0].aval.shape
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

    def scatter(place: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        """Every window adds to the element of x that is its maximum."""
        padded = [n + low + high for n, (low, high, _) in zip(x_shape, padding, strict=True)]
        steps = np.cumprod([1, *padded[:0:-1]])[::-1]  # of a flat index, by axis
        at = jnp.take(jnp.asarray(np.asarray(places) @ steps, jnp.int32), place.astype(jnp.int32))
        for axis, (step, stride) in enumerate(zip(steps, strides, strict=True)):
            at = at + lax.broadcasted_iota(jnp.int32, at.shape, axis) * np.int32(step * stride)
        dx = jnp.zeros(math.prod(padded), dy.dtype).at[at.reshape(-1)].add(dy.reshape(-1))
        away = [(-before, -after, 0) for before, after, _ in padding]
        return (lax.pad(dx.reshape(padded), jnp.zeros((), dy.dtype), away).astype(dtype),)

    def gather(place: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
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

    sparse = math.prod(x_shape) > _SPARSE * math.prod(y_shape)
    pool.defvjp(with_place, scatter if sparse else gather)
    return pool(x)
