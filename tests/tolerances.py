"""How close two results must be, by dtype and by the precision of the backend's products."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def tolerance(dtype: Any) -> float:
    """Error allowed in sums of a few hundred products, relative to the largest magnitude."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:  # rounds every operand and intermediate, but sums in float32
        return 4 * float(jnp.finfo(dtype).eps)
    if dtype == jnp.float32 and jax.default_backend() != "cpu":
        products = jax.config.values["jax_default_matmul_precision"]
        if products not in ("highest", "float32"):
            return 4 * float(jnp.finfo(jnp.bfloat16).eps)
    return 64 * float(jnp.finfo(dtype).eps)


def assert_close(actual, expected, dtype: Any = "float32", scale=None, what: object = "") -> None:
    """`actual` equals `expected`, float64, to the tolerance of `dtype`.

    The error is measured against the largest magnitude of `expected`, or against `scale` where
    the expected value is itself a small difference.
    """
    actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    actual = actual.astype(np.float64)
    scale = np.abs(expected).max() if scale is None else scale
    error = np.abs(actual - expected).max()
    assert error <= tolerance(dtype) * scale, f"{what}: error {error:.3g} of {scale:.3g}"
