"""Residual networks of basic blocks: ResNet-18 and -34, and the narrow one of continual learning.

ResNet (He et al., 2016, arXiv:1512.03385) in the layout of torchvision and timm: the published
weights timm/resnet18.tv_in1k and timm/resnet34.tv_in1k fit `ResNet()` and
``ResNet(stages=(3, 4, 6, 3))``.
"""

from typing import Any

import einops
import flax.linen as nn
import jax

from lance_jax.models.batch_norm import BatchNorm
from lance_jax.models.layers import batch_norm, conv, imagenet_normalized
from lance_jax.models.network import Network


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, h, w, c) -> (n, h / stride, w / stride, channels).

    The shortcut is a 1x1 convolution where the shape changes.
    """

    channels: int
    stride: int
    batch_stats: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def norm(name: str) -> BatchNorm:
            return batch_norm(self.batch_stats, name)

        y = norm("conv1_norm")(conv(self.channels, 3, self.stride, name="conv1")(x))
        y = norm("conv2_norm")(conv(self.channels, 3, name="conv2")(jax.nn.relu(y)))
        if x.shape != y.shape:
            x = conv(self.channels, 1, self.stride, name="shortcut")(x)
            x = norm("shortcut_norm")(x)
        return jax.nn.relu(x + y)


class ResNet(Network, kw_only=True):
    """See `Network`; standardises the pictures by ImageNet's mean and deviation.

    Attributes:
      stages: the number of blocks of each stage; the channels double from stage to stage.
      width: channels of the stem and the first stage.
      small: the form for pictures of 32x32 in the continual-learning literature (`width` 20;
        Saha et al., 2021, arXiv:2103.09762): a 3x3 stem without max-pool on pictures as they are,
        and a head without bias on 2x2 averages in the order channel, height, width. There are no
        published weights; the names are those of the large form.
      stem_stride: of the small form's stem; 2 in the literature for pictures of 84x84 (TRGP, Lin et
        al., 2022, arXiv:2202.02931).
    """

    resolution: int = 224
    stages: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    small: bool = False
    stem_stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            x = self._stem(x)
        for i, (stage, first) in list(enumerate(self._places()))[self.start : self.stop]:
            channels, stride = self.width * 2**stage, 2 if first and stage > 0 else 1
            x = BasicBlock(channels, stride, self.batch_stats, name=f"blocks_{i}")(x)
        if self.classes is None:
            return x
        if self.small:
            even = [slice(size // 2 * 2) for size in x.shape[1:3]]  # an odd last line is left out
            x = einops.reduce(x[:, *even], "n (h a) (w b) c -> n (c h w)", "mean", a=2, b=2)
        else:
            x = einops.reduce(x, "n h w c -> n c", "mean")
        return nn.Dense(self.classes, use_bias=not self.small, name="head")(x)

    def _stem(self, x: jax.Array) -> jax.Array:
        if not self.small:
            x = imagenet_normalized(x)
        kernel, stride = (3, self.stem_stride) if self.small else (7, 2)
        x = conv(self.width, kernel, stride, name="stem")(x)
        x = jax.nn.relu(batch_norm(self.batch_stats, "stem_norm")(x))
        if self.small:
            return x
        around: Any = ((1, 1), (1, 1))  # Flax's annotation knows only names of paddings
        return nn.max_pool(x, (3, 3), (2, 2), padding=around)

    @nn.nowrap
    def _places(self) -> list[tuple[int, bool]]:
        """(stage, whether it is the stage's first) of each block."""
        return [(stage, j == 0) for stage, n in enumerate(self.stages) for j in range(n)]

    @nn.nowrap
    def names(self) -> dict[str, str]:
        found = {"conv1": "stem", "bn1": "stem_norm", "fc": "head"}
        references = [f"layer{s + 1}.{j}" for s, n in enumerate(self.stages) for j in range(n)]
        for i, reference in enumerate(references):
            modules = {
                "conv1": "conv1",
                "bn1": "conv1_norm",
                "conv2": "conv2",
                "bn2": "conv2_norm",
                "downsample.0": "shortcut",
                "downsample.1": "shortcut_norm",
            }
            for theirs, ours in modules.items():
                found[f"{reference}.{theirs}"] = f"blocks_{i}/{ours}"
        return found
