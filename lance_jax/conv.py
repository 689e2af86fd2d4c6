"""Convolutions whose kernel is a parameter: any rank, stride, dilation, padding, layout, groups."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lance_jax import hosvd, shifted, windows
from lance_jax.dense import gram
from lance_jax.modes import Steps, accumulator, apply_chain, cheapest_chain, mode_product

_SPATIAL = ("depth", "height", "width")
# Bytes of patches that calibration holds at once.
_PATCH_BYTES = 64 * 2**20
# Places of a kernel up to which its gradient is a matrix product for each: more take long to
# compile.
_TAPS = 49


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution y = conv(x, w).

    The rules below see x as (batch, spatial..., channel), w as (spatial..., channel / groups,
    out) and dy as (batch, spatial..., out), whatever the layout.
    """

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    x_axes: tuple[int, ...]  # x.transpose(x_axes) is (batch, spatial..., channel)
    w_axes: tuple[int, ...]  # w.transpose(w_axes) is (spatial..., channel / groups, out)
    y_axes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    w_dilation: tuple[int, ...]
    groups: int
    precision: Any

    kind = "conv"
    update_mode = "patch"  # the rows of the weight, in which an update is confined

    @classmethod
    def of(cls, eqn: Any) -> "Conv":
        """From a `conv_general_dilated` equation whose kernel is its second operand."""
        x, w, y = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
        return cls.with_params(x, w, y, eqn.params)

    @classmethod
    def with_params(cls, x_shape: Any, w_shape: Any, y_shape: Any, p: Mapping[str, Any]) -> "Conv":
        """From the shapes and the parameters of such an equation."""
        (n, c, *xs), (o, i, *ws), (yn, yo, *ys) = p["dimension_numbers"]
        return cls(
            x_shape=x_shape,
            w_shape=w_shape,
            y_shape=y_shape,
            x_axes=(n, *xs, c),
            w_axes=(*ws, i, o),
            y_axes=(yn, *ys, yo),
            strides=tuple(p["window_strides"]),
            padding=tuple(map(tuple, p["padding"])),
            x_dilation=tuple(p["lhs_dilation"]),
            w_dilation=tuple(p["rhs_dilation"]),
            groups=p["feature_group_count"],
            precision=p["precision"],
        )

    @property
    def batch_axis(self) -> int:
        """The axis of x that holds the samples."""
        return self.x_axes[0]

    @property
    def dy_batch_axis(self) -> int:
        """The axis of y that holds the samples."""
        return self.y_axes[0]

    @property
    def modes(self) -> dict[str, int]:
        """Mode name -> size: batch, as many spatial modes as there are, channel, patch."""
        n, *spatial, c = self._x_sizes
        *kernel, i, _ = self._w_sizes
        modes = {"batch": n, **dict(zip(self._spatial_names, spatial, strict=True))}
        if self.groups == 1:
            modes["channel"] = c
        return {**modes, "patch": math.prod(kernel) * i}

    @property
    def default_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode not in ("batch", "patch"))

    @property
    def paper_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode != "patch")

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self._w_sizes[-2] == 1

    def basis_shape(self, mode: str) -> tuple[int, ...]:
        """The shape that a basis of this mode has, without its rank."""
        n = self.modes[mode]
        return (self.groups, n) if mode == "patch" and self.groups > 1 else (n,)

    @property
    def macs(self) -> int:
        """MACs of the forward convolution, padding counted; dX costs as many."""
        return math.prod(self.y_shape) * math.prod(self._w_sizes[:-1])

    @property
    def _x_sizes(self) -> tuple[int, ...]:
        return tuple(self.x_shape[axis] for axis in self.x_axes)

    @property
    def _w_sizes(self) -> tuple[int, ...]:
        return tuple(self.w_shape[axis] for axis in self.w_axes)

    @property
    def _y_sizes(self) -> tuple[int, ...]:
        return tuple(self.y_shape[axis] for axis in self.y_axes)

    @property
    def _spatial_names(self) -> tuple[str, ...]:
        return _SPATIAL[3 - len(self.strides) :]

    def _axis(self, mode: str) -> int:
        """The axis of a mode in (batch, spatial..., channel)."""
        return ("batch", *self._spatial_names, "channel").index(mode)

    # --- the core ---

    def canonical(self, x: jax.Array) -> jax.Array:
        """x as (batch, spatial..., channel)."""
        return x.transpose(self.x_axes)

    def project(self, x: jax.Array, bases: Mapping[str, jax.Array]) -> jax.Array:
        """The core: (batch, spatial..., channel), or (batch, out spatial..., groups * r).

        x: canonical.
        """
        steps = self._steps({m: u.shape[-1] for m, u in bases.items() if m != "patch"})
        _, order = cheapest_chain(math.prod(self.x_shape), steps)
        core = apply_chain(x, self._matrices(bases), order, self.precision)
        if "patch" not in bases:
            return core
        kernel = self._patch_kernel(bases["patch"]).astype(x.dtype)
        acc = accumulator(x.dtype)
        return self._conv(core, kernel, preferred_element_type=acc).astype(x.dtype)

    def core_shape(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        if "patch" in ranks:
            shape = [*self._y_sizes[:-1], self.groups * ranks["patch"]]
        else:
            shape = list(self._x_sizes)
        for mode, rank in ranks.items():
            if mode != "patch":
                shape[self._axis(mode)] = rank
        return tuple(shape)

    def project_macs(self, ranks: Mapping[str, int]) -> int:
        rest = {m: r for m, r in ranks.items() if m != "patch"}
        macs = cheapest_chain(math.prod(self.x_shape), self._steps(rest))[0]
        if "patch" in ranks:
            macs += math.prod(self.core_shape(ranks)) * self.modes["patch"]
        return macs

    # --- the weight gradient ---

    def weight_gradient(
        self, core: jax.Array, dy: jax.Array, bases: Mapping[str, jax.Array], dtype: Any
    ) -> jax.Array:
        """dW at the projected input, from the core alone, in the cheapest order by MACs."""
        dy = dy.transpose(self.y_axes)
        ranks = tuple((mode, u.shape[-1]) for mode, u in bases.items())
        macs, expand, project, steps = _cheapest(self, ranks)
        matrices = self._matrices(bases)
        core = apply_chain(core, {a: u.T for a, u in matrices.items()}, expand, self.precision)
        dy = apply_chain(dy, matrices, project, self.precision)
        if "patch" in bases:
            dw = self._patch_gradient(core, dy, bases["patch"])
        elif steps:
            dw = self._projected_gradient(core, dy, matrices, steps, macs)
        else:
            dw = self._plain_gradient(core, dy)
        if "channel" in bases:
            dw = mode_product(dw, bases["channel"].T, dw.ndim - 2, self.precision)
        return dw.transpose(tuple(np.argsort(self.w_axes))).astype(dtype)

    def weight_gradient_macs(self, ranks: Mapping[str, int]) -> int:
        return _cheapest(self, tuple(ranks.items()))[0]

    def confine(self, dw: jax.Array, u: jax.Array) -> jax.Array:
        """U U^T dW, over each group's patches."""
        acc = accumulator(dw.dtype)
        rows = dw.transpose(self.w_axes).reshape(self.modes["patch"], self.groups, -1).astype(acc)
        u = u.reshape(self.groups, -1, u.shape[-1]).astype(acc)
        small = jnp.einsum("gkr,kgm->grm", u, rows, precision=self.precision)
        rows = jnp.einsum("gkr,grm->kgm", u, small, precision=self.precision)
        confined = rows.reshape(self._w_sizes).transpose(tuple(np.argsort(self.w_axes)))
        return confined.astype(dw.dtype)

    def confine_macs(self, rank: int) -> int:
        return 2 * math.prod(self.w_shape) * rank

    def _plain_gradient(self, core: jax.Array, dy: jax.Array) -> jax.Array:
        """(spatial..., channel / groups, out) from whole spatial axes."""
        if self.pointwise:
            steps = (slice(None), *(slice(None, None, s) for s in self.strides))
            batch = tuple(range(dy.ndim - 1))
            dims = ((batch, batch), ((), ()))
            dw = lax.dot_general(core[steps], dy, dims, self.precision, accumulator(dy.dtype))
            return dw.reshape((1,) * len(self.strides) + dw.shape)
        if not self.has_tap_gradient:
            return self._transposed_gradient(core, dy)
        return lax.platform_dependent(
            core, dy, cpu=self.tap_gradient, default=self._transposed_gradient
        )

    def _transposed_gradient(self, core: jax.Array, dy: jax.Array) -> jax.Array:
        *kernel, _, out = self._w_sizes
        w = jax.ShapeDtypeStruct((*kernel, core.shape[-1] // self.groups, out), dy.dtype)
        return jax.linear_transpose(lambda w: self._conv(core, w), w)(dy)[0]

    @property
    def has_tap_gradient(self) -> bool:
        """Whether `tap_gradient` is there: ungrouped, no large kernel, an output to speak of."""
        small = math.prod(self._w_sizes[:-2]) <= _TAPS
        return self.groups == 1 and small and math.prod(self.y_shape) > 0

    def tap_gradient(self, x: jax.Array, dy: jax.Array) -> jax.Array:
        """(spatial..., channel, out): for each place of the kernel a matrix product over windows.

        On a CPU faster than XLA's own, and in the body of a loop up to 50 times: it does not find
        its fast form of that convolution there.
        """
        spread = zip(self.padding, self.x_dilation, strict=True)
        x = windows.padded(x, [(0, 0, 0), *((a, b, d - 1) for (a, b), d in spread), (0, 0, 0)])
        axes = tuple(range(dy.ndim - 1))
        sizes = (*dy.shape[:-1], x.shape[-1])
        products = []
        for tap in np.ndindex(*self._w_sizes[:-2]):
            at = [t * d for t, d in zip(tap, self.w_dilation, strict=True)]
            window = windows.under(x, [0, *at, 0], sizes, [1, *self.strides, 1])
            dims = ((axes, axes), ((), ()))
            acc = accumulator(dy.dtype)
            products.append(lax.dot_general(window, dy, dims, self.precision, acc))
        dw = jnp.stack(products).astype(dy.dtype)
        return dw.reshape(*self._w_sizes[:-2], x.shape[-1], dy.shape[-1])

    def _projected_gradient(
        self,
        core: jax.Array,
        dy: jax.Array,
        matrices: dict[int, jax.Array],
        steps: Steps,
        macs: int,
    ) -> jax.Array:
        """(spatial..., channel / groups, out) from a core whose spatial axes are not whole.

        macs: what it costs by `steps`; on a CPU parts of the input may be expanded for less.
        """
        default = functools.partial(self._shifted_gradient, steps=steps)
        if not self.depthwise or self.modes["patch"] > shifted.MOST_TAPS or not dy.size:
            return default(core, dy, matrices)
        macs_by_parts = len(dy) * shifted.core_macs(self, core.shape[1:-1])
        if shifted.core_part(self) >= 1 or macs_by_parts > macs:
            return default(core, dy, matrices)

        def by_parts(core: jax.Array, dy: jax.Array, matrices: dict[int, jax.Array]) -> jax.Array:
            bases = [matrices.get(axis) for axis in range(1, core.ndim - 1)]
            return shifted.kernel_gradient_of_core(self, core, dy, bases)

        return lax.platform_dependent(core, dy, matrices, cpu=by_parts, default=default)

    def _shifted_gradient(
        self, core: jax.Array, dy: jax.Array, matrices: dict[int, jax.Array], steps: Steps
    ) -> jax.Array:
        """(spatial..., channel / groups, out) from dy projected by each tap's shifted basis."""
        count = len(self.strides)
        batch, group, channel, out = 0, 1, 2, 3
        small, taps, ys = (list(range(4 + i * count, 4 + (i + 1) * count)) for i in range(3))
        dy = self._by_group(dy)
        axes = [batch, *ys, group, out]
        acc = accumulator(dy.dtype)
        for axis, _, _ in steps:
            i = axis - 1
            v = self._shifted(i, matrices.get(axis)).astype(dy.dtype)
            new = [*(a for a in axes if a != ys[i]), taps[i], small[i]]
            args = (dy, axes, v, [taps[i], ys[i], small[i]], new)
            dy = jnp.einsum(*args, precision=self.precision, preferred_element_type=acc)
            dy, axes = dy.astype(core.dtype), new
        core = self._by_group(core)
        inner = [batch, *small, group, channel]
        args = (core, inner, dy, axes, [*taps, channel, group, out])
        dw = jnp.einsum(*args, precision=self.precision, preferred_element_type=acc)
        return dw.reshape(*dw.shape[:-2], -1)

    def _shifted(self, i: int, u: jax.Array | None) -> jax.Array:
        """(taps, y, r): the row of the basis that tap k meets at output position y, or zeros."""
        n, k, y = self._x_sizes[1 + i], self._w_sizes[i], self._y_sizes[1 + i]
        at = np.arange(y) * self.strides[i] - self.padding[i][0]
        at = at + np.arange(k)[:, None] * self.w_dilation[i]
        row, rest = np.divmod(at, self.x_dilation[i])
        inside = (rest == 0) & (row >= 0) & (row < n)
        u = jnp.eye(n) if u is None else u
        return jnp.where(inside[..., None], u[np.clip(row, 0, n - 1)], jnp.zeros((), u.dtype))

    def _patch_gradient(self, core: jax.Array, dy: jax.Array, u: jax.Array) -> jax.Array:
        core, dy = self._by_group(core), self._by_group(dy)
        acc = accumulator(dy.dtype)
        options = {"precision": self.precision, "preferred_element_type": acc}
        dw = jnp.einsum("...gr,...gm->grm", core, dy, **options)
        u = u.reshape(self.groups, -1, u.shape[-1]).astype(dw.dtype)
        return jnp.einsum("gkr,grm->kgm", u, dw, precision=self.precision).reshape(self._w_sizes)

    # --- the layer's own tensors ---

    def gram(self, x: jax.Array, mode: str) -> jax.Array:
        """X_(m) X_(m)^T of one mode: (n, n), or its sketch (n, k + 1) where n is wide (`hosvd`).

        (groups, ...) of a grouped layer's patches.
        """
        x = x.transpose(self.x_axes)
        if mode != "patch":
            return gram(x, self._axis(mode))
        x = x.astype(accumulator(x.dtype))
        n, y = self.modes["patch"], math.prod(self._y_sizes[1:-1])
        sample = y * n * self.groups * x.dtype.itemsize
        parts = next(
            p for p in _divisors(len(x)) if len(x) // p * sample <= _PATCH_BYTES or p == len(x)
        )

        def add(total, part):
            return total + jax.vmap(lambda rows: gram(rows, 1))(self._patches(part)), None

        total = jnp.zeros((self.groups, n, hosvd.columns(n)), x.dtype)
        total, _ = lax.scan(add, total, x.reshape(parts, -1, *x.shape[1:]))
        return total if self.groups > 1 else total[0]

    def _patches(self, x: jax.Array) -> jax.Array:
        """(groups, batch * out positions, kernel * channel / groups), rows ordered (kernel, C)."""
        kernel = self._w_sizes[: len(self.strides)]
        args = (x, kernel, self.strides, self.padding, self.x_dilation, self.w_dilation)
        numbers = self.numbers(x.ndim)
        patches = lax.conv_general_dilated_patches(
            *args, dimension_numbers=numbers, precision=lax.Precision.HIGHEST
        )
        patches = patches.reshape(-1, self.groups, x.shape[-1] // self.groups, math.prod(kernel))
        return patches.transpose(1, 0, 3, 2).reshape(self.groups, len(patches), -1)

    def _by_group(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)

    def _patch_kernel(self, u: jax.Array) -> jax.Array:
        *kernel, i, _ = self._w_sizes
        u = u.reshape(self.groups, *kernel, i, u.shape[-1])
        return jnp.moveaxis(u, 0, -2).reshape(*kernel, i, -1)

    def _matrices(self, bases: Mapping[str, jax.Array]) -> dict[int, jax.Array]:
        return {self._axis(m): u for m, u in bases.items() if m != "patch"}

    def _steps(self, ranks: Mapping[str, int]) -> Steps:
        sizes = self.modes
        return tuple((self._axis(m), sizes[m], r) for m, r in ranks.items())

    def _conv(self, x: jax.Array, w: jax.Array, preferred_element_type: Any = None) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            w,
            self.strides,
            self.padding,
            self.x_dilation,
            self.w_dilation,
            self.numbers(x.ndim),
            self.groups,
            precision=self.precision,
            preferred_element_type=preferred_element_type,
        )

    @staticmethod
    def numbers(ndim: int) -> lax.ConvDimensionNumbers:
        """Of a convolution of x, w and y in the order that the rules see them in."""
        spatial = tuple(range(1, ndim - 1))
        x = (0, ndim - 1, *spatial)
        return lax.ConvDimensionNumbers(x, (ndim - 1, ndim - 2, *range(ndim - 2)), x)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at each position: 1x1, ungrouped, nothing padded."""
        return (
            self.groups == 1
            and all(size == 1 for size in self._w_sizes[: len(self.strides)])
            and all(pad == (0, 0) for pad in self.padding)
            and all(d == 1 for d in self.x_dilation)
        )


@functools.lru_cache(maxsize=4096)
def _cheapest(layer: Conv, ranks: tuple[tuple[str, int], ...]) -> tuple[int, Steps, Steps, Steps]:
    """(MACs, expansions of the core, projections of dy, shifted projections of dy), the cheapest.

    The batch basis expands the core or projects dy. The spatial bases expand the core while its
    channel is small, and a convolution follows; or, shifted by each tap of the kernel, they project
    dy, and a matrix product follows. The channel basis comes last. Without one the core is never
    expanded: that would rebuild the input.
    """
    rank = dict(ranks)
    *kernel, i, out = layer._w_sizes
    n, *ys, _ = layer._y_sizes
    core, dy = math.prod(layer.core_shape(rank)), math.prod(layer.y_shape)
    batch = layer._steps({"batch": rank["batch"]} if "batch" in rank else {})
    spatial = layer._steps({m: r for m, r in ranks if m in layer._spatial_names})
    last = (
        layer.modes["channel"] * rank["channel"] * math.prod(kernel) * out
        if "channel" in rank
        else 0
    )

    options = []
    for expand_batch in (False, True) if "channel" in rank or "patch" in rank else (False,):
        up, down = (batch, ()) if expand_batch else ((), batch)
        samples = n if expand_batch or not batch else rank["batch"]
        dy_macs, y_size = sum(dy * r for _, _, r in down), dy // n * samples
        if "patch" in rank:
            k, r = layer.modes["patch"], rank["patch"]
            macs = sum(core * b for _, _, b in _flip(up)) + dy_macs + y_size * r + k * r * out
            options.append((macs, _flip(up), down, ()))
            continue
        if "channel" in rank or not spatial:
            macs, expand = cheapest_chain(core, _flip((*up, *spatial)))
            channels = rank.get("channel", i)
            macs += dy_macs + y_size * math.prod(kernel) * channels + last
            options.append((macs, expand, down, ()))
        if spatial:
            expand_macs, expand = cheapest_chain(core, _flip(up))
            steps = tuple(_tap_step(layer, rank, j) for j in range(len(ys)))
            shift_macs, steps = cheapest_chain(y_size, steps)
            macs = expand_macs + dy_macs + shift_macs
            small = math.prod(rank.get(m, layer.modes[m]) for m in layer._spatial_names)
            macs += samples * small * math.prod(kernel) * rank.get("channel", i) * out + last
            options.append((macs, expand, down, steps))
    return min(options)


def _tap_step(layer: Conv, rank: dict[str, int], j: int) -> tuple[int, int, int]:
    """dy's axis j + 1 of size y becomes taps x rank."""
    mode = layer._spatial_names[j]
    return j + 1, layer._y_sizes[1 + j], layer._w_sizes[j] * rank.get(mode, layer.modes[mode])


def _flip(steps: Steps) -> Steps:
    return tuple((axis, after, before) for axis, before, after in steps)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
