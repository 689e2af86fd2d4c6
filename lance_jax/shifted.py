"""Convolutions as sums of shifted products: what is fast on a CPU where each output has few terms.

`conv` is a `lance_jax.conv.Conv`, and arrays are as its rules see them: x (batch, spatial...,
channel), w (spatial..., channel / groups, out), dy (batch, spatial..., out).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import windows
from lance_jax.modes import accumulator, mode_product

# Places of a kernel up to which a sum is unrolled: longer ones take long to compile, and are then
# no faster than XLA's convolution.
MOST_TAPS = 81
# Output rows whose products are added up in one pass over memory: more take longer to compile.
_ROWS = 7
# How much longer than a MAC of a matrix product one takes that is added up elementwise.
_ELEMENTWISE = 8


def forward(conv: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    x, w = _repeated(conv, padded(conv, x)), w.astype(accumulator(w.dtype))
    sizes = [conv.y_shape[axis] for axis in conv.y_axes][1:-1]
    terms = _terms(conv)
    return _sum(_window(x, at, sizes, conv.strides, c) * w[tap][c or 0] for tap, at, c in terms)


def input_gradient(conv: Any, dy: jax.Array, w: jax.Array) -> jax.Array:
    """Depthwise: the sum over taps of dy, spread out by the strides and shifted against the tap."""
    _, *sizes, channels = (conv.x_shape[axis] for axis in conv.x_axes)
    whole = (0, 0, 0)
    dy = windows.padded(dy, [whole, *spread(conv), whole])
    w = w.astype(accumulator(w.dtype))

    def term(tap: tuple[int, ...], at: list[int]) -> jax.Array:
        opposite = [r - a for r, a in zip(_reach(conv), at, strict=True)]
        return _window(dy, opposite, sizes, conv.x_dilation) * w[tap][0]

    dx = _sum(term(tap, at) for tap, at, _ in _terms(conv))
    return dx.reshape(*dx.shape[:-1], channels, -1).sum(-1)


def kernel_gradient(conv: Any, x: jax.Array, dy: jax.Array) -> jax.Array:
    """For every term the sum of x * dy, a few rows of dy at a time, so that both stay in cache."""
    x = padded(conv, x)
    return _by_rows(conv, lambda at, n: lax.dynamic_slice_in_dim(x, at, n, axis=1), dy)


def kernel_gradient_of_core(
    conv: Any, core: jax.Array, dy: jax.Array, bases: Sequence[jax.Array | None]
) -> jax.Array:
    """The same at the expanded core, of which only those rows are there at a time.

    bases: (n, r) of each spatial axis, None where the core has the whole axis.
    """
    acc = accumulator(core.dtype)
    padding = _padding(conv)
    for axis, (basis, pad) in enumerate(zip(bases, padding, strict=True), 1):
        if basis is None:
            core = windows.padded(core, [pad if i == axis else (0, 0, 0) for i in range(core.ndim)])
    first, *rest = (
        None if basis is None else windows.padded(basis.astype(acc), [pad, (0, 0, 0)])
        for basis, pad in zip(bases, padding, strict=True)
    )

    def rows(at: jax.Array, n: int) -> jax.Array:
        if first is None:
            part = lax.dynamic_slice_in_dim(core, at, n, axis=1)
        else:
            part = _expanded(core, lax.dynamic_slice_in_dim(first, at, n), 1, conv.precision)
        for axis, basis in enumerate(rest, 2):
            part = part if basis is None else _expanded(part, basis, axis, conv.precision)
        return part

    return _by_rows(conv, rows, dy)


def core_part(conv: Any) -> float:
    """How large the rows are that `kernel_gradient_of_core` expands at a time, of the input."""
    sizes = [conv.x_shape[axis] for axis in conv.x_axes][1:-1]
    return _span(conv) * math.prod(_padded_sizes(conv)[1:]) / math.prod(sizes)


def core_macs(conv: Any, ranks: Sequence[int]) -> int:
    """What `kernel_gradient_of_core` costs for each sample, in the time of a matrix product's MACs.

    ranks: the sizes of the core's spatial axes.
    """
    channels, height = conv.x_shape[conv.x_axes[-1]], conv.y_shape[conv.y_axes[1]]
    sizes, expanded = list(ranks), 0
    for i, size in enumerate([_span(conv), *_padded_sizes(conv)[1:]]):
        expanded += size * math.prod(sizes)
        sizes[i] = size
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-2]
    outputs = math.prod(conv.y_shape[axis] for axis in conv.y_axes[1:])
    added = math.prod(kernel) * outputs * _ELEMENTWISE
    return height // _rows(conv) * expanded * channels + added


def _padded_sizes(conv: Any) -> list[int]:
    """Of x's spatial axes."""
    sizes = [conv.x_shape[axis] for axis in conv.x_axes][1:-1]
    return [
        (n - 1) * d + 1 + low + high
        for n, d, (low, high) in zip(sizes, conv.x_dilation, conv.padding, strict=True)
    ]


def _by_rows(conv: Any, rows: Callable[[jax.Array, int], jax.Array], dy: jax.Array) -> jax.Array:
    """The kernel's gradient; `rows(at, n)` gives n rows of the padded x from `at` on."""
    height, *others = dy.shape[1:-1]
    count, span = _rows(conv), _span(conv)
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-1]
    acc = accumulator(dy.dtype)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(dy, i * count, count, axis=1).astype(acc)
        x_part = _repeated(conv, rows(i * count * conv.strides[0], span))
        sums = []
        for _, at, channel in _terms(conv):
            window = _window(x_part, at, [count, *others], conv.strides, channel)
            added = _sum(window[:, row] * part[:, row] for row in range(count))
            sums.append(added.sum(tuple(range(added.ndim - 1))))
        return total + jnp.stack(sums)

    zeros = jnp.zeros((math.prod(kernel), dy.shape[-1]), acc)
    return lax.fori_loop(0, height // count, add, zeros).reshape(*kernel, dy.shape[-1])


def _rows(conv: Any) -> int:
    """Rows of dy at a time."""
    height = conv.y_shape[conv.y_axes[1]]
    return max(r for r in range(1, _ROWS + 1) if height % r == 0)


def _span(conv: Any) -> int:
    """Rows of the padded x that lie under them."""
    return (_rows(conv) - 1) * conv.strides[0] + 1 + _reach(conv)[0]


def _expanded(core: jax.Array, basis: jax.Array, axis: int, precision: Any) -> jax.Array:
    """The core with an axis of size r as one of size n, by a basis (n, r)."""
    return mode_product(core.astype(basis.dtype), basis.T, axis, precision)


def _reach(conv: Any) -> list[int]:
    """How far the last place of a window lies from its first, on each axis."""
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-2]
    return [(k - 1) * d for k, d in zip(kernel, conv.w_dilation, strict=True)]


def spread(conv: Any) -> list[tuple[int, int, int]]:
    """The padding of dy's spatial axes that spreads it out for the gathering of dx."""
    sizes, outputs = (
        [shape[axis] for axis in axes][1:-1]
        for shape, axes in ((conv.x_shape, conv.x_axes), (conv.y_shape, conv.y_axes))
    )
    low = [pad for pad, _ in conv.padding]
    axes = zip(sizes, conv.x_dilation, outputs, conv.strides, _reach(conv), low, strict=True)
    return [windows.spread(*axis) for axis in axes]


def _terms(conv: Any) -> Iterator[tuple[tuple[int, ...], list[int], int | None]]:
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


def padded(conv: Any, x: jax.Array) -> jax.Array:
    return windows.padded(x, [(0, 0, 0), *_padding(conv), (0, 0, 0)])


def _padding(conv: Any) -> list[tuple[int, int, int]]:
    """Of x's spatial axes, its dilation included."""
    spread = zip(conv.padding, conv.x_dilation, strict=True)
    return [(low, high, d - 1) for (low, high), d in spread]


def _repeated(conv: Any, x: jax.Array) -> jax.Array:
    """Each channel as often as a depthwise convolution has outputs for it."""
    multiplier = conv.y_shape[conv.y_axes[-1]] // x.shape[-1]
    return jnp.repeat(x, multiplier, axis=-1) if conv.depthwise and multiplier > 1 else x
