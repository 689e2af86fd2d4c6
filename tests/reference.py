"""The mathematics of the package, naive, in float64 numpy: what every test compares with.

An operation (`Conv`, `Dense`) knows its shapes and gives the output, both plain gradients and a
*canonical* view of its input, in which each mode is one axis: (batch, spatial..., channel) for a
convolution, (shared..., batch, token..., feature) for a dense product.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Conv:
    """y = conv(x, w). Layouts are strings of N, C, O, I and spatial letters, as in jax.lax."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    layout: tuple[str, str, str] = ("NHWC", "HWIO", "NHWC")
    strides: tuple[int, ...] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "VALID"
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    x_dilation: tuple[int, ...] = (1, 1, 1)

    @property
    def batch_axis(self) -> int:
        """The axis of the input, in its own layout, that holds the samples."""
        return self.layout[0].index("N")

    @property
    def spatial(self) -> str:
        return "".join(letter for letter in self.layout[1] if letter not in "OI")

    @property
    def names(self) -> tuple[str, ...]:
        """The modes of the canonical input's axes."""
        spatial = {"D": "depth", "H": "height", "W": "width"}
        return ("batch", *(spatial[letter] for letter in self.spatial), "channel")

    @property
    def modes(self) -> dict[str, int]:
        """The modes that a basis may have, and their sizes."""
        modes = dict(zip(self.names, self.canonical_shape, strict=True))
        if self.groups > 1:
            del modes["channel"]
        return {**modes, "patch": math.prod(self.kernel) * self.w_sizes[-2]}

    @property
    def default_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode not in ("batch", "patch"))

    @property
    def w_sizes(self) -> tuple[int, ...]:
        return tuple(self.w_shape[axis] for axis in self._axes(1))

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.w_sizes[:-2]

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        return tuple(self.x_shape[axis] for axis in self._axes(0))

    def canonical(self, x):
        return np.transpose(x, self._axes(0))

    def restore(self, x):
        return np.transpose(x, np.argsort(self._axes(0)))

    def forward(self, x, w):
        patches = self.patches(x)
        y = np.einsum("gpk,kgo->pgo", patches, self._grouped_kernel(w))
        return y.reshape(self._y_sizes()).transpose(np.argsort(self._axes(2)))

    def dweight(self, x, dy):
        return self.dweight_of_patches(self.patches(x), dy)

    def dweight_of_patches(self, patches, dy):
        dw = np.einsum("gpk,pgo->kgo", patches, self._grouped_output(dy))
        return dw.reshape(self.w_sizes).transpose(np.argsort(self._axes(1)))

    def dinput(self, w, dy):
        """The transpose of `patches`: every patch is added where it was taken."""
        dpatches = np.einsum("pgo,kgo->gpk", self._grouped_output(dy), self._grouped_kernel(w))
        n, *out, _ = self._y_sizes()
        shape = (self.groups, n, *out, math.prod(self.kernel), -1)
        dpatches = np.moveaxis(dpatches.reshape(shape), 0, -2)
        dpatches = dpatches.reshape(*dpatches.shape[:-2], -1)  # (n, *out, tap, channel)
        padded = np.zeros((n, *self._padded_sizes(), self.canonical_shape[-1]))
        for tap, where in enumerate(self._windows()):
            padded[where] += dpatches[..., tap, :]
        dx = np.zeros(self.canonical_shape)
        inside, source = self._placement()
        dx[source] = padded[inside]
        return self.restore(dx)

    def patches(self, x):
        """im2col: (groups, batch * positions, kernel * channel / groups), columns (kernel, C)."""
        x = self.canonical(np.asarray(x, np.float64))
        padded = np.zeros((len(x), *self._padded_sizes(), x.shape[-1]))
        inside, source = self._placement()
        padded[inside] = x[source]
        taps = np.stack([padded[where] for where in self._windows()], axis=-2)
        taps = taps.reshape(-1, len(self._windows()), self.groups, x.shape[-1] // self.groups)
        return taps.transpose(2, 0, 1, 3).reshape(self.groups, len(taps), -1)

    def _axes(self, which):
        first, last = ("O", "I") if which == 1 else ("N", "C")
        order = self.spatial + "IO" if which == 1 else first + self.spatial + last
        return tuple(self.layout[which].index(letter) for letter in order)

    def _pairs(self):
        if not isinstance(self.padding, str):
            return self.padding
        if self.padding == "VALID":
            return [(0, 0)] * len(self.strides)
        pairs = []
        for n, k, s, d in zip(
            self.canonical_shape[1:-1], self.kernel, self.strides, self.dilation, strict=True
        ):
            total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pairs.append((total // 2, total - total // 2))
        return pairs

    def _dilated_sizes(self):
        return [
            (n - 1) * d + 1
            for n, d in zip(self.canonical_shape[1:-1], self.x_dilation, strict=False)
        ]

    def _padded_sizes(self):
        pairs = zip(self._dilated_sizes(), self._pairs(), strict=True)
        return [n + low + high for n, (low, high) in pairs]

    def _placement(self):
        """Where in the padded input which part of the input stands (negative padding crops)."""
        inside, source = [slice(None)], [slice(None)]
        for n, size, (low, _), d in zip(
            self.canonical_shape[1:-1],
            self._padded_sizes(),
            self._pairs(),
            self.x_dilation,
            strict=False,
        ):
            kept = [i for i in range(n) if 0 <= i * d + low < size]
            source.append(slice(kept[0], kept[-1] + 1))
            inside.append(slice(kept[0] * d + low, kept[-1] * d + low + 1, d))
        return tuple(inside), tuple(source)

    def _windows(self):
        """For each tap of the kernel, the elements of the padded input that it meets."""
        sizes = self._y_sizes()[1:-1]
        windows = []
        for tap in np.ndindex(*self.kernel):
            where = [slice(None)]
            for k, d, s, size in zip(tap, self.dilation, self.strides, sizes, strict=True):
                where.append(slice(k * d, k * d + (size - 1) * s + 1, s))
            windows.append(tuple(where))
        return windows

    def _y_sizes(self):
        out = [
            (n - (k - 1) * d - 1) // s + 1
            for n, k, d, s in zip(
                self._padded_sizes(), self.kernel, self.dilation, self.strides, strict=True
            )
        ]
        return (self.canonical_shape[0], *out, self.w_sizes[-1])

    def _grouped_kernel(self, w):
        w = np.transpose(np.asarray(w, np.float64), self._axes(1))
        return w.reshape(-1, self.groups, self.w_sizes[-1] // self.groups)

    def _grouped_output(self, dy):
        dy = np.transpose(np.asarray(dy, np.float64), self._axes(2))
        return dy.reshape(-1, self.groups, self.w_sizes[-1] // self.groups)


@dataclasses.dataclass(frozen=True)
class Dense:
    """y = einsum(spec, x, w), the input first: "btd,df->btf"."""

    spec: str
    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]

    groups = 1

    @property
    def batch_axis(self) -> int:
        """The axis of the input, in its own layout, that holds the samples."""
        return self.letters[0].index(self._parts()[1][0])

    @property
    def letters(self) -> tuple[str, str, str]:
        inputs, y = self.spec.split("->")
        x, w = inputs.split(",")
        return x, w, y

    @property
    def names(self) -> tuple[str, ...]:
        """The modes of the canonical input's axes ("shared" has no mode of its own)."""
        shared, free, _ = self._parts()
        tokens = ["token"] if len(free) == 2 else [f"token{i}" for i in range(len(free) - 1)]
        return ("shared",) * len(shared) + tuple(["batch", *tokens][: len(free)]) + ("feature",)

    @property
    def modes(self) -> dict[str, int]:
        modes = dict(zip(self.names, self.canonical_shape, strict=True))
        modes.pop("shared", None)
        return modes

    @property
    def default_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode != "batch")

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        shared, free, contracted = self._parts()
        size = dict(zip(self.letters[0], self.x_shape, strict=True))
        feature = math.prod(size[letter] for letter in contracted)
        return (*(size[letter] for letter in shared + free), feature)

    def canonical(self, x):
        return np.transpose(x, self._axes()).reshape(self.canonical_shape)

    def restore(self, x):
        x = x.reshape([self.x_shape[axis] for axis in self._axes()])
        return x.transpose(np.argsort(self._axes()))

    def forward(self, x, w):
        return self._einsum(self.spec, x, w)

    def dweight(self, x, dy):
        x_letters, w_letters, y_letters = self.letters
        return self._einsum(f"{x_letters},{y_letters}->{w_letters}", x, dy)

    def dinput(self, w, dy):
        x_letters, w_letters, y_letters = self.letters
        return self._einsum(f"{w_letters},{y_letters}->{x_letters}", w, dy)

    @staticmethod
    def _einsum(spec, a, b):
        return np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))

    def _parts(self):
        x, w, y = self.letters
        shared = "".join(letter for letter in x if letter in w and letter in y)
        free = "".join(letter for letter in x if letter not in w)
        return shared, free, "".join(letter for letter in x if letter in w and letter not in y)

    def _axes(self):
        return tuple(self.letters[0].index(letter) for letter in "".join(self._parts()))


Op = Any  # Conv | Dense


def unfold(x, axis: int):
    """X_(m): the fibres of one axis as columns."""
    return np.moveaxis(np.asarray(x, np.float64), axis, 0).reshape(x.shape[axis], -1)


def gram(op: Op, x, mode: str):
    """The Gram matrix of a mode of the input x; (groups, n, n) for the patch mode of groups."""
    if mode == "patch":
        patches = op.patches(x)
        grams = np.einsum("gpk,gpl->gkl", patches, patches)
        return grams if op.groups > 1 else grams[0]
    columns = unfold(op.canonical(x), op.names.index(mode))
    return columns @ columns.T


def smallest_rank(gram, energy: float) -> int:
    """The fewest leading eigenvalues that reach the share `energy` of the trace."""
    values = np.linalg.eigvalsh(gram)[::-1]
    for rank in range(1, len(values) + 1):
        if values[:rank].sum() >= energy * values.sum() * (1 - 1e-12):
            return rank
    raise AssertionError("all eigenvalues together are the trace")


def projector(basis):
    basis = np.asarray(basis, np.float64)
    return basis @ np.swapaxes(basis, -1, -2)


def lost_share(gram, basis) -> float:
    """The share of the trace that a basis does not capture."""
    return 1 - np.trace(projector(basis) @ gram) / np.trace(gram)


def core(op: Op, x, bases: Mapping[str, np.ndarray]):
    """What is kept of x: the canonical input projected, or patches (groups, positions, r)."""
    kept = op.canonical(np.asarray(x, np.float64))
    for mode, basis in bases.items():
        if mode != "patch":
            kept = _along(kept, np.asarray(basis, np.float64).T, op.names.index(mode))
    if "patch" in bases:
        return op.patches(op.restore(kept)) @ _by_group(bases["patch"])
    return kept


def dweight(op: Op, x, dy, bases, mean=None, core_dtype=None, nudge=0.0):
    """dW of plain backprop at X^, the input that the stored core stands for.

    `nudge`, a share of the largest value, is added to the core before it is stored: float32 may
    fall on the other side of where a core's value is rounded.
    """
    x = np.asarray(x, np.float64)
    share = 0.0
    if mean is not None:
        mean = np.expand_dims(np.asarray(mean, np.float64), op.batch_axis)
        mean = np.broadcast_to(mean, x.shape)
        share, x = op.dweight(mean, dy), x - mean
    kept = core(op, x, bases)
    kept = stored(kept + nudge * np.abs(kept).max(), core_dtype, grouped="patch" in bases)
    if "patch" not in bases:
        return share + op.dweight(rebuild(op, kept, bases), dy)
    patches = kept @ np.swapaxes(_by_group(bases["patch"]), 1, 2)
    if "batch" in bases:  # the projection of the samples and taking patches commute
        basis = np.asarray(bases["batch"], np.float64)
        samples = patches.reshape(op.groups, basis.shape[1], -1, patches.shape[-1])
        patches = _along(samples, basis, 1).reshape(op.groups, -1, patches.shape[-1])
    return share + op.dweight_of_patches(patches, dy)


def rebuild(op: Op, kept, bases: Mapping[str, np.ndarray]):
    """X^ from a core of modes other than patch."""
    for mode, basis in bases.items():
        kept = _along(kept, np.asarray(basis, np.float64), op.names.index(mode))
    return op.restore(kept)


STEPS = {"int8": 255, "int4": 15}


def stored(kept, core_dtype: str | None, grouped: bool = False):
    """A core as it comes back from storage; of a grouped convolution, the groups come first."""
    if core_dtype is None:
        return kept
    if core_dtype == "bfloat16":
        return _round_bfloat16(kept)
    if grouped:  # the groups' channels stand side by side in what is stored
        beside = np.moveaxis(kept, 0, -2)
        back = _in_groups(beside.reshape(*beside.shape[:-2], -1), STEPS[core_dtype])
        return np.moveaxis(back.reshape(beside.shape), -2, 0)
    return _in_groups(kept, STEPS[core_dtype])


def _in_groups(kept, steps: int):
    """Values in steps between their group's ends, these in whole units of the range of 32 groups.

    A unit is 1 / 253.5 of the range; of a range without width its own magnitude.
    """
    columns = kept.reshape(-1, _stored_channels(kept.shape))
    size = 2 * math.ceil(len(columns) / math.ceil(len(columns) / 32) / 2)
    places = [
        (slice(i, i + size), channel)
        for i in range(0, len(columns), size)
        for channel in range(columns.shape[1])
    ]
    back = np.empty_like(columns)
    for start in range(0, len(places), 32):
        near = places[start : start + 32]
        least = min(columns[place].min() for place in near)
        greatest = max(columns[place].max() for place in near)
        unit = (greatest - least) / 253.5 or abs(least) or 1.0
        for place in near:
            low = np.floor(columns[place].min() / unit) * unit
            high = np.ceil(columns[place].max() / unit) * unit
            step = (high - low) / steps or 1.0
            back[place] = low + np.round((columns[place] - low) / step) * step
    return back.reshape(kept.shape)


def _stored_channels(shape) -> int:
    """Groups are of neighbouring values of a channel; where these are few, of the whole core."""
    return shape[-1] if shape and math.prod(shape) >= 16 * shape[-1] else 1


def stored_arrays(shape, core_dtype: str | None, dtype: Any = "float32"):
    """(shape, dtype) of each array that a stored core consists of."""
    if core_dtype in (None, "bfloat16"):
        return [(tuple(shape), str(core_dtype or dtype))]
    size, channels = math.prod(shape), _stored_channels(shape)
    groups = math.ceil(size // channels / 32)
    values = tuple(shape) if core_dtype == "int8" else (math.ceil(size / channels / 2), channels)
    ranges = math.ceil(groups * channels / 32)
    return [(values, "uint8"), ((2, groups, channels), "uint8"), ((2, ranges), "float32")]


def stored_bytes(shape, core_dtype: str | None, dtype: Any = "float32") -> int:
    """Bytes of a stored core, its groups' bounds and ranges counted."""
    arrays = stored_arrays(shape, core_dtype, dtype)
    sizes = [2 if dtype == "bfloat16" else np.dtype(dtype).itemsize for _, dtype in arrays]
    return sum(math.prod(shape) * size for (shape, _), size in zip(arrays, sizes, strict=True))


def side_by_side(shape):
    """The stored shape of a grouped convolution's cores: the groups' channels together."""
    return (*shape[1:-1], shape[0] * shape[-1])


def _round_bfloat16(x):
    mantissa, exponent = np.frexp(x)  # 8 significant bits, nearest even
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def _along(x, matrix, axis: int):
    return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)


def _by_group(basis):
    basis = np.asarray(basis, np.float64)
    return basis if basis.ndim == 3 else basis[None]
