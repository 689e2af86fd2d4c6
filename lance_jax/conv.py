"""Convolutions whose kernel is a parameter: any rank, stride, dilation, padding, layout, groups."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lance_jax import hosvd, shifted, windows
from lance_jax.conv_order import cheapest_order
from lance_jax.conv_shape import ConvShape
from lance_jax.dense import gram
from lance_jax.modes import Steps, accumulator, apply_chain, cheapest_chain, mode_product

# Bytes of patches that calibration holds at once.
_PATCH_BYTES = 64 * 2**20
# Places of a kernel up to which its gradient is a matrix product for each: more take long to
# compile.
_TAPS = 49


class Conv(ConvShape):
    """How a convolution keeps its input and computes its weight gradient from what is kept."""

    # --- the core ---

    def canonical(self, x: jax.Array) -> jax.Array:
        """x as (batch, spatial..., channel)."""
        return x.transpose(self.x_axes)

    def project(self, x: jax.Array, bases: Mapping[str, jax.Array]) -> jax.Array:
        """The core: (batch, spatial..., channel), or (batch, out spatial..., groups * r).

        x: canonical.
        """
        steps = self.steps({m: u.shape[-1] for m, u in bases.items() if m != "patch"})
        _, order = cheapest_chain(math.prod(self.x_shape), steps)
        core = apply_chain(x, self._matrices(bases), order, self.precision)
        if "patch" not in bases:
            return core
        kernel = self._patch_kernel(bases["patch"]).astype(x.dtype)
        acc = accumulator(x.dtype)
        return self._conv(core, kernel, preferred_element_type=acc).astype(x.dtype)

    def project_macs(self, ranks: Mapping[str, int]) -> int:
        rest = {m: r for m, r in ranks.items() if m != "patch"}
        macs = cheapest_chain(math.prod(self.x_shape), self.steps(rest))[0]
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
        macs, expand, project, steps = cheapest_order(self, ranks)
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
        return cheapest_order(self, tuple(ranks.items()))[0]

    def confine(self, dw: jax.Array, u: jax.Array) -> jax.Array:
        """U U^T dW, over each group's patches."""
        acc = accumulator(dw.dtype)
        rows = dw.transpose(self.w_axes).reshape(self.modes["patch"], self.groups, -1).astype(acc)
        u = u.reshape(self.groups, -1, u.shape[-1]).astype(acc)
        small = jnp.einsum("gkr,kgm->grm", u, rows, precision=self.precision)
        rows = jnp.einsum("gkr,grm->kgm", u, small, precision=self.precision)
        confined = rows.reshape(self.w_sizes).transpose(tuple(np.argsort(self.w_axes)))
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
        *kernel, _, out = self.w_sizes
        w = jax.ShapeDtypeStruct((*kernel, core.shape[-1] // self.groups, out), dy.dtype)
        return jax.linear_transpose(lambda w: self._conv(core, w), w)(dy)[0]

    @property
    def has_tap_gradient(self) -> bool:
        """Whether `tap_gradient` is there: ungrouped, no large kernel, an output to speak of."""
        small = math.prod(self.w_sizes[:-2]) <= _TAPS
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
        for tap in np.ndindex(*self.w_sizes[:-2]):
            at = [t * d for t, d in zip(tap, self.w_dilation, strict=True)]
            window = windows.under(x, [0, *at, 0], sizes, [1, *self.strides, 1])
            dims = ((axes, axes), ((), ()))
            acc = accumulator(dy.dtype)
            products.append(lax.dot_general(window, dy, dims, self.precision, acc))
        dw = jnp.stack(products).astype(dy.dtype)
        return dw.reshape(*self.w_sizes[:-2], x.shape[-1], dy.shape[-1])

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
        n, k, y = self.x_sizes[1 + i], self.w_sizes[i], self.y_sizes[1 + i]
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
        return jnp.einsum("gkr,grm->kgm", u, dw, precision=self.precision).reshape(self.w_sizes)

    # --- the layer's own tensors ---

    def gram(self, x: jax.Array, mode: str) -> jax.Array:
        """X_(m) X_(m)^T of one mode: (n, n), or its sketch (n, k + 1) where n is wide (`hosvd`).

        (groups, ...) of a grouped layer's patches.
        """
        x = x.transpose(self.x_axes)
        if mode != "patch":
            return gram(x, self.axis(mode))
        x = x.astype(accumulator(x.dtype))
        n, y = self.modes["patch"], math.prod(self.y_sizes[1:-1])
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
        kernel = self.w_sizes[: len(self.strides)]
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
        *kernel, i, _ = self.w_sizes
        u = u.reshape(self.groups, *kernel, i, u.shape[-1])
        return jnp.moveaxis(u, 0, -2).reshape(*kernel, i, -1)

    def _matrices(self, bases: Mapping[str, jax.Array]) -> dict[int, jax.Array]:
        return {self.axis(m): u for m, u in bases.items() if m != "patch"}

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


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
