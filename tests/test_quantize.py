"""How cores are stored: against the float64 reference, over shapes, bits and ways of rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lance_jax.quantize import load, store

SHAPES = [
    (64, 8, 8, 16),
    (7, 5, 3),  # pairs of an odd number of rows
    (33, 2),  # two groups of 17, filled up to 18
    (4, 100),  # too few values a channel
    (1, 1),
    (3,),
    (),
    (0, 4),
    (4, 0),
]
low_bits = pytest.mark.parametrize("bits", reference.STEPS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def core_of(shape, seed=0):
    return np.maximum(np.random.default_rng(seed).normal(size=shape) + 0.5, 0).astype(np.float32)


def back(core, core_dtype):
    return load(store(core, core_dtype), core_dtype, core.shape, core.dtype)


def step_of(core, bits):
    """The greatest step between stored values: of a group of the whole range, in whole units."""
    spread = core.max() - core.min()
    return (spread + 2 * spread / 253.5) / reference.STEPS[bits]


@low_bits
@shapes
def test_is_the_reference_rounded_to_nearest(shape, bits):
    core = core_of(shape)
    stored = jax.jit(store, static_argnums=1)(core, bits)
    arrays = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(stored)]
    loaded = load(stored, bits, shape, jnp.float32)
    assert loaded.shape == shape
    if core.size:
        assert arrays == reference.stored_arrays(shape, bits)
        np.testing.assert_allclose(loaded, reference.stored(core, bits), atol=1e-5)


@low_bits
@shapes
def test_stochastic_rounding_is_off_by_less_than_a_step(shape, bits):
    core = core_of(shape)
    rounded = f"{bits}_stochastic"
    assert jax.tree.map(jnp.shape, store(core, rounded)) == jax.tree.map(
        jnp.shape, store(core, bits)
    )
    if core.size:
        assert np.abs(back(core, rounded) - core).max() <= step_of(core, bits)
    np.testing.assert_array_equal(np.asarray(back(core, rounded))[core == 0], 0)


@low_bits
def test_stochastic_rounding_is_unbiased(bits):
    """Of many cores that differ in their first value alone, the others' mean is right."""
    n = 4096
    core = core_of((64, 3))
    firsts = np.random.default_rng(1).uniform(0, core[:32, 0].max(), n)
    cores = jnp.broadcast_to(core, (n, *core.shape)).at[:, 0, 0].set(firsts)
    means = {}
    for core_dtype in (bits, f"{bits}_stochastic"):
        loaded = jax.vmap(lambda one, d=core_dtype: back(one, d))(cores)
        means[core_dtype] = np.asarray(loaded, np.float64).mean(0)[1:] - core[1:]
    # The standard deviation of one rounding is half a step at most.
    limit = 5 * step_of(core, bits) / 2 / np.sqrt(n)
    assert np.abs(means[f"{bits}_stochastic"]).max() < limit
    assert np.abs(means[bits]).max() > 5 * limit


def test_stochastic_rounding_of_neighbours_is_independent():
    core = jnp.full((512, 1), 0.5).at[::32].set(0.0).at[1::32].set(15.0)
    up = np.asarray(back(core, "int4_stochastic"))[:, 0] > 0.7
    inner = up.reshape(-1, 32)[:, 2:]
    share = inner.mean()
    together = (inner[:, 1:] & inner[:, :-1]).mean()
    assert 0.35 < share < 0.65
    assert abs(together - share**2) < 0.1


def test_the_same_core_is_rounded_the_same_way():
    core = core_of((64, 8))
    once, again, other = (back(c, "int4_stochastic") for c in (core, core.copy(), core + 1e-3))
    np.testing.assert_array_equal(once, again)
    # not only shifted with the values, by 1e-3, but drawn anew
    assert np.abs(other - once).max() > 0.05


@low_bits
@pytest.mark.parametrize("value", [0.0, 3.7, -2.5e-30, 1e30])
def test_values_that_are_all_the_same(value, bits):
    core = jnp.full((40, 3), value)
    for core_dtype in (bits, f"{bits}_stochastic"):
        np.testing.assert_allclose(back(core, core_dtype), core, rtol=1e-6)


@low_bits
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("masked", ["finite", "infinite"])
def test_the_ends_of_a_dtype_stay_finite(bits, dtype, masked):
    """What masks are made of: the least number, or -inf."""
    least = float(jnp.finfo(dtype).min) if masked == "finite" else -np.inf
    core = jnp.where(jnp.arange(64) % 3 == 0, least, 0.0).astype(dtype).reshape(4, 16)
    for rounding in ("", "_stochastic"):
        loaded = back(core, f"{bits}{rounding}")
        assert jnp.isfinite(loaded).all()
        np.testing.assert_array_equal(loaded == 0, core == 0)
        assert float(loaded.max()) == 0 and float(loaded.min()) < -6e4


@pytest.mark.parametrize(("core_dtype", "most"), [("int8", 8.75), ("int4", 4.75)])
def test_bits_a_value(core_dtype, most):
    """Of cores of some thousand values, with all that says what they mean."""
    for shape in ((64, 8, 8, 16), (4, 65, 128), (1, 28, 28, 64), (64, 512)):
        stored = jax.eval_shape(lambda x: store(x, core_dtype), jnp.zeros(shape))
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
        assert 8 * nbytes / np.prod(shape) <= most
