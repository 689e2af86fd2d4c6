"""The AlexNet of five layers for 32x32 pictures of the continual-learning literature.

Gradient projection memory (Saha et al., 2021, arXiv:2103.09762) and what follows it. There are no
published weights; the names are those of https://github.com/sahagobinda/GPM, whose batch norms
keep no running averages, and which has one head for each task.
"""

import einops
import flax.linen as nn
import jax

from lance_jax.models.layers import batch_norm
from lance_jax.models.network import Network

CONVOLUTIONS = ((4, 1, 0.2), (3, 2, 0.2), (2, 4, 0.5))  # (kernel, times width, dropout)
DENSE = ((32, 0.5), (32, 0.5))  # (times width, dropout)


class ConvBlock(nn.Module):
    """Convolution without padding, norm, ReLU, dropout and max-pool: (n, h, w, c), h halved."""

    channels: int
    kernel: int
    dropout: float
    batch_stats: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sides = (self.kernel, self.kernel)
        x = nn.Conv(self.channels, sides, padding="VALID", use_bias=False, name="conv")(x)
        x = jax.nn.relu(batch_norm(self.batch_stats, "conv_norm")(x))
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.max_pool(x, (2, 2), (2, 2))


class DenseBlock(nn.Module):
    """Dense product, norm, ReLU and dropout: (n, features).

    A picture's features come in the order channel, height, width.
    """

    features: int
    dropout: float
    batch_stats: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim == 4:
            x = einops.rearrange(x, "n h w c -> n (c h w)")
        x = nn.Dense(self.features, use_bias=False, name="dense")(x)
        x = jax.nn.relu(batch_norm(self.batch_stats, "dense_norm")(x))
        return nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)


class AlexNet(Network, kw_only=True):
    """See `Network`; takes the pictures as they are. No stem: the five layers are the blocks.

    Dropout acts where ``apply`` is given ``rngs={"dropout": key}``.

    Attributes:
      width: channels of the first convolution.
    """

    resolution: int = 32
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(len(CONVOLUTIONS) + len(DENSE))[self.start : self.stop]:
            x = self._block(i)(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, use_bias=False, name="head")(x)
        return x

    def _block(self, i: int) -> nn.Module:
        name = f"blocks_{i}"
        if i < len(CONVOLUTIONS):
            kernel, times, dropout = CONVOLUTIONS[i]
            return ConvBlock(times * self.width, kernel, dropout, self.batch_stats, name=name)
        times, dropout = DENSE[i - len(CONVOLUTIONS)]
        return DenseBlock(times * self.width, dropout, self.batch_stats, name=name)

    @nn.nowrap
    def names(self) -> dict[str, str]:
        layers = {
            "conv1": "blocks_0/conv",
            "conv2": "blocks_1/conv",
            "conv3": "blocks_2/conv",
            "fc1": "blocks_3/dense",
            "fc2": "blocks_4/dense",
        }
        norms = {f"bn{i + 1}": f"{layer}_norm" for i, layer in enumerate(layers.values())}
        return {**layers, **norms, "fc3.0": "head"}
