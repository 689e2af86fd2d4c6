"""A convolution as a layer: its sizes, its axes in one order, its modes; nothing is computed."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from jax import lax

from lance_jax.modes import Steps

_SPATIAL = ("depth", "height", "width")


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """One convolution y = conv(x, w).

    The rules see x as (batch, spatial..., channel), w as (spatial..., channel / groups,
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
    def of(cls, eqn: Any) -> Self:
        """From a `conv_general_dilated` equation whose kernel is its second operand."""
        x, w, y = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
        return cls.with_params(x, w, y, eqn.params)

    @classmethod
    def with_params(cls, x_shape: Any, w_shape: Any, y_shape: Any, p: Mapping[str, Any]) -> Self:
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
        n, *spatial, c = self.x_sizes
        *kernel, i, _ = self.w_sizes
        modes = {"batch": n, **dict(zip(self.spatial_names, spatial, strict=True))}
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
        return self.groups > 1 and self.w_sizes[-2] == 1

    def basis_shape(self, mode: str) -> tuple[int, ...]:
        """The shape that a basis of this mode has, without its rank."""
        n = self.modes[mode]
        return (self.groups, n) if mode == "patch" and self.groups > 1 else (n,)

    @property
    def macs(self) -> int:
        """MACs of the forward convolution, padding counted; dX costs as many."""
        return math.prod(self.y_shape) * math.prod(self.w_sizes[:-1])

    @property
    def x_sizes(self) -> tuple[int, ...]:
        return tuple(self.x_shape[axis] for axis in self.x_axes)

    @property
    def w_sizes(self) -> tuple[int, ...]:
        return tuple(self.w_shape[axis] for axis in self.w_axes)

    @property
    def y_sizes(self) -> tuple[int, ...]:
        return tuple(self.y_shape[axis] for axis in self.y_axes)

    @property
    def spatial_names(self) -> tuple[str, ...]:
        return _SPATIAL[3 - len(self.strides) :]

    def axis(self, mode: str) -> int:
        """The axis of a mode in (batch, spatial..., channel)."""
        return ("batch", *self.spatial_names, "channel").index(mode)

    def core_shape(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        if "patch" in ranks:
            shape = [*self.y_sizes[:-1], self.groups * ranks["patch"]]
        else:
            shape = list(self.x_sizes)
        for mode, rank in ranks.items():
            if mode != "patch":
                shape[self.axis(mode)] = rank
        return tuple(shape)

    def steps(self, ranks: Mapping[str, int]) -> Steps:
        sizes = self.modes
        return tuple((self.axis(m), sizes[m], r) for m, r in ranks.items())

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
            and all(size == 1 for size in self.w_sizes[: len(self.strides)])
            and all(pad == (0, 0) for pad in self.padding)
            and all(d == 1 for d in self.x_dilation)
        )
