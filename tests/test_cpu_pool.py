"""Max-pooling that keeps places, against XLA's own and a naive count."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax import lax

import lance_jax
from lance_jax import lower_for_cpu
from tests.tolerances import assert_close

CASES = {
    # window, strides, padding, dilation
    "2x2": ((1, 2, 2, 1), (1, 2, 2, 1), "VALID", None),
    "3x3, overlapping": ((1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)), None),
    "with gaps": ((1, 2, 1, 1), (1, 3, 2, 1), "VALID", None),
    "uneven padding": ((1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (2, 0), (0, 1), (0, 0)), None),
    "over batch and channel": ((2, 1, 1, 2), (1, 1, 1, 2), "VALID", None),
    "whole picture": ((1, 9, 8, 1), (1, 1, 1, 1), "VALID", None),
    "few outputs": ((1, 5, 4, 1), (1, 6, 5, 1), ((0, 0), (3, 1), (0, 2), (0, 0)), None),
    "few, overlapping": ((1, 7, 7, 1), (1, 5, 5, 1), ((0, 0), (3, 3), (3, 3), (0, 0)), None),
}


def pooled(case):
    window, strides, padding, dilation = case

    def apply(scale, x):
        low = np.array(-np.inf, x.dtype)
        y = lax.reduce_window(
            x * scale, low, lax.max, window, strides, padding, window_dilation=dilation
        )
        return jnp.sin(y)  # so that the cotangents differ

    return apply


def inputs(dtype="float32", ties=False):
    x = np.random.default_rng(0).standard_normal((2, 9, 8, 4))
    return jnp.ones((), dtype), jnp.asarray(np.round(x) if ties else x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradient(case, ties, dtype):
    """Those of XLA, whose gradient goes to the first of equal maxima."""
    args, apply = inputs(dtype, ties), pooled(case)

    def with_gradient(apply):
        @jax.jit
        def run(*args):
            y, vjp = jax.vjp(apply, *args)
            return y, vjp(y)

        return run(*args)

    y, gradients = with_gradient(lower_for_cpu(apply))
    expected, expected_gradients = with_gradient(apply)
    np.testing.assert_array_equal(y, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert_close(a, np.asarray(b, np.float64), dtype)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 3, 2, 1), (1, 1, 2, 1), "SAME", (1, 2, 3, 1)),
        ((1, 4, 4, 1), (1, 9, 9, 1), ((0, 0), (-2, 1), (1, -1), (0, 0)), (1, 2, 1, 1)),
    ],
    ids=["dilated", "few, dilated and cropped"],
)
def test_windows_for_which_xla_has_no_gradient(case):
    scale, x = inputs()
    apply = pooled(case)
    lowered = jax.jit(lower_for_cpu(apply))
    np.testing.assert_array_equal(lowered(scale, x), apply(scale, x))
    apart = jnp.asarray(np.random.default_rng(0).permutation(x.size).reshape(x.shape) / 20, "f4")
    jax.test_util.check_grads(
        lambda x: lowered(scale, x), (apart,), 1, ["rev"], eps=1e-3, rtol=1e-2
    )


@pytest.mark.parametrize("name", ["2x2", "3x3, overlapping"])
def test_one_byte_an_output_is_kept(name):
    scale, x = inputs()
    apply = pooled(CASES[name])
    step = lance_jax.value_and_grad(lambda x, scale: lower_for_cpu(apply)(scale, x).sum())
    saved = step.forward(x, scale)[1]
    shape = apply(scale, x).shape
    kept = sorted((leaf.dtype.name, leaf.shape) for leaf in saved)
    assert kept == [("float32", shape), ("uint8", shape)], "the places, and the sine's"


def test_vmap_and_nan():
    scale, x = inputs()
    apply = pooled(CASES["3x3, overlapping"])
    x = x.at[0, 3, 3, 0].set(jnp.nan)
    xs = jnp.stack([x, -x])
    found = jax.vmap(lower_for_cpu(apply), (None, 0))(scale, xs)
    np.testing.assert_array_equal(found, jax.vmap(apply, (None, 0))(scale, xs))


def test_what_does_not_fit_is_left_alone():
    whole = ((1, 20, 20, 1), (1, 1, 1, 1), "SAME", None)
    scale, x = inputs()
    empty = ((1, 12, 4, 1), (1, 2, 2, 1), "VALID", None)
    for apply in (pooled(whole), pooled(empty), lambda _, x: lax.cummax(x)):
        np.testing.assert_array_equal(lower_for_cpu(apply)(scale, x), apply(scale, x))
