"""Convolutions in forms that are fast on a CPU: a primitive that stands for XLA's own.

`conv_p` has the operands and parameters of `lax.conv_general_dilated_p` and equals it to float
rounding. A depthwise convolution is a sum of shifted products, a 1x1 convolution a matrix product;
their gradients for the input and for the kernel each have a form of their own. Of the others XLA's
forward form is fast, and the gradients are brought into forms that are fast in a loop too.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lance_jax import windows
from lance_jax.conv import Conv
from lance_jax.modes import accumulator
from lance_jax.primitives import bilinear

# Terms of a sum of shifted products, kernel places times input channels, up to which it is faster
# than XLA's convolution.
_TERMS = 32
# Output rows whose products are added up in one pass over memory: more take longer to compile.
_ROWS = 7


def fits(eqn: Any) -> bool:
    """Whether an equation is a convolution that `conv_p` can compute."""
    if eqn.primitive is not lax.conv_general_dilated_p or eqn.params["batch_group_count"] > 1:
        return False
    dtypes = {v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return False
    conv = Conv.of(eqn)
    empty = math.prod(conv.y_shape) == 0
    return bool(conv.strides) and not empty and (conv.depthwise or conv.has_tap_gradient)


def _shiftable(conv: Conv) -> bool:
    """Whether the convolution is a short sum of shifted products."""
    return conv.depthwise or conv.modes["patch"] <= _TERMS


def _forward(x: jax.Array, w: jax.Array, **params: Any) -> jax.Array:
    conv, dtype = _conv(x, w, params)
    if not (conv.pointwise or _shiftable(conv)):
        return lax.conv_general_dilated_p.bind(x, w, **params)
    x, w = x.transpose(conv.x_axes), w.transpose(conv.w_axes)
    y = _pointwise(conv, x, w) if conv.pointwise else _shifted(conv, x, w)
    return y.astype(dtype).transpose(np.argsort(conv.y_axes))


def _input_gradient(dy: jax.Array, x: Any, w: jax.Array, **params: Any) -> jax.Array:
    conv, _ = _conv(x, w, params)
    dy, w = dy.transpose(conv.y_axes), w.transpose(conv.w_axes)
    if conv.pointwise:
        dx = _pointwise_dx(conv, dy, w)
    else:
        dx = (_shifted_dx if conv.depthwise else _dense_dx)(conv, dy, w)
    return dx.astype(x.dtype).transpose(np.argsort(conv.x_axes))


def _kernel_gradient(dy: jax.Array, x: jax.Array, w: Any, **params: Any) -> jax.Array:
    conv, _ = _conv(x, w, params)
    x, dy = x.transpose(conv.x_axes), dy.transpose(conv.y_axes)
    if conv.pointwise:
        dw = _pointwise_dw(conv, x, dy)
    else:
        dw = _shifted_dw(conv, x, dy) if _shiftable(conv) else conv.tap_gradient(x, dy)
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
    padding = [(low, high) for low, high, _ in _spread(conv)]
    return lax.conv_general_dilated(
        dy, turned, conv.x_dilation, padding, conv.strides, conv.w_dilation,
        conv.numbers(dy.ndim), precision=conv.precision,
        preferred_element_type=accumulator(dy.dtype),
    )  # fmt: skip


# --- shifted products ----------------------------------------------------------------------------


def _shifted(conv: Conv, x: jax.Array, w: jax.Array) -> jax.Array:
    x, w = _padded(conv, x), w.astype(accumulator(w.dtype))
    sizes = [conv.y_shape[axis] for axis in conv.y_axes][1:-1]
    terms = _terms(conv)
    return _sum(_window(x, at, sizes, conv.strides, c) * w[tap][c or 0] for tap, at, c in terms)


def _shifted_dx(conv: Conv, dy: jax.Array, w: jax.Array) -> jax.Array:
    """Depthwise: the sum over taps of dy, spread out by the strides and shifted against the tap."""
    _, *sizes, channels = (conv.x_shape[axis] for axis in conv.x_axes)
    reach = _reach(conv)
    whole = (0, 0, 0)
    dy = windows.padded(dy, [whole, *_spread(conv), whole])
    w = w.astype(accumulator(w.dtype))

    def term(tap: tuple[int, ...], at: list[int]) -> jax.Array:
        opposite = [r - a for r, a in zip(reach, at, strict=True)]
        return _window(dy, opposite, sizes, conv.x_dilation) * w[tap][0]

    dx = _sum(term(tap, at) for tap, at, _ in _terms(conv))
    return dx.reshape(*dx.shape[:-1], channels, -1).sum(-1)


def _shifted_dw(conv: Conv, x: jax.Array, dy: jax.Array) -> jax.Array:
    """For every term the sum of x * dy; a few rows of dy at a time, so that both stay in cache."""
    x, out = _padded(conv, x), dy.shape[-1]
    height, *others = dy.shape[1:-1]
    rows = max(r for r in range(1, _ROWS + 1) if height % r == 0)
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-1]
    stride, reach = conv.strides[0], (kernel[0] - 1) * conv.w_dilation[0]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(dy, i * rows, rows, axis=1).astype(total.dtype)
        span = (rows - 1) * stride + 1 + reach
        x_part = lax.dynamic_slice_in_dim(x, i * rows * stride, span, axis=1)
        sums = []
        for _, at, channel in _terms(conv):
            window = _window(x_part, at, [rows, *others], conv.strides, channel)
            added = _sum(window[:, row] * part[:, row] for row in range(rows))
            sums.append(added.sum(tuple(range(added.ndim - 1))))
        return total + jnp.stack(sums)

    zeros = jnp.zeros((math.prod(kernel), out), accumulator(dy.dtype))
    return lax.fori_loop(0, height // rows, add, zeros).reshape(*kernel, out)


def _reach(conv: Conv) -> list[int]:
    """How far the last place of a window lies from its first, on each axis."""
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-2]
    return [(k - 1) * d for k, d in zip(kernel, conv.w_dilation, strict=True)]


def _spread(conv: Conv) -> list[tuple[int, int, int]]:
    """The padding of dy's spatial axes that spreads it out for the gathering of dx."""
    sizes, outputs = (
        [shape[axis] for axis in axes][1:-1]
        for shape, axes in ((conv.x_shape, conv.x_axes), (conv.y_shape, conv.y_axes))
    )
    low = [pad for pad, _ in conv.padding]
    axes = zip(sizes, conv.x_dilation, outputs, conv.strides, _reach(conv), low, strict=True)
    return [windows.spread(*axis) for axis in axes]


def _terms(conv: Conv) -> Iterator[tuple[tuple[int, ...], list[int], int | None]]:
    """(place in the kernel, where its window begins, input channel: None if depthwise)."""
    *kernel, inputs, _ = (conv.w_shape[axis] for axis in conv.w_axes)
    for tap in itertools.product(*map(range, kernel)):
        at = [t * d for t, d in zip(tap, conv.w_dilation, strict=True)]
        for channel in [None] if conv.depthwise else range(inputs):
            yield tap, at, channel


def _window(
    x: jax.Array, at: list[int], sizes: list[int], strides: Any, channel: int | None = None
) -> jax.Array:
    """The elements at + stride * i, of one channel or all, in the accumulator's dtype."""
    first, count = (0, x.shape[-1]) if channel is None else (channel, 1)
    found = windows.under(x, [0, *at, first], [len(x), *sizes, count], [1, *strides, 1])
    return found.astype(accumulator(x.dtype))


def _sum(terms: Iterator[jax.Array]) -> jax.Array:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _padded(conv: Conv, x: jax.Array) -> jax.Array:
    spread = zip(conv.padding, conv.x_dilation, strict=True)
    padding = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in spread), (0, 0, 0)]
    x = windows.padded(x, padding)
    multiplier = conv.y_shape[conv.y_axes[-1]] // x.shape[-1]
    return jnp.repeat(x, multiplier, axis=-1) if conv.depthwise and multiplier > 1 else x
