"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) of any width, in timm's layout.

The published weights timm/mobilenetv2_100.ra_in1k fit `MobileNetV2()`.
"""

import einops
import flax.linen as nn
import jax

from lance_jax.models.layers import Block, InvertedResidual, batch_norm, conv, imagenet_normalized
from lance_jax.models.network import Network

# (expansion, channels, blocks, stride of the first) of each stage
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
EPSILON = 1e-5


def rounded(channels: float) -> int:
    """The nearest multiple of 8, but not more than a tenth below `channels`."""
    multiple = max(8, int(channels + 4) // 8 * 8)
    return multiple + 8 if multiple < 0.9 * channels else multiple


def blocks(width: float) -> list[Block]:
    """The 17 inverted residual blocks at a width multiplier."""
    found, inputs = [], rounded(32 * width)
    for expansion, channels, n, first_stride in STAGES:
        outputs = rounded(channels * width)
        for j in range(n):
            stride, hidden = first_stride if j == 0 else 1, rounded(inputs * expansion)
            residual = stride == 1 and inputs == outputs
            found.append(Block(3, stride, inputs, hidden, outputs, expansion > 1, residual))
            inputs = outputs
    return found


class MobileNetV2(Network, kw_only=True):
    """See `Network`; standardises the pictures by ImageNet's mean and deviation.

    Behind the last block comes the 1x1 convolution `features`, to 1280 channels or more.

    Attributes:
      width: multiplier of all channels.
    """

    resolution: int = 224
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            x = self._conv(imagenet_normalized(x), rounded(32 * self.width), 3, 2, "stem")
        for i, block in list(enumerate(blocks(self.width)))[self.start : self.stop]:
            x = InvertedResidual(block, self.batch_stats, EPSILON, name=f"blocks_{i}")(x)
        if self.classes is None:
            return x
        x = self._conv(x, max(1280, rounded(1280 * self.width)), 1, 1, "features")
        return nn.Dense(self.classes, name="head")(einops.reduce(x, "n h w c -> n c", "mean"))

    def _conv(self, x: jax.Array, channels: int, kernel: int, stride: int, name: str) -> jax.Array:
        x = conv(channels, kernel, stride, name=name)(x)
        return jax.nn.relu6(batch_norm(self.batch_stats, f"{name}_norm", EPSILON)(x))

    @nn.nowrap
    def names(self) -> dict[str, str]:
        found = {
            "conv_stem": "stem",
            "bn1": "stem_norm",
            "conv_head": "features",
            "bn2": "features_norm",
            "classifier": "head",
        }
        places = [(s, j) for s, (_, _, n, _) in enumerate(STAGES) for j in range(n)]
        for i, (stage, j) in enumerate(places):
            # timm counts a block's convolutions anew where there is none to expand
            theirs = ["conv_pw", "conv_dw", "conv_pwl"] if stage else ["conv_dw", "conv_pw"]
            ours = ["conv1", "conv2", "conv3"][-len(theirs) :]
            for k, (reference, name) in enumerate(zip(theirs, ours, strict=True)):
                found[f"blocks.{stage}.{j}.{reference}"] = f"blocks_{i}/{name}"
                found[f"blocks.{stage}.{j}.bn{k + 1}"] = f"blocks_{i}/{name}_norm"
        return found
