"""The PyTorch side of benchmarks.cpu computes the same networks; only where torch is installed."""

import jax
import numpy as np
import pytest

from lance_jax.models import network as networks
from lance_jax.models.layers import Block
from lance_jax.models.mcunet import MCUNet, Stem
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.resnet import ResNet
from tests.tolerances import assert_close

pytest.importorskip("torch", reason="torch comes with the extra `benchmarks`")
# Only below the check, since this module imports torch, which most installations do not have.
from benchmarks import cpu, torch_networks  # noqa: E402

BLOCKS = (
    Block(3, 1, 4, 4, 6, False, False),
    Block(5, 2, 6, 12, 8, True, False),
    Block(7, 1, 8, 16, 8, True, True),
)
NETWORKS = {
    "mcunet": MCUNet(resolution=18, stem=Stem(3, 2, 4), blocks=BLOCKS),
    "mobilenetv2": MobileNetV2(resolution=32, width=0.1),
    "resnet": ResNet(resolution=32, width=8),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_logits(network, exact_products):
    network = network.clone(classes=5)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1])
        return rng.normal(0, fan_in**-0.5, leaf.shape).astype(leaf.dtype)

    params = jax.tree.map_with_path(draw, networks.as_params(networks.shapes(network)))
    x = rng.uniform(-1, 1, (2, *network.picture)).astype(np.float32)
    expected = np.asarray(jax.jit(networks.apply_fn(network))(params, x), np.float64)
    assert expected.std() > 0.01, "the logits tell pictures and classes apart"
    for memory_format in cpu.FORMATS:
        tensors = torch_networks.tensors(params, memory_format)
        found = torch_networks.forward(network, tensors, torch_networks.pictures(x, memory_format))
        assert_close(found.numpy(), expected)
