"""Checkpoints come back equal, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lance_jax.checkpoint import Checkpoint, Checkpoints
from lance_jax.factors import Factors, LayerFactors, Skipped


def state(scale=1.0):
    params = {"a": {"kernel": scale * jnp.arange(12.0).reshape(3, 4), "bias": None}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(2.0), optax.sgd(lambda count: 0.1, momentum=0.9)
    )
    return {
        "params": params,
        "half": jnp.full((2,), 1 / 3, jnp.bfloat16),
        "optimizer": optimizer.init(params),
        "key": jax.random.key_data(jax.random.key(3)),
    }


def basis(*shape):
    return jnp.linalg.qr(jax.random.normal(jax.random.key(0), shape))[0]


FACTORS = {
    "none": Factors(),
    "modes": Factors(
        {
            "blocks_0/conv1/kernel": LayerFactors(
                {"width": basis(4, 1), "channel": basis(3, 2)}, core_dtype="int4"
            ),
            "scanned/kernel": LayerFactors({"feature": basis(2, 5, 3)}, mean=basis(2, 7, 5)),
        },
        skipped=(Skipped("other/kernel", "no basis"),),
    ),
    "whole inputs": Factors({"kernel": LayerFactors({}, core_dtype="int8")}),
    "confined": Factors(
        {
            "a/kernel": LayerFactors({}, core_dtype="int4", update=basis(9, 2)),
            "b/kernel": LayerFactors({}, update=basis(2, 5, 3), update_core=True),
            "c/kernel": LayerFactors({}, frozen=True),
        }
    ),
}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_everything_comes_back(tmp_path, factors):
    info = {"position": [3, 1], "seconds": 0.1 + 0.2}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest(state()) is None
        checkpoints.save(Checkpoint(7, state(), factors, info))
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.latest(state(scale=0.0))
    assert found is not None
    assert found.step == 7 and found.info == info
    assert_same(found.state, state())
    assert_same(found.factors, factors)
    assert list(found.factors) == list(factors) and found.factors.skipped == factors.skipped
    for path, layer in factors.items():
        assert found.factors[path].core_dtype == layer.core_dtype
        assert list(found.factors[path].bases) == list(layer.bases)


def test_memory_comes_back_in_its_own_shapes(tmp_path):
    memory = {
        "method": {"a/kernel": {"bases": {"0": np.ones((9, 2), np.float32)}, "none": {}}},
        "pictures": np.arange(6, dtype=np.uint8).reshape(2, 3),
    }
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Checkpoint(1, state(), Factors(), {}, memory))
        found = checkpoints.latest(state())
    assert found is not None
    assert jax.tree.structure(found.memory) == jax.tree.structure(memory)
    for a, b in zip(jax.tree.leaves(found.memory), jax.tree.leaves(memory), strict=True):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_newest_counts_and_two_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(4):
            checkpoints.save(Checkpoint(step, state(step), Factors(), {}))
        found = checkpoints.latest(state())
    assert found is not None and found.step == 3
    assert_same(found.state, state(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_half_a_checkpoint_is_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Checkpoint(1, state(), Factors(), {}))
    half = tmp_path / "2.orbax-checkpoint-tmp" / "arrays"
    half.mkdir(parents=True)
    (half / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.latest(state())
        assert found is not None and found.step == 1
        checkpoints.save(Checkpoint(2, state(2.0), Factors(), {}))
        found = checkpoints.latest(state())
    assert found is not None and found.step == 2
    assert_same(found.state, state(2.0))


def test_a_damaged_checkpoint_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Checkpoint(1, state(), Factors(), {}))
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="1' cannot be read"):
        checkpoints.latest(state())


def test_other_shapes_are_an_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(Checkpoint(1, {"w": jnp.zeros((3, 4))}, Factors(), {}))
        with pytest.raises(ValueError, match=r"w has shape \(3, 4\), not \(3, 5\)"):
            checkpoints.latest({"w": jnp.zeros((3, 5))})
