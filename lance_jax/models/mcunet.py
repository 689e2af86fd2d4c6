"""MCUNet (Lin et al., 2020, arXiv:2007.10319), built from the architecture stored with its weights.

Batch norm is folded into the convolutions, so every one has a bias and no statistics exist.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open


class Block(NamedTuple):
    """One inverted residual block: 1x1 expand (where `expand`), depthwise, 1x1 project."""

    kernel: int
    stride: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    expand: bool
    residual: bool


class Architecture(NamedTuple):
    """What the weights file says of the network; `resolution` is the picture's side in pixels."""

    resolution: int
    stem_channels: int
    stem_kernel: int
    stem_stride: int
    blocks: tuple[Block, ...]


def _conv(channels: int, kernel: int, stride: int, groups: int, name: str) -> nn.Conv:
    # (k - 1) // 2 on both sides also at stride 2, where "SAME" would pad unevenly
    padding = (kernel - 1) // 2
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        name=name,
    )


class InvertedResidual(nn.Module):
    """One `Block`: (n, h, w, in_channels) -> (n, h / stride, w / stride, out_channels)."""

    block: Block

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block, hidden = self.block, self.block.hidden_channels
        y = x
        if block.expand:
            y = jax.nn.relu6(_conv(hidden, 1, 1, 1, "conv1")(y))
        y = jax.nn.relu6(_conv(hidden, block.kernel, block.stride, hidden, "conv2")(y))
        y = _conv(block.out_channels, 1, 1, 1, "conv3")(y)
        return x + y if block.residual else y


class MCUNet(nn.Module):
    """Blocks `start` to `stop` of the network, NHWC.

    From `start` 0 the input is a batch of pictures (n, resolution, resolution, 3) in [-1, 1], else
    the output of block `start` - 1. With `classes` the output is logits (n, classes), else the
    output of the last block run.
    """

    architecture: Architecture
    start: int = 0
    stop: int | None = None
    classes: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        net = self.architecture
        if self.start == 0:
            stem = _conv(net.stem_channels, net.stem_kernel, net.stem_stride, 1, "stem")
            x = jax.nn.relu6(stem(x))
        for i in range(len(net.blocks))[self.start : self.stop]:
            x = InvertedResidual(net.blocks[i], name=f"blocks_{i}")(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, name="head")(einops.reduce(x, "n h w c -> n c", "mean"))
        return x


def last_pointwise(architecture: Architecture, n: int) -> list[tuple[int, str]]:
    """(block, name) of the last `n` 1x1 convolutions, in order of use."""
    names = [
        (i, name)
        for i, block in enumerate(architecture.blocks)
        for name in (["conv1", "conv3"] if block.expand else ["conv3"])
    ]
    if not 1 <= n <= len(names):
        raise ValueError(
            f"trainable_layers is {n}; this network has 1 to {len(names)} pointwise convolutions"
        )
    return names[-n:]


def load(path: str | Path) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and Linen parameters (float32, the ImageNet classifier left out) of a file.

    The file is safetensors: convolutions in OIHW named `stem`, `blocks.N.convM`, `classifier`, and
    an `architecture` JSON in the metadata. ValueError for anything else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"weights file {str(path)!r} does not exist; give --config.weights=FILE")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            # The file is no mapping and cannot be iterated without keys().
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"weights file {str(path)!r} is not a safetensors file ({error}); pickles and other "
            "formats are not read"
        ) from None
    architecture = _parse_architecture(metadata, path)
    params = _to_linen(tensors, path)
    _check_shapes(architecture, params, path)
    return architecture, unflatten_dict(params, sep="/")


def _parse_architecture(metadata: dict[str, str], path: str | Path) -> Architecture:
    try:
        spec = json.loads(metadata["architecture"])
        blocks = tuple(map(_parse_block, spec["blocks"]))
        stem = spec["stem"]
        sizes = spec["resolution"], stem["out_channels"], stem["kernel"], stem["stride"]
        side, channels, kernel, stride = map(int, sizes)
        if min(side, channels, kernel, stride, *(min(block[:5]) for block in blocks)) < 1:
            raise ValueError("a size below 1")
        return Architecture(side, channels, kernel, stride, blocks)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"weights file {str(path)!r} describes no MCUNet in its metadata "
            f"(`architecture`: {error!r})"
        ) from None


def _parse_block(spec: dict[str, Any]) -> Block:
    *sizes, expand, residual = (spec[field] for field in Block._fields)
    kernel, stride, inputs, hidden, outputs = map(int, sizes)
    if residual and (stride, inputs) != (1, outputs):
        raise ValueError(f"a residual block of stride {stride} from {inputs} to {outputs} channels")
    return Block(kernel, stride, inputs, hidden, outputs, bool(expand), bool(residual))


def _to_linen(tensors: dict[str, np.ndarray], path: str | Path) -> dict[str, np.ndarray]:
    """Linen's parameters by their paths, such as "blocks_2/conv1/kernel"."""
    params = {}
    for name, tensor in tensors.items():
        *modules, leaf = name.replace("blocks.", "blocks_").split(".")
        if modules == ["classifier"]:
            continue
        if leaf == "weight":
            if tensor.ndim != 4:
                raise ValueError(
                    f"weights file {str(path)!r}: {name!r} has shape {tensor.shape}; it must be "
                    "that of a convolution, (out, in, height, width)"
                )
            # a depthwise (C, 1, k, k) becomes (k, k, 1, C)
            leaf = "kernel"
            tensor = np.ascontiguousarray(einops.rearrange(tensor, "out i h w -> h w i out"))
        params["/".join([*modules, leaf])] = tensor
    return params


def _check_shapes(
    architecture: Architecture, params: dict[str, np.ndarray], path: str | Path
) -> None:
    """The parameters are exactly those that the architecture asks for."""
    side = architecture.resolution
    expected = jax.eval_shape(
        MCUNet(architecture).init, jax.random.key(0), jax.ShapeDtypeStruct((1, side, side, 3), "f4")
    )["params"]

    def described(flat):
        return {(name, leaf.shape, str(leaf.dtype)) for name, leaf in flat.items()}

    wrong = described(flatten_dict(expected, sep="/")) ^ described(params)
    if wrong:
        raise ValueError(
            f"weights file {str(path)!r} does not fit its architecture, first at "
            f"{min(wrong)} of {len(wrong)} differences"
        )
