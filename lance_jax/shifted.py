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
import numpy as np
from jax import lax

from lance_jax import windows
from lance_jax.modes import accumulator, mode_product

# Places of a kernel up to which a sum is unrolled: longer ones take long to compile, and are then
# no faster than XLA's convolution.
MOST_TAPS = 81
# Positions of dy whose products are added up in one pass over memory.
_POSITIONS = 32
# How much longer than a MAC of a matrix product one takes that is added up elementwise.
_ELEMENTWISE = 5


_WHOLE = (0, 0, 0)  # no padding


def forward(conv: Any, x: jax.Array, w: jax.Array) -> jax.Array:
    x, w = _repeated(conv, padded(conv, x)), w.astype(accumulator(w.dtype))
    sizes = [conv.y_shape[axis] for axis in conv.y_axes][1:-1]
    terms = _terms(conv)
    return _sum(_window(x, at, sizes, conv.strides, c) * w[tap][c or 0] for tap, at, c in terms)


def input_gradient(conv: Any, dy: jax.Array, w: jax.Array) -> jax.Array:
    """Depthwise: the sum over taps of dy, spread out by the strides and shifted against the tap."""
    _, *sizes, channels = (conv.x_shape[axis] for axis in conv.x_axes)
    dy = windows.padded(dy, [_WHOLE, *spread(conv), _WHOLE])
    w = w.astype(accumulator(w.dtype))

    def term(tap: tuple[int, ...], at: list[int]) -> jax.Array:
        opposite = [r - a for r, a in zip(_reach(conv), at, strict=True)]
        return _window(dy, opposite, sizes, conv.x_dilation) * w[tap][0]

    dx = _sum(term(tap, at) for tap, at, _ in _terms(conv))
    return dx.reshape(*dx.shape[:-1], channels, -1).sum(-1)


def kernel_gradient(conv: Any, x: jax.Array, dy: jax.Array) -> jax.Array:
    """For every place of the kernel the sum of x * dy, a few positions of a sample at a time."""
    x = windows.padded(x, [_WHOLE, *_padding_to_parts(conv), _WHOLE])

    def part(sample: jax.Array, at: list[jax.Array]) -> jax.Array:
        return lax.dynamic_slice(x, [sample, *at, 0], [1, *_spans(conv), x.shape[-1]])

    return _by_parts(conv, part, dy)


def kernel_gradient_of_core(
    conv: Any, core: jax.Array, dy: jax.Array, bases: Sequence[jax.Array | None]
) -> jax.Array:
    """The same at the expanded core, of which only what lies under those positions is there.

    bases: (n, r) of each spatial axis, None where the core has the whole axis.
    """
    acc, padding = accumulator(core.dtype), _padding_to_parts(conv)
    whole = [_WHOLE if u is not None else pad for u, pad in zip(bases, padding, strict=True)]
    core = windows.padded(core, [_WHOLE, *whole, _WHOLE])
    matrices = [
        None if basis is None else windows.padded(basis.astype(acc), [pad, _WHOLE])
        for basis, pad in zip(bases, padding, strict=True)
    ]

    def part(sample: jax.Array, at: list[jax.Array]) -> jax.Array:
        found = lax.dynamic_slice_in_dim(core, sample, 1)
        for axis, (basis, start, span) in enumerate(
            zip(matrices, at, _spans(conv), strict=True), 1
        ):
            if basis is None:
                found = lax.dynamic_slice_in_dim(found, start, span, axis)
            else:
                rows = lax.dynamic_slice_in_dim(basis, start, span)
                found = mode_product(found.astype(acc), rows.T, axis, conv.precision)
        return found

    return _by_parts(conv, part, dy)


def core_part(conv: Any) -> float:
    """How much `kernel_gradient_of_core` expands at a time, of the input."""
    return math.prod(_spans(conv)) * conv.x_shape[conv.x_axes[-1]] / math.prod(conv.x_shape)


def core_macs(conv: Any, ranks: Sequence[int]) -> int:
    """What `kernel_gradient_of_core` costs for each sample, in the time of a matrix product's MACs.

    ranks: the sizes of the core's spatial axes.
    """
    sizes, expanded = list(ranks), 0
    for i, span in enumerate(_spans(conv)):
        expanded += span * math.prod(sizes)
        sizes[i] = span
    kernel = [conv.w_shape[axis] for axis in conv.w_axes][:-2]
    parts = math.prod(count for count, _ in _parts(conv))
    positions = parts * math.prod(size for _, size in _parts(conv))
    added = math.prod(kernel) * positions * conv.y_shape[conv.y_axes[-1]] * _ELEMENTWISE
    return parts * expanded * conv.x_shape[conv.x_axes[-1]] + added


def _by_parts(conv: Any, part: Callable[..., jax.Array], dy: jax.Array) -> jax.Array:
    """The kernel's gradient; `part(sample, at)` gives what of the padded x lies under a part of dy.

    Positions are summed one by one, and the places of the kernel along its last axis lie side by
    side with the channels: XLA reduces only what is written as a sum of slices at full speed, and
    not too many of them.
    """
    samples, channels = len(dy), dy.shape[-1]
    counts, sizes = zip(*_parts(conv), strict=True)
    *kernel, last, inputs = [conv.w_shape[axis] for axis in conv.w_axes][:-1]
    whole = [count * size for count, size in zip(counts, sizes, strict=True)]
    ends = [(0, n - m, 0) for n, m in zip(whole, dy.shape[1:-1], strict=True)]
    dy = windows.padded(dy, [_WHOLE, *ends, _WHOLE])
    acc, steps = accumulator(dy.dtype), [1, *conv.w_dilation]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        sample, *places = jnp.unravel_index(i, (samples, *counts))
        at = [place * size for place, size in zip(places, sizes, strict=True)]
        dy_part = lax.dynamic_slice(dy, [sample, *at, 0], [1, *sizes, channels]).astype(acc)
        under = [a * stride for a, stride in zip(at, conv.strides, strict=True)]
        x_part = _repeated(conv, part(sample, under).astype(acc))

        def term(tap: tuple[int, ...], place: tuple[int, ...]) -> jax.Array:
            """(last axis of the kernel, input channels, channels)."""
            corner = [
                p * stride + t * dilation
                for p, stride, t, dilation in zip(
                    place, conv.strides, (*tap, 0), conv.w_dilation, strict=True
                )
            ]
            shape = [*(1 for _ in tap), 1, last, x_part.shape[-1]]
            window = windows.under(x_part, [0, *corner, 0], shape, [*steps, 1])
            window = window.reshape((last, 1, -1) if conv.depthwise else (last, -1, 1))
            return window * dy_part[(0, *place)]

        taps = itertools.product(*map(range, kernel))
        sums = [_sum(term(tap, place) for place in np.ndindex(*sizes)) for tap in taps]
        return total + jnp.stack(sums)

    zeros = jnp.zeros((math.prod(kernel), last, inputs, channels), acc)
    total = lax.fori_loop(0, samples * math.prod(counts), add, zeros)
    return total.reshape(*kernel, last, inputs, channels)


def _parts(conv: Any) -> list[tuple[int, int]]:
    """(number of parts, positions in each) of dy's spatial axes; the last may reach beyond."""
    found, left = [], _POSITIONS
    for axis in reversed(conv.y_axes[1:-1]):
        n = conv.y_shape[axis]
        count = -(-n // max(left, 1))
        size = -(-n // count)
        found.append((-(-n // size), size))
        left //= size
    return found[::-1]


def _spans(conv: Any) -> list[int]:
    """What of the padded x's spatial axes lies under a part of dy."""
    return [
        (size - 1) * stride + 1 + reach
        for (_, size), stride, reach in zip(_parts(conv), conv.strides, _reach(conv), strict=True)
    ]


def _padding_to_parts(conv: Any) -> list[tuple[int, int, int]]:
    """Of x's spatial axes, so that something lies under all parts of dy."""
    sizes = [conv.x_shape[axis] for axis in conv.x_axes][1:-1]
    found = []
    axes = zip(_padding(conv), sizes, _parts(conv), conv.strides, _reach(conv), strict=True)
    for (low, high, between), n, (count, size), stride, reach in axes:
        there = low + n + (n - 1) * between + high
        needed = (count * size - 1) * stride + 1 + reach
        found.append((low, high + max(0, needed - there), between))
    return found


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
    return windows.padded(x, [_WHOLE, *_padding(conv), _WHOLE])


def _padding(conv: Any) -> list[tuple[int, int, int]]:
    """Of x's spatial axes, its dilation included."""
    spread = zip(conv.padding, conv.x_dilation, strict=True)
    return [(low, high, d - 1) for (low, high), d in spread]


def _repeated(conv: Any, x: jax.Array) -> jax.Array:
    """Each channel as often as a depthwise convolution has outputs for it."""
    multiplier = conv.y_shape[conv.y_axes[-1]] // x.shape[-1]
    return jnp.repeat(x, multiplier, axis=-1) if conv.depthwise and multiplier > 1 else x
