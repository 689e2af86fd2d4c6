"""DeiT (Touvron et al., 2021, arXiv:2012.12877), a vision transformer, in timm's layout.

The published weights timm/deit_tiny_patch16_224.fb_in1k fit `DeiT()`.
"""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from lance_jax.models.layers import imagenet_normalized
from lance_jax.models.network import Network


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class TransformerBlock(nn.Module):
    """Self-attention and a hidden layer of four times the width, each added: (n, tokens, width)."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.Dense(3 * width, name="qkv")(_layer_norm("norm1")(x))
        q, k, v = einops.rearrange(y, "n t (qkv h d) -> qkv n t h d", qkv=3, h=self.heads)
        y = einops.rearrange(jax.nn.dot_product_attention(q, k, v), "n t h d -> n t (h d)")
        x = x + nn.Dense(width, name="proj")(y)
        y = nn.Dense(4 * width, name="fc1")(_layer_norm("norm2")(x))
        return x + nn.Dense(width, name="fc2")(jax.nn.gelu(y, approximate=False))


class DeiT(Network, kw_only=True):
    """See `Network`; standardises the pictures by ImageNet's mean and deviation.

    Between the blocks stand tokens (n, 1 + patches, width), the first of which is classified. The
    position embedding holds for one `resolution`.

    Attributes:
      patch: side of a patch in pixels, a divisor of the resolution.
      width, depth, heads: features of a token, blocks, and attention heads, a divisor of width.
    """

    resolution: int = 224
    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.start == 0:
            x = self._tokens(imagenet_normalized(x))
        for i in range(self.depth)[self.start : self.stop]:
            x = TransformerBlock(self.heads, name=f"blocks_{i}")(x)
        if self.classes is not None:
            x = nn.Dense(self.classes, name="head")(_layer_norm("norm")(x[:, 0]))
        return x

    def _tokens(self, x: jax.Array) -> jax.Array:
        sides = (self.patch, self.patch)
        x = nn.Conv(self.width, sides, strides=sides, padding="VALID", name="stem")(x)
        x = einops.rearrange(x, "n h w c -> n (h w) c")
        small = nn.initializers.truncated_normal(0.02)
        first = self.param("cls_token", small, (1, 1, self.width))
        place = self.param("pos_embed", small, (1, 1 + x.shape[1], self.width))
        return jnp.concatenate([jnp.repeat(first, len(x), axis=0), x], axis=1) + place

    @nn.nowrap
    def names(self) -> dict[str, str]:
        modules = {
            "norm1": "norm1",
            "attn.qkv": "qkv",
            "attn.proj": "proj",
            "norm2": "norm2",
            "mlp.fc1": "fc1",
            "mlp.fc2": "fc2",
        }
        return {
            "patch_embed.proj": "stem",
            "norm": "norm",
            "head": "head",
            **{
                f"blocks.{i}.{theirs}": f"blocks_{i}/{ours}"
                for i in range(self.depth)
                for theirs, ours in modules.items()
            },
        }
