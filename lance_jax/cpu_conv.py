"""Convolutions in forms that are fast on a CPU: a primitive that stands for XLA's own.

`conv_p` has the operands and parameters of `lax.conv_general_dilated_p` and equals it to float
rounding. A depthwise convolution is a sum of shifted products, a 1x1 convolution a matrix product;
their gradients for the input and for the kernel each have a form of their own. Of the others XLA's
forward form is fast, and the gradients are brought into forms that are fast in a loop too.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lance_jax import shifted
from lance_jax.conv import Conv
from lance_jax.modes import accumulator, wider
from lance_jax.primitives import bilinear

# Terms of a sum of shifted products, kernel places times input channels, up to which it is faster
# than XLA's convolution.
_TERMS = 32


def fits(eqn: Any) -> bool:
    """Whether an equation is a convolution that `conv_p` can compute."""
    if eqn.primitive is not lax.conv_general_dilated_p or eqn.params["batch_group_count"] > 1:
        return False
    dtypes = {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return False
    conv = Conv.of(eqn)
    empty = math.prod(conv.y_shape) == 0
    short = conv.depthwise and conv.modes["patch"] <= shifted.MOST_TAPS
    return bool(conv.strides) and not empty and (short or conv.has_tap_gradient)


def _shiftable(conv: Conv) -> bool:
    """Whether the convolution is a short sum of shifted products."""
    return conv.depthwise or conv.modes["patch"] <= _TERMS


def _forward(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    conv, dtype = _conv(x, w, params)
    if not (conv.pointwise or _shiftable(conv)):
        return lax.conv_general_dilated_p.bind(x, w, **params)
    x, w = x.transpose(conv.x_axes), w.transpose(conv.w_axes)
    y = _pointwise(conv, x, w) if conv.pointwise else shifted.forward(conv, x, w)
    return y.astype(dtype).transpose(np.argsort(conv.y_axes))


def _input_gradient(dy: jax.Array, x: Any, w: jax.Array, **params: Any) -> jax.Array:
    conv, _ = _conv(x, w, params)
    dy, w = dy.transpose(conv.y_axes), w.transpose(conv.w_axes)
    if conv.pointwise:
        dx = _pointwise_dx(conv, dy, w)
    else:
        dx = (shifted.input_gradient if conv.depthwise else _dense_dx)(conv, dy, w)
    return dx.astype(x.dtype).transpose(np.argsort(conv.x_axes))


def _kernel_gradient(dy: jax.Array, x: jax.Array, w: Any, **params: Any) -> jax.Array:
    conv, _ = _conv(x, w, params)
    x, dy = x.transpose(conv.x_axes), dy.transpose(conv.y_axes)
    if conv.pointwise:
        dw = _pointwise_dw(conv, x, dy)
    else:
        dw = shifted.kernel_gradient(conv, x, dy) if _shiftable(conv) else conv.tap_gradient(x, dy)
    return dw.astype(w.dtype).transpose(np.argsort(conv.w_axes))


def _conv(x: Any, w: Any, params: dict[str, Any]) -> tuple[Conv, Any]:
    y = jax.eval_shape(lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params), x, w)
    return Conv.with_params(x.shape, w.shape, y.shape, params), y.dtype


conv_p = bilinear(
    "cpu_conv", lax.conv_general_dilated_p, _forward, _input_gradient, _kernel_gradient
)


# --- 1x1 -----------------------------------------------------------------------------------------


def _pointwise(conv: Conv, x: jax.Array, w: jax.Array) -> jax.Array:
    return _product(conv, _strided(conv, x), w.reshape(w.shape[-2:]), ((x.ndim - 1,), (0,)))


def _pointwise_dx(conv: Conv, dy: jax.Array, w: jax.Array) -> jax.Array:
    dx = _product(conv, dy, w.reshape(w.shape[-2:]), ((dy.ndim - 1,), (1,)))
    sizes = [conv.x_shape[axis] for axis in conv.x_axes]
    padding = [(0, 0, 0)] * dx.ndim
    for i, stride in enumerate(conv.strides, 1):
        padding[i] = (0, sizes[i] - (dx.shape[i] - 1) * stride - 1, stride - 1)
    return lax.pad(dx, jnp.zeros((), dx.dtype), padding)


def _pointwise_dw(conv: Conv, x: jax.Array, dy: jax.Array) -> jax.Array:
    axes = tuple(range(dy.ndim - 1))
    dw = _product(conv, _strided(conv, x), dy, (axes, axes))
    return dw.reshape((1,) * len(conv.strides) + dw.shape)


def _strided(conv: Conv, x: jax.Array) -> jax.Array:
    steps = [slice(None), *(slice(None, None, stride) for stride in conv.strides)]
    return x[tuple(steps)]


def _product(conv: Conv, a: jax.Array, b: jax.Array, contract: Any) -> jax.Array:
    numbers = contract, ((), ())
    return lax.dot_general(a, b, numbers, conv.precision, accumulator(a.dtype))


# --- dense, larger than 1x1 ---


def _dense_dx(conv: Conv, dy: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution of dy, spread out by the strides, with the kernel turned round."""
    turned = jnp.flip(w, tuple(range(w.ndim - 2))).swapaxes(-1, -2)
    padding = [(low, high) for low, high, _ in shifted.spread(conv)]
    dtype = wider(dy.dtype, w.dtype)  # they differ where the equation asks for wider outputs
    return lax.conv_general_dilated(
        dy.astype(dtype), turned.astype(dtype), conv.x_dilation, padding, conv.strides,
        conv.w_dilation, conv.numbers(dy.ndim), precision=conv.precision,
        preferred_element_type=accumulator(dtype),
    )  # fmt: skip
