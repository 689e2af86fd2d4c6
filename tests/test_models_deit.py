"""DeiT from a state dict in timm's layout against plain float64."""

import jax
import numpy as np
from scipy.special import erf

from lance_jax.models import weights
from tests.pretrained import Reference, imagenet_normalized, pictures
from tests.tolerances import assert_close


def attention(file, x, name, heads):
    n, tokens, width = x.shape
    qkv = file.dense(x, f"{name}.qkv", 3 * width).reshape(n, tokens, 3, heads, width // heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ v
    return file.dense(mixed.swapaxes(1, 2).reshape(x.shape), f"{name}.proj", width)


def block(file, x, name, heads):
    width = x.shape[-1]
    x = x + attention(file, file.layer_norm(x, f"{name}.norm1"), f"{name}.attn", heads)
    y = file.dense(file.layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1", 4 * width)
    y = 0.5 * y * (1 + erf(y / np.sqrt(2)))
    return x + file.dense(y, f"{name}.mlp.fc2", width)


def reference(file, x, patch, width, depth, heads):
    """Logits of 7 classes."""
    x = file.conv(imagenet_normalized(x), "patch_embed.proj", width, patch, patch, 0, bias=True)
    x = x.reshape(len(x), -1, width)
    first = np.repeat(file.tensor("cls_token", (1, 1, width)), len(x), axis=0)
    x = np.concatenate([first, x], axis=1)
    x = x + file.tensor("pos_embed", (1, x.shape[1], width))
    for i in range(depth):
        x = block(file, x, f"blocks.{i}", heads)
    return file.dense(file.layer_norm(x, "norm")[:, 0], "head", 7)


def test_logits_equal_the_reference(tmp_path, exact_products):
    sizes = {"patch": 4, "width": 12, "depth": 3, "heads": 3}
    file, x = Reference(), pictures(2, 16)
    logits = reference(file, x, **sizes)
    path = file.save(tmp_path / "file.safetensors", kind="deit", resolution=16, **sizes)
    network, variables = weights.load(path)
    assert_close(jax.jit(network.apply)(variables, x), logits)
    assert set(weights.keys(network)) == set(file.tensors)


def test_the_published_size():
    """Parameters of timm's deit_tiny_patch16_224 with 1000 classes."""
    network = weights.MODELS["deit_tiny_patch16_224"].clone(classes=1000)
    params = weights.network.shapes(network)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 5_717_416
