"""The statistics of batch norm over many batches are those of all samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lance_jax.models.alexnet import AlexNet
from lance_jax.models.network import apply_fn, as_params
from lance_jax.norm_statistics import norm_statistics


@pytest.fixture(scope="module")
def network():
    network = AlexNet(width=4, classes=3, batch_stats="trained")
    params = as_params(network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    return apply_fn(network), params


def batches(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 8, 32, 32, 3))
    # batches that differ, in mean and in size of values
    return jnp.asarray(x * np.arange(1, count + 1)[:, None, None, None, None] + 0.5, jnp.float32)


def test_of_the_first_layer_they_are_exact(network):
    apply, params = network
    pictures = batches(4)
    found = norm_statistics(apply, params, pictures)["blocks_0"]["conv_norm"]
    outputs = jax.lax.conv_general_dilated(
        pictures.reshape(-1, 32, 32, 3),
        params["blocks_0"]["conv"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    outputs = np.asarray(outputs, np.float64)
    np.testing.assert_allclose(found["mean"], outputs.mean((0, 1, 2)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["var"], outputs.var((0, 1, 2)), rtol=1e-3)


def test_of_one_batch_they_make_evaluation_what_training_was(network):
    apply, params = network
    (batch,) = batches(1)
    statistics = norm_statistics(apply, params, [batch])
    frozen = apply_fn(AlexNet(width=4, classes=3))
    evaluated = frozen({**params, "batch_stats": statistics}, batch)
    np.testing.assert_allclose(evaluated, apply(params, batch)[0], rtol=1e-3, atol=1e-4)


def test_they_do_not_depend_on_what_was_there(network):
    apply, params = network
    other = {**params, "batch_stats": jax.tree.map(lambda s: s + 3, params["batch_stats"])}
    found = [norm_statistics(apply, of, batches(2)) for of in (params, other)]
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert jax.tree.structure(found[0]) == jax.tree.structure(params["batch_stats"])
