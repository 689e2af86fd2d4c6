"""Two CPU devices, strict dtype promotion, and repeatable drawn cases, for every test."""

import os

_TWO_DEVICES = "--xla_force_host_platform_device_count=2"
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_TWO_DEVICES}".strip()

# After the flags: jax reads them when it is imported.
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def exact_products():
    """Products in full precision on accelerators too, for comparisons with the reference."""
    with jax.default_matmul_precision("highest"):
        yield
