"""Layers that several networks share."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lance_jax.models.batch_norm import BatchNorm

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


def imagenet_normalized(x: jax.Array) -> jax.Array:
    """Pictures (..., 3) in [-1, 1], standardised as torchvision and timm do for ImageNet."""
    mean, std = (jnp.asarray(values, x.dtype) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((x + 1) / 2 - mean) / std


def conv(
    channels: int, kernel: int, stride: int = 1, *, groups: int = 1, bias: bool = False, name: str
) -> nn.Conv:
    """A convolution padded by (kernel - 1) // 2 on both sides.

    Also at stride 2, where "SAME" would pad unevenly.
    """
    return nn.Conv(
        channels,
        (kernel, kernel),
        strides=stride,
        padding=(kernel - 1) // 2,
        feature_group_count=groups,
        use_bias=bias,
        name=name,
    )


def batch_norm(batch_stats: str, name: str, epsilon: float = 1e-5) -> BatchNorm:
    """Batch norm; `batch_stats` is that of `Network`."""
    return BatchNorm(batch_stats == "frozen", epsilon, name=name)


class Block(NamedTuple):
    """An inverted residual block: 1x1 expand (where `expand`), depthwise, 1x1 project."""

    kernel: int
    stride: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    expand: bool
    residual: bool


class InvertedResidual(nn.Module):
    """One `Block`: (n, h, w, in_channels) -> (n, h / stride, w / stride, out_channels).

    Each convolution is followed by batch norm of this `epsilon`, or has it folded in and so a
    bias (None); then ReLU6, but for the last one.
    """

    block: Block
    batch_stats: str
    epsilon: float | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block, hidden = self.block, self.block.hidden_channels
        y = x
        if block.expand:
            y = jax.nn.relu6(self._conv(y, hidden, 1, 1, 1, "conv1"))
        y = jax.nn.relu6(self._conv(y, hidden, block.kernel, block.stride, hidden, "conv2"))
        y = self._conv(y, block.out_channels, 1, 1, 1, "conv3")
        return x + y if block.residual else y

    def _conv(
        self, x: jax.Array, channels: int, kernel: int, stride: int, groups: int, name: str
    ) -> jax.Array:
        folded = self.epsilon is None
        x = conv(channels, kernel, stride, groups=groups, bias=folded, name=name)(x)
        if self.epsilon is None:
            return x
        return batch_norm(self.batch_stats, f"{name}_norm", self.epsilon)(x)
