"""The networks that are measured outside of the program, with heads of ten classes."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import tasks
from lance_jax.models import network as networks
from lance_jax.models import weights
from lance_jax.models.deit import DeiT
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.network import Network
from lance_jax.models.resnet import ResNet

CLASSES = 10
PRETRAINED = ("mcunet-5fps", "mbv2-w0.35")
DRAWN = {
    "mobilenetv2-1.0": MobileNetV2(resolution=128),
    "resnet18": ResNet(resolution=128),
    "resnet18-224px": ResNet(resolution=224),
    "resnet18-448px": ResNet(resolution=448),
    # 65 tokens
    "vit": DeiT(resolution=64, patch=8, width=128, depth=6, heads=4),
    "vit-2026-tokens": DeiT(resolution=360, patch=8, width=128, depth=6, heads=4),
}


def load(name: str) -> tuple[Network, Any]:
    """A network and its parameters; drawn at random where no pretrained ones are at hand."""
    if name in PRETRAINED:
        network, variables = weights.load(f"{tasks.WEIGHTS}/{name}.safetensors")
    else:
        network, variables = DRAWN[name], {"params": {}}
    network = network.clone(classes=CLASSES)
    drawn = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *network.picture)))
    params = networks.as_params(drawn) | networks.as_params(variables)
    return network, params | {"head": drawn["params"]["head"]}
