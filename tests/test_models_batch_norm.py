"""Batch norm is Flax's, gradients included, and keeps a third as much."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lance_jax
from lance_jax.models.batch_norm import BatchNorm, normalised

SHAPES = [(6, 5, 4, 3), (7, 8), (2, 3, 5)]


def variables(channels):
    rng = np.random.default_rng(0)

    def values(low, high):
        return jnp.asarray(rng.uniform(low, high, channels), jnp.float32)

    return {
        "params": {"scale": values(0.5, 2), "bias": values(-1, 1)},
        "batch_stats": {"mean": values(-1, 1), "var": values(0.5, 2)},
    }


def inputs(shape, dtype=np.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(3 * rng.normal(size=shape) + np.arange(shape[-1]), dtype)


def both(average):
    flax = nn.BatchNorm(use_running_average=average, momentum=0.9, use_fast_variance=False)
    return BatchNorm(average), flax


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("average", [True, False])
def test_values_statistics_and_variables_are_flax_s(shape, average):
    x, given = inputs(shape), variables(shape[-1])
    (ours, stats), (theirs, want) = (
        norm.apply(given, x, mutable=["batch_stats"]) for norm in both(average)
    )
    if average:
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, want)
    first, second = (norm.init(jax.random.key(0), x) for norm in both(average))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_formula_in_float64(shape):
    def reference(x, scale, bias):
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = ((x - mean) ** 2).mean(axes)
        return jnp.sum(jnp.sin((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias))

    x, given = inputs(shape), variables(shape[-1])["params"]
    found = jax.grad(lambda *args: jnp.sum(jnp.sin(normalised(*args, 1e-5)[0])), (0, 1, 2))(
        x, given["scale"], given["bias"]
    )
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, *given.values())]
        want = jax.grad(reference, (0, 1, 2))(*exact)
    for got, wanted in zip(found, want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=2e-5)


def test_one_array_of_the_input_s_size_is_kept():
    x = inputs((16, 8, 8, 32))

    def loss(params, x, norm):
        given = {"params": params, "batch_stats": variables(32)["batch_stats"]}
        y, new = norm.apply(given, params["w"] * x, mutable=["batch_stats"])
        return jnp.sum(y**3), new

    params = {**variables(32)["params"], "w": jnp.ones(32)}
    kept = [
        lance_jax.report(lambda p, x, norm=norm: loss(p, x, norm), params, x).saved_bytes.total
        for norm in both(False)
    ]
    # the loss itself keeps one more
    assert kept[0] < 2.1 * x.nbytes and kept[1] > 2.9 * x.nbytes


def test_no_gradient_flows_through_the_moments():
    x, given = inputs((7, 8)), variables(8)["params"]

    def moments(x):
        return sum(m.sum() for m in normalised(x, given["scale"], given["bias"], 1e-5)[1:])

    np.testing.assert_array_equal(jax.grad(moments)(x), 0)
