"""Convolutions in their CPU forms, against the naive float64 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lance_jax import lower_for_cpu
from tests.reference import Conv
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("exact_products")

NCHW, MIXED = ("NCHW", "OIHW", "NCHW"), ("HWNC", "IOHW", "CNWH")
CASES = {
    # depthwise
    "3x3": Conv((2, 9, 8, 4), (3, 3, 1, 4), padding="SAME", groups=4),
    "stride 2": Conv((2, 9, 8, 4), (3, 3, 1, 4), strides=(2, 2), padding="SAME", groups=4),
    "5x5, MCU padding": Conv(
        (2, 8, 8, 4), (5, 5, 1, 4), strides=(2, 2), padding=((2, 2), (2, 2)), groups=4
    ),
    "7x7 larger than its input": Conv((2, 4, 4, 6), (7, 7, 1, 6), padding="SAME", groups=6),
    "uneven": Conv((2, 9, 7, 4), (3, 2, 1, 4), strides=(1, 3), padding=((0, 2), (1, 0)), groups=4),
    "dilated": Conv((2, 11, 9, 4), (3, 2, 1, 4), dilation=(2, 3), padding="SAME", groups=4),
    "input dilated": Conv(
        (2, 5, 6, 4), (3, 3, 1, 4), strides=(2, 1), padding=((1, 1), (2, 0)), groups=4,
        x_dilation=(2, 3),
    ),
    "cropped": Conv((2, 9, 8, 4), (3, 3, 1, 4), padding=((-1, 2), (0, -2)), groups=4),
    "multiplier": Conv((2, 6, 8, 4), (3, 3, 1, 12), strides=(2, 1), padding="SAME", groups=4),
    "NCHW": Conv((2, 4, 9, 8), (4, 1, 3, 3), NCHW, padding="SAME", groups=4),
    "mixed layouts": Conv((9, 8, 2, 4), (1, 4, 3, 2), MIXED, strides=(2, 1), groups=4),
    "one axis": Conv((2, 9, 4), (3, 1, 4), ("NWC", "WIO", "NWC"), (2,), "SAME", (1,), 4),
    "three axes": Conv(
        (2, 4, 5, 6, 3), (2, 3, 1, 1, 3), ("NDHWC", "DHWIO", "NDHWC"), (1, 2, 1), "SAME",
        (1, 1, 1), 3,
    ),
    "13 rows": Conv((1, 13, 3, 2), (3, 3, 1, 2), padding="SAME", groups=2),
    # 1x1
    "1x1": Conv((2, 5, 6, 4), (1, 1, 4, 7)),
    "1x1, stride 2": Conv((2, 5, 6, 4), (1, 1, 4, 7), strides=(2, 3)),
    "1x1, NCHW": Conv((2, 4, 5, 6), (7, 4, 1, 1), NCHW, strides=(2, 1)),
    # few inputs
    "stem": Conv((2, 9, 8, 3), (3, 3, 3, 8), strides=(2, 2), padding=((1, 1), (1, 1))),
    "stem, NCHW": Conv((2, 3, 9, 8), (8, 3, 3, 3), NCHW, strides=(2, 2), padding="SAME"),
    "narrow": Conv((2, 5, 6, 2), (2, 2, 2, 4), padding="SAME"),
    "grey stem": Conv((2, 8, 8, 1), (5, 5, 1, 6), dilation=(1, 2), padding="SAME"),
    "1x1, padded": Conv((2, 5, 6, 4), (1, 1, 4, 7), padding=((1, 0), (0, 2))),
    # dense
    "dense 3x3": Conv((2, 6, 7, 8), (3, 3, 8, 5), padding="SAME"),
    "dense, stride 2": Conv((2, 9, 8, 6), (3, 3, 6, 5), strides=(2, 2), padding=((1, 1), (1, 1))),
    "dense, uneven": Conv((2, 9, 7, 9), (3, 2, 9, 4), strides=(1, 3), padding=((0, 2), (1, 0))),
    "dense, dilated": Conv((2, 11, 9, 9), (3, 2, 9, 4), dilation=(2, 3), padding="SAME"),
    "dense, input dilated": Conv(
        (2, 5, 6, 9), (3, 3, 9, 4), strides=(2, 1), padding=((1, 1), (2, 0)), x_dilation=(2, 3)
    ),
    "dense, cropped": Conv((2, 9, 8, 9), (3, 3, 9, 4), padding=((-1, 2), (0, -2))),
    "dense, much padding": Conv((2, 3, 3, 9), (3, 3, 9, 4), padding=((4, 3), (3, 4))),
    "dense, NCHW": Conv((2, 9, 9, 8), (4, 9, 3, 3), NCHW, strides=(2, 1), padding="SAME"),
    "dense, mixed layouts": Conv((9, 8, 2, 9), (9, 4, 3, 2), MIXED, strides=(2, 1)),
    "dense, three axes": Conv(
        (2, 4, 5, 6, 9), (2, 3, 1, 9, 3), ("NDHWC", "DHWIO", "NDHWC"), (1, 2, 1), "SAME", (1, 1, 1)
    ),
    "7x7 stem": Conv((2, 9, 9, 3), (7, 7, 3, 4), strides=(2, 2), padding=((3, 3), (3, 3))),
}  # fmt: skip


def xla(conv):
    def apply(w, x):
        spatial = len(conv.strides)
        return lax.conv_general_dilated(
            x, w, conv.strides, conv.padding, conv.x_dilation[:spatial], conv.dilation,
            conv.layout, conv.groups,
        )  # fmt: skip

    return apply


def lowered(conv, w, x):
    apply = lower_for_cpu(xla(conv))
    assert "cpu_conv" in str(jax.make_jaxpr(apply)(w, x))
    return apply


def operands(conv, dtype="float32"):
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape) for shape in (conv.w_shape, conv.x_shape))
    return jnp.asarray(w, dtype), jnp.asarray(x, dtype)


SOME = ("stride 2", "multiplier", "1x1, stride 2", "narrow", "dense, stride 2")
IN_DTYPES = [(name, "float32") for name in CASES]
IN_DTYPES += [(name, dtype) for name in SOME for dtype in ("bfloat16", "float64")]


@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_forward_and_both_gradients(name, dtype):
    conv = CASES[name]
    with jax.enable_x64(dtype == "float64"):
        w, x = operands(conv, dtype)
        apply = lowered(conv, w, x)
        shape = jax.eval_shape(apply, w, x).shape
        dy = jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)

        @jax.jit
        def run(w, x, dy):
            y, vjp = jax.vjp(apply, w, x)
            return y, *vjp(dy)

        y, dw, dx = run(w, x, dy)
        assert y.dtype == dw.dtype == dx.dtype == dtype
        w64, x64, dy64 = (np.asarray(a, np.float64) for a in (w, x, dy))
        assert_close(y, conv.forward(x64, w64), dtype)
        assert_close(dw, conv.dweight(x64, dy64), dtype)
        assert_close(dx, conv.dinput(w64, dy64), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", [*SOME, "dense 3x3", "1x1"])
def test_wider_outputs(name, dtype):
    """As `preferred_element_type` asks for: dy is wider than x and w."""
    conv = CASES[name]
    w, x = operands(conv, dtype)

    def gradients(lower):
        def apply(w, x):
            y = lax.conv_general_dilated(
                x, w, conv.strides, conv.padding, rhs_dilation=conv.dilation,
                dimension_numbers=conv.layout, feature_group_count=conv.groups,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            return jnp.sin(y).sum()

        return jax.jit(jax.grad(lower(apply), (0, 1)))(w, x)

    for found, expected in zip(gradients(lower_for_cpu), gradients(lambda f: f), strict=True):
        assert found.dtype == dtype
        assert_close(found, np.asarray(expected, np.float64), "bfloat16")


def test_long_kernels_are_left_to_xla():
    """Their unrolled sums would take minutes to compile."""
    conv = Conv((1, 13, 13, 2), (11, 11, 1, 2), padding="SAME", groups=2)
    w, x = operands(conv)
    assert "cpu_conv" not in str(jax.make_jaxpr(lower_for_cpu(xla(conv)))(w, x))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_vmap(name, axes):
    conv = CASES[name]
    w, x = operands(conv)
    stacked = [
        a if axis is None else jnp.stack([a, 2 * a, -a], axis)
        for a, axis in zip((w, x), axes, strict=True)
    ]
    apply = lowered(conv, w, x)
    found = jax.jit(jax.vmap(jax.value_and_grad(lambda w, x: jnp.sin(apply(w, x)).sum()), axes))
    expected = jax.vmap(jax.value_and_grad(lambda w, x: jnp.sin(xla(conv)(w, x)).sum()), axes)
    for a, b in zip(found(*stacked), expected(*stacked), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["stride 2", "1x1", "dense, stride 2"])
def test_forward_mode_and_second_derivatives(name):
    conv = CASES[name]
    w, x = operands(conv)
    apply = lowered(conv, w, x)
    tangents = w * 2, jnp.cos(x)

    def derivatives(apply):
        def gradient_squared(w):
            return (jax.grad(lambda x: jnp.sin(apply(w, x)).sum())(x) ** 2).sum()

        return jax.jvp(apply, (w, x), tangents), jax.grad(gradient_squared)(w)

    found, expected = (jax.jit(lambda f=f: derivatives(f))() for f in (apply, xla(conv)))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(a, b)


OTHERS = {
    "grouped": Conv((2, 6, 6, 8), (3, 3, 4, 8), groups=2),
    "8x8 patches": Conv((2, 16, 16, 3), (8, 8, 3, 4), strides=(8, 8)),
    "without an output": Conv((2, 2, 2, 4), (3, 3, 1, 4), groups=4),
}


@pytest.mark.parametrize("conv", OTHERS.values(), ids=OTHERS)
def test_others_are_left_alone(conv):
    w, x = operands(conv)
    traced = str(jax.make_jaxpr(lower_for_cpu(xla(conv)))(w, x))
    assert "conv_general_dilated" in traced and "cpu_conv" not in traced


def test_integers_are_left_alone():
    apply = xla(CASES["3x3"])
    w, x = jnp.ones((3, 3, 1, 4), jnp.int32), jnp.ones((2, 9, 8, 4), jnp.int32)
    np.testing.assert_array_equal(lower_for_cpu(apply)(w, x), apply(w, x))
