"""A small residual network for 8x8 grey digits, without normalisation layers."""

import einops
import flax.linen as nn
import jax

BLOCKS = ((32, 1), (64, 2), (64, 1), (64, 1))  # (channels, stride)


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


class DigitsNet(nn.Module):
    """Blocks `start` to `stop` of the network, NHWC.

    From `start` 0 the input is a batch of pictures (n, 8, 8, 1), else the output of block
    `start` - 1. With `classes` the output is logits (n, classes), else that of the last block run.
    """

    start: int = 0
    stop: int | None = None
    classes: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            x = jax.nn.relu(nn.Conv(BLOCKS[0][0], (3, 3), name="stem")(x))
        for i in range(len(BLOCKS))[self.start : self.stop]:
            x = ResidualBlock(*BLOCKS[i], name=f"blocks_{i}")(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, name="head")(einops.reduce(x, "n h w c -> n c", "mean"))
        return x


def last_convolutions(n: int) -> list[tuple[int, str]]:
    """(block, name) of the last `n` convolutions of the residual branches, in order of use."""
    names = [(i, name) for i in range(len(BLOCKS)) for name in ("conv1", "conv2")]
    if not 1 <= n <= len(names):
        raise ValueError(f"trainable_layers is {n}; this network has 1 to {len(names)}")
    return names[-n:]
