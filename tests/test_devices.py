"""One batch over several devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lance_jax import devices
from tests.helpers import two_devices

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("size", "count"), [(6, 2), (5, 1), (1, 1)])
def test_a_mesh_divides_the_batch(size, count):
    two_devices()
    mesh = devices.mesh_for(size)
    assert mesh.size == count
    batch = np.arange(2.0 * size, dtype=np.float32).reshape(size, 2)
    found = devices.spread(batch, mesh)
    np.testing.assert_array_equal(found, batch)
    assert [len(shard.data) for shard in found.addressable_shards] == [size // count] * count


def test_a_spread_batch_goes_through_a_network_of_replicated_parameters():
    two_devices()
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (8, 3)))
    mesh = devices.mesh_for(len(x))
    params = devices.replicate({"w": w}, mesh)
    forward = jax.jit(lambda params, x: x @ params["w"])
    y = forward(params, devices.spread(x, mesh))
    assert [len(shard.data) for shard in y.addressable_shards] == [4, 4]
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-6)


def test_every_core_is_a_device():
    lines = ["import jax", "from lance_jax.devices import use_cores", "use_cores()"]
    code = "; ".join([*lines, "print(jax.device_count())"])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert int(found.stdout) == os.cpu_count()
