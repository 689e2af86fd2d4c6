"""MCUNet (Lin et al., 2020, arXiv:2007.10319) and its like: inverted residual blocks, as data.

Two layouts of weights fit: files with an `architecture` in their metadata whose batch norm is
folded into the convolutions (mcunet-5fps, mbv2-w0.35 and proxyless-w0.3), and, with `epsilon`, the
names of https://github.com/mit-han-lab/mcunet.
"""

from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax

from lance_jax.models.layers import Block, InvertedResidual, batch_norm, conv
from lance_jax.models.network import Network


class Stem(NamedTuple):
    """The first convolution."""

    kernel: int
    stride: int
    out_channels: int


class MCUNet(Network, kw_only=True):
    """See `Network`; takes the pictures as they are.

    Attributes:
      epsilon: of batch norm; None where it is folded into the convolutions, which then have biases.
    """

    stem: Stem
    blocks: tuple[Block, ...]
    epsilon: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            kernel, stride, channels = self.stem
            x = conv(channels, kernel, stride, bias=self.epsilon is None, name="stem")(x)
            if self.epsilon is not None:
                x = batch_norm(self.batch_stats, "stem_norm", self.epsilon)(x)
            x = jax.nn.relu6(x)
        for i, block in list(enumerate(self.blocks))[self.start : self.stop]:
            x = InvertedResidual(block, self.batch_stats, self.epsilon, name=f"blocks_{i}")(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, name="head")(einops.reduce(x, "n h w c -> n c", "mean"))
        return x

    @nn.nowrap
    def names(self) -> dict[str, str]:
        if self.epsilon is None:
            return {
                "stem": "stem",
                "classifier": "head",
                **{
                    f"blocks.{i}.{name}": f"blocks_{i}/{name}"
                    for i in range(len(self.blocks))
                    for name in ("conv1", "conv2", "conv3")
                },
            }
        modules = {"first_conv": "stem"}
        parts = {"inverted_bottleneck": "conv1", "depth_conv": "conv2", "point_linear": "conv3"}
        for i in range(len(self.blocks)):
            for theirs, ours in parts.items():
                modules[f"blocks.{i}.mobile_inverted_conv.{theirs}"] = f"blocks_{i}/{ours}"
        found = {"classifier.linear": "head"}
        for theirs, ours in modules.items():
            found |= {f"{theirs}.conv": ours, f"{theirs}.bn": f"{ours}_norm"}
        return found


def parse(spec: dict[str, Any]) -> MCUNet:
    """The network that the JSON of a weights file describes, which may say other things too.

    KeyError, TypeError or ValueError where it describes none.
    """
    stem = Stem(*(int(spec["stem"][field]) for field in Stem._fields))
    blocks = tuple(map(_parse_block, spec["blocks"]))
    epsilon = spec.get("epsilon")
    if min(*stem, *(min(block[:5]) for block in blocks)) < 1:
        raise ValueError("a size below 1")
    return MCUNet(
        resolution=int(spec["resolution"]),
        stem=stem,
        blocks=blocks,
        epsilon=None if epsilon is None else float(epsilon),
    )


def _parse_block(spec: dict[str, Any]) -> Block:
    *sizes, expand, residual = (spec[field] for field in Block._fields)
    kernel, stride, inputs, hidden, outputs = map(int, sizes)
    if residual and (stride, inputs) != (1, outputs):
        raise ValueError(f"a residual block of stride {stride} from {inputs} to {outputs} channels")
    return Block(kernel, stride, inputs, hidden, outputs, bool(expand), bool(residual))
