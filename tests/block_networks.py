"""Networks made of blocks: as a whole, and block by block for the reference.

`BLOCKED` has one of each kind. `plain` computes the whole network as somebody would write it;
`before`, `block` and `after` are the same in three parts, from which `reference_gradients` builds
the gradients with each block at another input than its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import random
from jax import lax

import lance_jax

BLOCKS = 3
BATCH = 4


class Blocked(NamedTuple):
    before: Callable  # (params, x) -> the first block's input
    block: Callable  # (params of one block, x) -> the next one's input
    after: Callable  # (params, x) -> the network's output
    plain: Callable  # (params, x) -> the network's output
    params: Any  # "block0", "block1", ... beside those of the rest; stacked "blocks" if scanned
    x: jax.Array
    pattern: str = r"block\d"
    scanned: bool = False

    def names(self) -> list[str]:
        return ["blocks"] if self.scanned else [f"block{i}" for i in range(BLOCKS)]

    def of_block(self, params: Any, i: int) -> Any:
        if self.scanned:
            return jax.tree.map(lambda leaf: leaf[i], params["blocks"])
        return params[f"block{i}"]


def blocked(net: Blocked) -> Callable:
    """The whole network, its blocks found by their parameters."""
    return lance_jax.blocks(net.plain, net.pattern)


def _conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _layer_norm(params, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * params["scale"]


def _chain(block):
    def plain(before, after):
        def apply(params, x):
            x = before(params, x)
            for i in range(BLOCKS):
                x = block(params[f"block{i}"], x)
            return after(params, x)

        return apply

    return plain


def _drawn(shapes: dict, scanned: bool = False) -> dict:
    def one(seed):
        return {
            name: 1 + random(*shape, seed=seed + j) / 9
            if name == "scale"
            else random(*shape, seed=seed + j) * np.prod(shape[:-1]) ** -0.5
            for j, (name, shape) in enumerate(shapes.items())
        }

    blocks = {f"block{i}": one(100 * i) for i in range(BLOCKS)}
    if scanned:
        return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks.values())}
    return blocks


def _residual_block(params, x):
    h = jax.nn.relu(_conv(x, params["conv1"]))
    return jax.nn.relu(x + _conv(h, params["conv2"]))


def _plain_block(params, x):
    return jax.nn.relu6(_conv(x, params["conv"]))


def _transformer_block(params, x):
    h = _layer_norm(params["norm"], x)
    q, k, v = (jnp.einsum("ntc,chd->nthd", h, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k))
    x = x + jnp.einsum("nthd,hdc->ntc", jnp.einsum("nhts,nshd->nthd", weights, v), params["out"])
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def _scanned_block(params, x):
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def _stem(params, x):
    return jax.nn.relu(_conv(x, params["stem"]["kernel"]))


def _embed(params, x):
    return jnp.tanh(x @ params["stem"]["kernel"])


def _pooled_head(params, x):
    return x.mean(tuple(range(1, x.ndim - 1))) @ params["head"]["kernel"]


def _scan(before, after):
    def apply(params, x):
        def step(x, block):
            return _scanned_block(block, x), None

        return after(params, lax.scan(step, before(params, x), params["blocks"])[0])

    return apply


def _with_ends(blocks, stem, features):
    return blocks | {
        "stem": {"kernel": random(*stem, seed=900) * np.prod(stem[:-1]) ** -0.5},
        "head": {"kernel": random(features, 3, seed=901) * features**-0.5},
    }


def _convolutional(block, shapes):
    params = _with_ends(_drawn(shapes), (3, 3, 2, 8), 8)
    plain = _chain(block)(_stem, _pooled_head)
    return Blocked(_stem, block, _pooled_head, plain, params, random(BATCH, 6, 5, 2, seed=7))


_TRANSFORMER = {name: (8, 2, 4) for name in "qkv"} | {"out": (2, 4, 8), "up": (8, 16)}
_FEED_FORWARD = {"up": (8, 16), "down": (16, 8)}


def _transformer():
    blocks = _drawn(_TRANSFORMER | {"down": (16, 8)})
    for i in range(BLOCKS):
        blocks[f"block{i}"]["norm"] = {"scale": 1 + random(8, seed=300 + i) / 9}
    params = _with_ends(blocks, (5, 8), 8)
    plain = _chain(_transformer_block)(_embed, _pooled_head)
    x = random(BATCH, 6, 5, seed=7)
    return Blocked(_embed, _transformer_block, _pooled_head, plain, params, x)


BLOCKED = {
    "convolution": _convolutional(_plain_block, {"conv": (3, 3, 8, 8)}),
    "residual": _convolutional(_residual_block, {"conv1": (3, 3, 8, 8), "conv2": (3, 3, 8, 8)}),
    "transformer": _transformer(),
    "scan": Blocked(
        _embed,
        _scanned_block,
        _pooled_head,
        _scan(_embed, _pooled_head),
        _with_ends(_drawn(_FEED_FORWARD, scanned=True), (5, 8), 8),
        random(BATCH, 6, 5, seed=7),
        pattern="^blocks",
        scanned=True,
    ),
}


def loss_of(apply_fn):
    """A loss with a curvature."""
    return lambda params, x: jnp.sum(jnp.sin(apply_fn(params, x)))


def block_inputs(net: Blocked, params: Any, x: jax.Array) -> list[jax.Array]:
    """What enters each block, and then what leaves the last."""
    inputs = [net.before(params, x)]
    for i in range(BLOCKS):
        inputs.append(net.block(net.of_block(params, i), inputs[-1]))
    return inputs


def reference_gradients(net: Blocked, kept: Callable[[jax.Array, int], jax.Array]) -> Any:
    """Gradients in float64 with each block's vjp taken at kept(its input, its number)."""
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (net.params, net.x))
        *inputs, last = block_inputs(net, params, x)
        _, vjp = jax.vjp(loss_of(net.after), params, last)
        grads, dx = vjp(jnp.ones(()))
        of_blocks = []
        for i in reversed(range(BLOCKS)):
            _, vjp = jax.vjp(net.block, net.of_block(params, i), kept(inputs[i], i))
            grad, dx = vjp(dx)
            of_blocks.insert(0, grad)
        _, vjp = jax.vjp(net.before, params, x)
        grads = jax.tree.map(jnp.add, grads, vjp(dx)[0])
        if net.scanned:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *of_blocks)
            return jax.device_get({**grads, "blocks": stacked})
        return jax.device_get(grads | {f"block{i}": grad for i, grad in enumerate(of_blocks)})
