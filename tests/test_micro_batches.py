"""Gradients summed over micro-batches are those of the whole batch."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lance_jax
from lance_jax import value_and_grad
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("exact_products")

RNG = np.random.default_rng(0)
PARAMS = {
    "conv": jnp.asarray(RNG.standard_normal((3, 3, 2, 4)), jnp.float32),
    "dense": {"w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)},
    "steps": jnp.arange(3),
}
X = jnp.asarray(RNG.standard_normal((10, 6, 5, 2)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 10))


def apply(params, x):
    x = jax.lax.conv_general_dilated(
        x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x).mean((1, 2)) @ params["dense"]["w"]


def loss(params, x, y, apply_fn=apply):
    logits = jax.nn.log_softmax(apply_fn(params, x))
    return -jnp.take_along_axis(logits, y[:, None], 1).mean()


def with_aux(params, x, y, *, scale=1.0):
    logits = apply(params, x) * scale
    return loss(params, x, y), {"mean": logits.mean(0), "scale": scale}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b)


SIZES = [1, 2, 3, 5, 7, 9, 10, 64]


@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients(size):
    expected = value_and_grad(loss)(PARAMS, X, Y)
    assert_same(value_and_grad(loss, micro_batch=size)(PARAMS, X, Y), expected)


@pytest.mark.parametrize("size", [3, 5, 10])
def test_auxiliary_outputs_are_averaged(size):
    options = {"has_aux": True, "trainable": "dense"}
    scale = jnp.float32(2)
    expected = value_and_grad(with_aux, **options)(PARAMS, X, Y, scale=scale)
    found = value_and_grad(with_aux, **options, micro_batch=size)(PARAMS, X, Y, scale=scale)
    assert_same(found, expected)
    assert found[1]["conv"] is None


def test_two_phases_keep_the_gradients_alone():
    step = value_and_grad(loss, micro_batch=3)
    value, saved = step.forward(PARAMS, X, Y)
    assert sorted(leaf.shape for leaf in saved) == [(3, 3, 2, 4), (4, 3)]
    assert_same((value, step.backward(saved, PARAMS, X, Y)), step(PARAMS, X, Y))
    with pytest.raises(ValueError, match="saved does not belong"):
        step.backward(saved[:1], PARAMS, X, Y)


@pytest.mark.parametrize("size", [2, 4])
def test_compressed_and_lowered(size):
    """A core is projected sample by sample, so that it too can be divided."""
    factors = lance_jax.calibrate(apply, PARAMS, [X], energy=0.8)
    fast = lance_jax.lower_for_cpu(lance_jax.compress(apply, factors))

    def compressed(params, x, y):
        return loss(params, x, y, fast)

    expected = value_and_grad(compressed)(PARAMS, X, Y)
    assert_same(value_and_grad(compressed, micro_batch=size)(PARAMS, X, Y), expected)
    plain = value_and_grad(loss)(PARAMS, X, Y)[1]["conv"]
    assert np.abs(expected[1]["conv"] - plain).max() > 1e-4, "the factors do cut something"


def test_no_parameter_is_held_after_a_step():
    step = value_and_grad(loss, micro_batch=4)
    params = jax.tree.map(jnp.copy, PARAMS)
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    step(params, X, Y)
    del params
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_under_jit_and_with_what_is_closed_over():
    shift = jnp.asarray(RNG.standard_normal(3), jnp.float32)

    def shifted(params, x, y):
        return loss(params, x, y, lambda p, x: apply(p, x) + shift)

    step = value_and_grad(shifted, micro_batch=4)
    expected = value_and_grad(shifted)(PARAMS, X, Y)
    assert_same(step(PARAMS, X, Y), expected)
    assert_same(jax.jit(step)(PARAMS, X, Y), expected)
    traced = jax.make_jaxpr(jax.jit(lambda x: step(PARAMS, x, Y)[0]))(X)
    assert "scan" in str(traced)


def test_sums_are_in_float32():
    """A thousand bfloat16 gradients of 1 add up to a thousand, not to 256."""
    params = {"w": jnp.zeros((), jnp.bfloat16)}
    x = jnp.ones((1000, 1), jnp.bfloat16)
    step = value_and_grad(lambda p, x: (p["w"] * x).mean().astype("float32"), micro_batch=1)
    value, grads = step(params, x)
    assert value.dtype == jnp.float32 and grads["w"].dtype == jnp.bfloat16
    assert float(grads["w"]) == 1.0


def test_keys_and_scalars():
    """A key a sample is divided; a lone key and a scalar are passed whole."""
    keys = jax.random.split(jax.random.key(0), 10)

    def noisy(params, x, keys, scale, lone):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        noise = noise + jax.random.normal(lone, (3,))
        return (jnp.sin(apply(params, x) + noise) * scale).mean()

    args = (PARAMS, X, keys, jnp.float32(3), jax.random.key(1))
    assert_same(value_and_grad(noisy, micro_batch=4)(*args), value_and_grad(noisy)(*args))


def test_memory_falls():
    def temporary(size):
        step = value_and_grad(loss, micro_batch=size)
        x = jnp.zeros((64, 32, 32, 2))
        y = jnp.zeros(64, jnp.int32)
        compiled = jax.jit(step).lower(PARAMS, x, y).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4) < temporary(64) / 8


def test_a_static_output_that_depends_on_the_number_of_samples():
    def counting(params, x, y):
        return loss(params, x, y), {"n": len(x)}

    step = value_and_grad(counting, has_aux=True, micro_batch=4)
    with pytest.raises(ValueError, match="that is no array depends on the number of samples"):
        step(PARAMS, X, Y)
    named = value_and_grad(lambda *args: (loss(*args), "name"), has_aux=True, micro_batch=4)
    assert named(PARAMS, X, Y)[0][1] == "name"


def test_numpy_sizes():
    assert_same(
        value_and_grad(loss, micro_batch=np.int64(4))(PARAMS, X, Y),
        value_and_grad(loss)(PARAMS, X, Y),
    )


@pytest.mark.parametrize("size", [0, -1, 2.0, "4", True])
def test_bad_sizes(size):
    with pytest.raises(ValueError, match=f"micro_batch is {size!r}; it must be None or at least 1"):
        value_and_grad(loss, micro_batch=size)


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        (loss, (X, Y[:4]), "that of argument 1 has 4 elements and that of 0 has 10; give by key"),
        (lambda p, x: p["conv"].sum() * x, (jnp.float32(3),), "none of them is a batch"),
    ],
)
def test_arguments_that_cannot_be_divided(function, args, message):
    with pytest.raises(ValueError, match=message):
        value_and_grad(function, micro_batch=2)(PARAMS, *args)


@pytest.mark.parametrize("size", [5, 3], ids=["whole", "short last"])
@pytest.mark.parametrize(
    "aux", [lambda x, y: x.sum((1, 2, 3)), lambda x, y: (y == 0).sum()], ids=["a sample", "count"]
)
def test_auxiliary_outputs_that_have_no_mean(aux, size):
    step = value_and_grad(
        lambda p, x, y: (loss(p, x, y), aux(x, y)), has_aux=True, micro_batch=size
    )
    with pytest.raises(ValueError, match="an auxiliary output is .* with micro_batch they are av"):
        step(PARAMS, X, Y)
