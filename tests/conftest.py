"""Two CPU devices, strict dtype promotion, quick compiling and repeatable drawn cases."""

import os

import hypothesis
import jax
import pytest

# Most of the time goes into compiling small programs. By the environment, so that it holds for the
# processes that tests start too, and can be set to 0.
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
os.environ.setdefault(QUICK, "1")
jax.config.update(QUICK.lower(), os.environ[QUICK] == "1")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def exact_products():
    """Products in full precision on accelerators too, for comparisons with the reference."""
    with jax.default_matmul_precision("highest"):
        yield
