"""A small residual network for 8x8 grey digits, without normalisation layers."""

import einops
import flax.linen as nn
import jax

from lance_jax.models.network import Network

BLOCKS = ((32, 1), (64, 2), (64, 1), (64, 1))  # (channels, stride)
BLOCK_LAYERS = ("conv1", "conv2", "shortcut")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (n, h, w, c) to (n, h/stride, w/stride, channels)."""

    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(nn.Conv(self.channels, (3, 3), strides=self.stride, name="conv1")(x))
        # starting at the shortcut alone keeps a network without normalisation stable
        y = nn.Conv(self.channels, (3, 3), kernel_init=nn.initializers.zeros, name="conv2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.channels, (1, 1), strides=self.stride, name="shortcut")(x)
        return jax.nn.relu(x + y)


class DigitsNet(Network, kw_only=True):
    """See `Network`."""

    resolution: int = 8

    @property
    def picture(self) -> tuple[int, int, int]:
        return self.resolution, self.resolution, 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            x = jax.nn.relu(nn.Conv(BLOCKS[0][0], (3, 3), name="stem")(x))
        for i in range(len(BLOCKS))[self.start : self.stop]:
            x = ResidualBlock(*BLOCKS[i], name=f"blocks_{i}")(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, name="head")(einops.reduce(x, "n h w c -> n c", "mean"))
        return x

    @nn.nowrap
    def names(self) -> dict[str, str]:
        """There are no published weights: dots as in torch."""
        layers = [f"blocks_{i}/{name}" for i in range(len(BLOCKS)) for name in BLOCK_LAYERS]
        dotted = {layer.replace("_", ".").replace("/", "."): layer for layer in layers}
        return {"stem": "stem", "head": "head", **dotted}
