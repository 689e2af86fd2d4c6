"""The one table of layers that the tests of the package cross with every property."""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from reference import Conv, Dense

PATH = "layer/kernel"


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A layer y = function(x, w) + b, its reference, and the dtype of all its tensors."""

    name: str
    op: Any  # Conv | Dense
    function: Callable
    dtype: str = "float32"

    def __repr__(self) -> str:
        return self.name

    @property
    def generator(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return self.function(x, params["layer"]["kernel"]) + params["layer"]["bias"]

    def context(self) -> contextlib.AbstractContextManager:
        """What the case's dtype needs."""
        return jax.enable_x64(True) if self.dtype == "float64" else contextlib.nullcontext()

    @functools.cached_property
    def tensors(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """(params, x, dy), rounded to the dtype."""
        generator = self.generator
        x = inputs(generator, self.op.x_shape)
        w = generator.normal(size=self.op.w_shape)
        y_shape = self.op.forward(x, w).shape
        bias = generator.normal(size=self.bias_shape(y_shape))
        dy = generator.normal(size=y_shape)
        round_to = jnp.dtype(self.dtype)
        params = {"layer": {"kernel": w.astype(round_to), "bias": bias.astype(round_to)}}
        return params, x.astype(round_to), dy.astype(round_to)

    def bias_shape(self, y_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One bias for each output channel, with ones for the axes it is broadcast along."""
        if isinstance(self.op, Conv):
            own = [letter == "C" for letter in self.op.layout[2]]
        else:
            own = [letter not in self.op.letters[0] for letter in self.op.letters[2]]
        return tuple(n if keep else 1 for n, keep in zip(y_shape, own, strict=True))


def inputs(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values whose modes have falling spectra, as the inputs of a trained layer have."""
    x = generator.normal(size=shape)
    for axis, n in enumerate(shape):
        basis = orthonormal(generator, n, n) * 0.8 ** np.arange(n)
        x = np.moveaxis(np.tensordot(basis, x, (1, axis)), 0, axis)
    return x / np.abs(x).max()


def orthonormal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """(..., n, r) with random orthonormal columns."""
    return np.linalg.qr(generator.normal(size=shape))[0]


def columns(shape: tuple[int, ...]) -> np.ndarray:
    """Leading columns of the identity, of any shape (..., n, r)."""
    return np.broadcast_to(np.eye(*shape[-2:]), shape)


def bases(op: Any, modes: tuple[str, ...], generator, share: float = 0.5) -> dict:
    """A random basis of `share` of the full rank for each mode."""
    drawn = {}
    for mode in modes:
        n = op.modes[mode]
        shape = (n, max(1, math.ceil(share * n)))
        if mode == "patch" and op.groups > 1:
            shape = (op.groups, *shape)
        drawn[mode] = orthonormal(generator, *shape)
    return drawn


def conv(name: str, x: tuple, w: tuple, dtype: str = "float32", **options: Any) -> Case:
    count = len(x) - 2
    options = {"strides": (1,) * count, "dilation": (1,) * count, **options}
    op = Conv(x, w, **options)

    def function(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            op.strides,
            op.padding,
            lhs_dilation=op.x_dilation[:count],
            rhs_dilation=op.dilation,
            dimension_numbers=op.layout,
            feature_group_count=op.groups,
        )

    return Case(name, op, function, dtype)


def dense(name: str, spec: str, x: tuple, w: tuple, function=None, dtype="float32") -> Case:
    op = Dense(spec, x, w)
    return Case(name, op, function or functools.partial(jnp.einsum, spec), dtype)


_NCHW = ("NCHW", "OIHW", "NCHW")
_NWC = ("NWC", "WIO", "NWC")
_NCW = ("NCW", "OIW", "NCW")
_NDHWC = ("NDHWC", "DHWIO", "NDHWC")

CONV = [
    conv("k3 same", (3, 6, 5, 4), (3, 3, 4, 5), padding="SAME"),
    conv("k3 stride 2 same, uneven", (3, 7, 6, 4), (3, 3, 4, 5), strides=(2, 2), padding="SAME"),
    conv("k3 valid, bfloat16", (3, 6, 5, 4), (3, 3, 4, 5), "bfloat16"),
    conv("k3 stride 2, float64", (3, 7, 6, 4), (3, 3, 4, 5), "float64", strides=(2, 2)),
    conv("k1", (3, 5, 4, 6), (1, 1, 6, 5)),
    conv("k1 stride 2", (3, 6, 5, 6), (1, 1, 6, 5), strides=(2, 2)),
    conv("k1 padded", (3, 5, 4, 6), (1, 1, 6, 5), padding=[(1, 0), (2, 1)]),
    conv(
        "k2x3 dilated, explicit padding",
        (3, 7, 6, 4),
        (2, 3, 4, 5),
        strides=(1, 2),
        padding=[(2, 1), (0, 3)],
        dilation=(3, 2),
    ),
    conv("stride beyond kernel", (3, 8, 7, 4), (2, 1, 4, 5), strides=(3, 2)),
    conv("cropping padding", (3, 7, 8, 4), (3, 2, 4, 5), padding=[(-1, 2), (1, -2)]),
    conv("kernel beyond input", (3, 2, 3, 4), (3, 5, 4, 5), padding="SAME"),
    conv("two groups", (3, 6, 5, 6), (3, 2, 3, 4), padding="SAME", groups=2),
    conv("three groups, float64", (2, 5, 6, 6), (2, 3, 2, 9), "float64", groups=3),
    conv("depthwise", (3, 6, 5, 4), (3, 3, 1, 4), padding="SAME", groups=4),
    conv("depthwise doubled, stride 2", (3, 7, 6, 4), (3, 3, 1, 8), strides=(2, 2), groups=4),
    conv(
        "NCHW stride 2",
        (3, 4, 7, 6),
        (5, 4, 3, 2),
        layout=_NCHW,
        strides=(2, 1),
        padding=[(1, 1), (0, 1)],
    ),
    conv("NCHW groups", (3, 6, 5, 6), (4, 3, 2, 3), layout=_NCHW, padding="SAME", groups=2),
    conv("CWNH, OHWI, HNCW", (4, 5, 3, 6), (5, 3, 2, 4), layout=("CWNH", "OHWI", "HNCW")),
    conv("NWC causal", (4, 8, 5), (3, 5, 4), layout=_NWC, padding=[(4, 0)], dilation=(2,)),
    conv("NCW depthwise", (4, 5, 8), (5, 1, 3), layout=_NCW, strides=(2,), groups=5),
    conv("NDHWC", (2, 4, 5, 6, 3), (2, 3, 2, 3, 4), layout=_NDHWC, strides=(1, 2, 1)),
    conv("NDHWC groups", (2, 3, 4, 5, 4), (2, 2, 3, 2, 6), layout=_NDHWC, padding="SAME", groups=2),
    conv("transposed", (3, 4, 3, 4), (3, 3, 4, 5), padding=[(1, 2), (2, 1)], x_dilation=(2, 3)),
]


def _dot(contract: tuple, shared: tuple = ((), ()), swap: bool = False) -> Callable:
    """dot_general with these dimension numbers, the weight first if `swap`."""

    def function(x, w):
        return lax.dot_general(*((w, x) if swap else (x, w)), (contract, shared))

    return function


DENSE = [
    dense("x @ w", "bf,fo->bo", (5, 6), (6, 4), jnp.matmul),
    dense("tokens @ w", "btf,fo->bto", (3, 4, 6), (6, 5), jnp.matmul),
    dense("tokens @ w, bfloat16", "btf,fo->bto", (3, 4, 6), (6, 5), jnp.matmul, "bfloat16"),
    dense("tokens @ w, float64", "btf,fo->bto", (3, 4, 6), (6, 5), jnp.matmul, "float64"),
    dense("picture @ w", "bhwf,fo->bhwo", (2, 3, 4, 6), (6, 5), jnp.matmul),
    dense("w @ x", "fb,of->ob", (6, 5), (4, 6), lambda x, w: w @ x),
    dense("x @ w.T", "btf,of->bto", (3, 4, 6), (5, 6), lambda x, w: x @ w.T),
    dense("queries", "btd,dhk->bthk", (3, 5, 6), (6, 2, 4)),
    dense("attention output", "bthd,hdm->btm", (3, 5, 2, 4), (2, 4, 6)),
    dense(
        "attention output, weight first, float64",
        "bthd,hdm->btm",
        (3, 5, 2, 4),
        (2, 4, 6),
        lambda x, w: jnp.einsum("hdm,bthd->btm", w, x),
        "float64",
    ),
    dense("axes out of order", "hbdt,dmh->bmt", (2, 3, 4, 5), (4, 6, 2)),
    dense(
        "contraction in the weight's order",
        "bthd,dmh->btm",
        (3, 5, 2, 4),
        (4, 6, 2),
        _dot(((3, 2), (0, 2))),
    ),
    dense("weight first", "btf,of->obt", (3, 4, 6), (5, 6), _dot(((1,), (2,)), swap=True)),
    dense("experts", "ebd,edf->ebf", (2, 5, 6), (2, 6, 4)),
    dense(
        "experts, weight first",
        "bted,edf->efbt",
        (3, 4, 2, 6),
        (2, 6, 5),
        _dot(((1,), (3,)), ((0,), (2,)), swap=True),
    ),
]

TABLE = CONV + DENSE
