"""Two CPU devices, strict dtype promotion, quick compiling and repeatable drawn cases."""

import atexit
import os
import shutil
import tempfile

import hypothesis
import jax
import pytest

# Most of the time goes into compiling small programs: each is compiled quickly, and once for all
# processes of a run, kept in a folder of its own. By the environment, so that it holds for the
# processes that tests start too; what is set there already stays.
QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
FOLDER = "JAX_COMPILATION_CACHE_DIR"
LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
os.environ.setdefault(QUICK, "1")
if FOLDER not in os.environ:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="lance_jax-programs-")
    atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
os.environ.setdefault(LEAST_SECONDS, "0")
if os.environ[QUICK] == "1":
    # XLA's newer way to write fused loops takes a third of all the time of the tests to compile
    emitters = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {emitters}".strip()
jax.config.update(QUICK.lower(), os.environ[QUICK] == "1")
jax.config.update(FOLDER.lower(), os.environ[FOLDER])
jax.config.update(LEAST_SECONDS.lower(), float(os.environ[LEAST_SECONDS]))
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def exact_products():
    """Products in full precision on accelerators too, for comparisons with the reference."""
    with jax.default_matmul_precision("highest"):
        yield
