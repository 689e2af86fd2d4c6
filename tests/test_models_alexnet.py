"""The five-layer AlexNet from a state dict in GPM's layout against plain float64."""

import jax
import numpy as np
import pytest

from lance_jax.models import weights
from lance_jax.models.alexnet import AlexNet
from tests.pretrained import Reference, pictures, relu
from tests.test_models_network import drawn
from tests.tolerances import assert_close


def pool2(x):
    """Max-pool of 2x2 at stride 2; an odd last row or column is left out."""
    n, h, w, c = x.shape
    x = x[:, : h // 2 * 2, : w // 2 * 2]
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def reference(file, x, width):
    """Logits of 7 classes."""
    for i, (channels, kernel) in enumerate([(width, 4), (2 * width, 3), (4 * width, 2)]):
        x = file.conv(x, f"conv{i + 1}", channels, kernel, padding=0)
        x = pool2(relu(file.norm(x, f"bn{i + 1}")))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    for i in (1, 2):
        x = relu(file.norm(file.dense(x, f"fc{i}", 32 * width, bias=False), f"bn{i + 3}"))
    return file.dense(x, "fc3.0", 7, bias=False)


@pytest.mark.parametrize("trained", [False, True])
def test_logits_equal_the_reference(tmp_path, trained, exact_products):
    """With the running averages, and with the statistics of the batch, as the literature tests."""
    file, x = Reference(trained=trained), pictures(4, 32)
    logits = reference(file, x, 3)
    path = file.save(tmp_path / "file.safetensors", kind="alexnet", width=3, resolution=32)
    network, variables = weights.load(path)
    network = network.clone(batch_stats="trained" if trained else "frozen")
    apply = jax.jit(lambda v, x: network.apply(v, x, mutable=["batch_stats"])[0])
    assert_close(apply(variables, x), logits)
    assert set(weights.keys(network)) == set(file.tensors)


def test_dropout_acts_where_a_key_is_given():
    network, x = AlexNet(width=2, classes=3), pictures(2, 32)
    variables = drawn(network)
    plain = jax.jit(network.apply)(variables, x)
    dropped = jax.jit(lambda v, x, key: network.apply(v, x, rngs={"dropout": key}))
    keys = (jax.random.key(i, impl="unsafe_rbg") for i in (1, 1, 2))  # compiles in no time
    one, same, other = (dropped(variables, x, key) for key in keys)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other) and not np.array_equal(one, plain)


def test_the_sizes_of_the_literature():
    """A picture of 32x32 comes to 1024 features before the dense layers of 2048."""
    params = weights.network.shapes(AlexNet(classes=10))["params"]
    assert params["blocks_3"]["dense"]["kernel"].shape == (1024, 2048)
    assert params["blocks_4"]["dense"]["kernel"].shape == (2048, 2048)
