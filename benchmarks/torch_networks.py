"""The networks of the program once more, in PyTorch, on the same parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from flax.traverse_util import flatten_dict

from lance_jax.models import mobilenet
from lance_jax.models.layers import IMAGENET_MEAN, IMAGENET_STD
from lance_jax.models.mcunet import MCUNet
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.network import Network
from lance_jax.models.resnet import ResNet

Tensors = Mapping[str, torch.Tensor]


def tensors(params: Any, memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
    """Parameters by their paths, kernels as (out, in, ...)."""
    found = {}
    for path, leaf in flatten_dict(jax.device_get(params), sep="/").items():
        array = np.asarray(leaf)
        array = np.moveaxis(array, (-1, -2), (0, 1)) if path.endswith("kernel") else array
        tensor = torch.from_numpy(np.array(array))
        found[path] = tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor
    return found


def pictures(x: Any, memory_format: torch.memory_format) -> torch.Tensor:
    """NCHW from NHWC."""
    return torch.from_numpy(np.array(np.moveaxis(x, -1, 1))).to(memory_format=memory_format)


def forward(network: Network, p: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Logits of the whole network, batch norm by its running averages."""
    if not isinstance(network, MCUNet):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = ((x + 1) / 2 - mean) / std
    x = _resnet(network, p, x) if isinstance(network, ResNet) else _inverted(network, p, x)
    return F.linear(x.mean((2, 3)), p["head/kernel"], p["head/bias"])


def _inverted(network: Any, p: Tensors, x: torch.Tensor) -> torch.Tensor:
    is_mobilenet = isinstance(network, MobileNetV2)
    blocks = mobilenet.blocks(network.width) if is_mobilenet else network.blocks
    x = F.relu6(_conv(p, x, "stem", 2 if is_mobilenet else network.stem.stride))
    for i, block in enumerate(blocks):
        y, name = x, f"blocks_{i}"
        if block.expand:
            y = F.relu6(_conv(p, y, f"{name}/conv1"))
        y = F.relu6(_conv(p, y, f"{name}/conv2", block.stride, block.hidden_channels))
        y = _conv(p, y, f"{name}/conv3")
        x = x + y if block.residual else y
    return F.relu6(_conv(p, x, "features")) if is_mobilenet else x


def _resnet(network: ResNet, p: Tensors, x: torch.Tensor) -> torch.Tensor:
    x = F.max_pool2d(F.relu(_conv(p, x, "stem", 2)), 3, 2, 1)
    places = [(stage, j) for stage, n in enumerate(network.stages) for j in range(n)]
    for i, (stage, j) in enumerate(places):
        name, stride = f"blocks_{i}", 2 if stage and j == 0 else 1
        y = F.relu(_conv(p, x, f"{name}/conv1", stride))
        y = _conv(p, y, f"{name}/conv2")
        if f"{name}/shortcut/kernel" in p:
            x = _conv(p, x, f"{name}/shortcut", stride)
        x = F.relu(x + y)
    return x


def _conv(p: Tensors, x: torch.Tensor, name: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
    kernel = p[f"{name}/kernel"]
    padding = (kernel.shape[-1] - 1) // 2
    x = F.conv2d(x, kernel, p.get(f"{name}/bias"), stride, padding, groups=groups)
    norm = f"{name}_norm"
    if f"{norm}/scale" not in p:
        return x
    statistics = p[f"batch_stats/{norm}/mean"], p[f"batch_stats/{norm}/var"]
    return F.batch_norm(x, *statistics, p[f"{norm}/scale"], p[f"{norm}/bias"], eps=1e-5)
