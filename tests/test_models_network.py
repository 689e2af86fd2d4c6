"""What all networks have in common: they divide in two, and their statistics are told apart."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lance_jax.models import network
from lance_jax.models.alexnet import AlexNet
from lance_jax.models.deit import DeiT
from lance_jax.models.digits import DigitsNet
from lance_jax.models.layers import Block
from lance_jax.models.mcunet import MCUNet, Stem
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.resnet import ResNet
from tests.tolerances import assert_close

BLOCKS = (Block(3, 1, 4, 4, 8, False, False), Block(5, 2, 8, 16, 8, True, False))
NETWORKS = {
    "digits": DigitsNet(classes=5),
    "mcunet": MCUNet(resolution=18, stem=Stem(3, 2, 4), blocks=BLOCKS, classes=5),
    "mcunet with norm": MCUNet(
        resolution=18, stem=Stem(3, 2, 4), blocks=BLOCKS, epsilon=1e-3, classes=5
    ),
    "resnet": ResNet(resolution=32, stages=(1, 2), width=4, classes=5),
    "narrow resnet": ResNet(resolution=32, stages=(1, 2), width=4, small=True, classes=5),
    "mobilenetv2": MobileNetV2(resolution=32, width=0.1, classes=5),
    "deit": DeiT(resolution=16, patch=4, width=12, depth=3, classes=5),
    "alexnet": AlexNet(width=2, classes=5),
}
WITH_NORM = [name for name in NETWORKS if "batch_stats" in network.shapes(NETWORKS[name])]


def drawn(net):
    """Variables by a seed, running variances above 0."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        value = rng.normal(0, 0.2, shape).astype(np.float32)
        return 1 + np.abs(value) if path[-1].key in ("scale", "var") else value

    return jax.tree.map_with_path(lambda p, leaf: draw(p, leaf.shape), network.shapes(net))


def pictures(net, n=2):
    return np.random.default_rng(1).uniform(-1, 1, (n, *net.picture)).astype(np.float32)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_divides_in_two(name, block, exact_products):
    """Prefix, then suffix, is the whole network, and each needs its own variables alone."""
    net = NETWORKS[name]
    variables, x = drawn(net), pictures(net)
    whole = jax.jit(net.apply)(variables, x)
    prefix, suffix = net.clone(stop=block, classes=None), net.clone(start=block)
    parts = [
        network.shapes(prefix),
        jax.eval_shape(suffix.init, jax.random.key(0), jax.eval_shape(prefix.apply, variables, x)),
    ]
    front, back = (
        {kind: {k: variables[kind][k] for k in part[kind]} for kind in part} for part in parts
    )
    middle = jax.jit(prefix.apply)(front, x)
    assert_close(jax.jit(suffix.apply)(back, middle), whole)
    assert not set(parts[0]["params"]) & set(parts[1]["params"])
    assert set(parts[0]["params"]) | set(parts[1]["params"]) == set(variables["params"])


def test_which_networks_have_batch_norm():
    assert WITH_NORM == [
        "mcunet with norm",
        "resnet",
        "narrow resnet",
        "mobilenetv2",
        "alexnet",
    ]


@pytest.mark.parametrize("name", WITH_NORM)
def test_trained_statistics_move(name):
    """All of them, and the logits are those of other statistics (how: test_models_resnet.py)."""
    net = NETWORKS[name]
    params, x = network.as_params(drawn(net)), pictures(net)
    frozen = jax.jit(network.apply_fn(net))
    trained = jax.jit(network.apply_fn(net.clone(batch_stats="trained")))
    logits, new = trained(params, x)
    assert not np.allclose(frozen(params, x), logits, rtol=0.01)
    old, new = flatten_dict(params["batch_stats"]), flatten_dict(new["batch_stats"])
    assert old.keys() == new.keys()
    assert all(np.any(old[path] != new[path]) for path in old)


@pytest.mark.parametrize("name", NETWORKS)
def test_params_and_variables_are_two_forms_of_one(name):
    variables = drawn(NETWORKS[name])
    back = network.as_variables(network.as_params(variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, variables)))
