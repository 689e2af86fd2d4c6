"""Two CPU devices, strict dtype promotion, and repeatable drawn cases, for every test."""

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def exact_products():
    """Products in full precision on accelerators too, for comparisons with the reference."""
    with jax.default_matmul_precision("highest"):
        yield
