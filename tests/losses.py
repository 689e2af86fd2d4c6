"""Losses and their networks for the tests of the two phases, by name in `NETWORKS`.

Sizes are such that no two arrays of different meaning have as many elements, so that a test can say
by its size what an array in `saved` is.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from helpers import random
from jax import lax

import lance_jax
from lance_jax import LayerFactors


def mlp_loss(params, x, target):
    """(7, 11) -> (7, 13) -> (7, 17); linear in the logits, so that the loss keeps nothing."""
    h = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = h @ params["head"]["kernel"] + params["head"]["bias"]
    return (logits * target).sum()


def mlp() -> tuple[Any, Any]:
    params = {
        "hidden": {"kernel": random(11, 13), "bias": random(13, seed=1)},
        "head": {"kernel": random(13, 17, seed=2), "bias": random(17, seed=3)},
    }
    return params, (random(7, 11, seed=4), random(7, 17, seed=5))


MLP_FACTORS = {
    "hidden/kernel": LayerFactors(
        {"feature": networks.orthonormal(np.random.default_rng(0), 11, 4)}
    ),
    "head/kernel": LayerFactors({"feature": networks.orthonormal(np.random.default_rng(0), 13, 5)}),
}


def conv_loss(params, x, target):
    dims = ("NHWC", "HWIO", "NHWC")
    for name, stride in (("stem", 2), ("last", 1)):
        layer = params[name]
        x = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=dims
        )
        x = jax.nn.relu(x + layer["bias"])
    logits = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def conv_net():
    def layer(*shape, seed):
        return {"kernel": random(*shape, seed=seed) / 5, "bias": random(shape[-1], seed=seed + 1)}

    params = {
        "stem": layer(3, 3, 3, 12, seed=0),
        "last": layer(1, 1, 12, 16, seed=4),
        "head": layer(16, 10, seed=6),
    }
    return params, (random(16, 20, 20, 3, seed=8), jnp.arange(16) % 10)


def scan_loss(params, x, target):
    """Five scanned layers of 13 features on (7, 13)."""

    def step(x, layer):
        return jax.nn.relu(x @ layer["kernel"] + layer["bias"]), None

    x, _ = lax.scan(step, x, params["layers"])
    return ((x @ params["head"]) * target).sum()


def scan_net():
    params = {
        "layers": {"kernel": random(5, 13, 13) / 3, "bias": random(5, 13, seed=1)},
        "head": random(13, 17, seed=2),
    }
    return params, (random(7, 13, seed=3), random(7, 17, seed=4))


def attention_loss(params, x, target):
    """Pre-norm attention and a GELU layer on (5, 9, 12), heads of (12, 3, 8)."""

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    h = norm(x) * params["scale"]
    q, k, v = (jnp.einsum("ntc,chd->nthd", h, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(8))
    x = x + jnp.einsum("nhts,nshd,hdc->ntc", weights, v, params["out"])
    x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
    logits = x.mean(1) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def attention_net():
    params = {name: random(12, 3, 8, seed=i) / 4 for i, name in enumerate("qkv")}
    params |= {
        "scale": jnp.ones(12),
        "out": random(3, 8, 12, seed=3) / 5,
        "up": random(12, 44, seed=4) / 4,
        "down": random(44, 12, seed=5) / 7,
        "head": random(12, 6, seed=6) / 4,
    }
    return params, (random(5, 9, 12, seed=7), jnp.arange(5))


NETWORKS = {
    "mlp": (mlp_loss, mlp, None),
    "conv": (conv_loss, conv_net, None),
    "scan": (scan_loss, scan_net, 5),
    "attention": (attention_loss, attention_net, None),
}


def factors_for(name, share=0.5, core_dtype=None):
    loss, make, length = NETWORKS[name]
    params, batch = make()
    layers = [layer for layer in lance_jax.layers(loss, params, *batch) if layer.path != "head"]
    return networks.factors_of(layers, share, core_dtype, length)
