"""One batch over several devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lance_jax import devices, value_and_grad
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


@pytest.mark.parametrize(("sizes", "count"), [((32,), 4), ((12, 32), 4), ((30,), 6), ((7,), 1)])
def test_six_devices(monkeypatch, sizes, count):
    """Four of them take a quarter of 32 each, not two a half."""
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    monkeypatch.setattr(jax, "make_mesh", lambda shape, *_, **__: shape)
    assert devices.mesh_for(*sizes) == (count,)


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


@pytest.mark.parametrize("micro_batch", [None, 3, 4])
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_divided_step_is_that_of_the_whole_batch(micro_batch, has_aux):
    two_devices()
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 4)), "fixed": rng.normal(size=4)}
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 4))

    def loss(params, x, y):
        error = jnp.tanh(x @ params["w"]) * params["fixed"] - y
        mean = (error**2).mean()
        return (mean, {"mean": error.mean(0)}) if has_aux else mean

    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, (params, x, y))
        expected = value_and_grad(loss, trainable="w", has_aux=has_aux)(*args)
        mesh = devices.mesh_for(8)
        step = value_and_grad(loss, trainable="w", has_aux=has_aux, micro_batch=micro_batch)
        spread = devices.replicate(args[0], mesh), *devices.spread(args[1:], mesh)
        found = devices.divided(step, mesh)(*spread)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.sharding.is_fully_replicated and len(a.devices()) == 2
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds to no cores")
@pytest.mark.parametrize("bound", [False, True])
def test_every_core_that_may_be_used_is_a_device(bound):
    allowed = os.sched_getaffinity(0)
    cores = {min(allowed)} if bound else allowed
    lines = ["import jax", "from lance_jax.devices import use_cores", "use_cores()"]
    lines = ["import os", f"os.sched_setaffinity(0, {cores})", *lines]
    code = "; ".join([*lines, "print(jax.device_count())"])
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert int(found.stdout) == len(cores)
