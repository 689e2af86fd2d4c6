"""One small network in three frameworks under seven transformations, for the tests.

Every form of the network computes the same function of the same weights, so that gradients can be
compared across frameworks and transformations. `weights()` is the common currency; `Network.pack`
turns such a tree (or a gradient, or factors by layer) into what the form takes, `unpack` back.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import lance_jax

BATCH, HEIGHT, WIDTH, CHANNELS, CLASSES, BLOCKS = 4, 5, 6, 8, 3, 2
FRAMEWORKS = ["linen", "nnx", "raw"]
TRANSFORMATIONS = ["plain", "jit", "scan", "remat", "scan+remat", "vmap", "cond"]


class Network(NamedTuple):
    apply: Callable  # (params, x) -> logits
    pack: Callable  # weights -> params
    unpack: Callable  # a tree like params -> a tree like weights
    factors: Callable  # {"block0/conv/kernel": {mode: basis}, ...} -> Factors of this form


def weights() -> dict:
    """Two residual blocks of a convolution and a dense layer, and a head."""
    generator = np.random.default_rng(0)

    def layer(*shape):
        kernel = generator.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        bias = generator.normal(0, 0.1, shape[-1])
        return {"bias": jnp.asarray(bias, "float32"), "kernel": jnp.asarray(kernel, "float32")}

    c = CHANNELS
    blocks = {f"block{i}": {"conv": layer(3, 3, c, c), "dense": layer(c, c)} for i in range(BLOCKS)}
    return blocks | {"head": layer(c, CLASSES)}


def batch() -> tuple[jax.Array, jax.Array]:
    """Inputs, and what the logits are multiplied with to make a loss."""
    generator = np.random.default_rng(1)
    x = generator.normal(0, 1, (BATCH, HEIGHT, WIDTH, CHANNELS))
    target = generator.normal(0, 1, (BATCH, CLASSES))
    return jnp.asarray(x, "float32"), jnp.asarray(target, "float32")


def orthonormal(generator, n: int, r: int) -> jax.Array:
    return jnp.asarray(np.linalg.qr(generator.normal(size=(n, n)))[0][:, :r], "float32")


def bases(share: float, spatial: bool = True) -> dict:
    """Random bases of every layer; `share` of each mode is kept, 1 is full rank."""
    generator = np.random.default_rng(2)

    def some(**modes):
        return {m: orthonormal(generator, n, max(1, round(share * n))) for m, n in modes.items()}

    conv = {"height": HEIGHT, "width": WIDTH} if spatial else {}
    layers = {}
    for i in range(BLOCKS):
        layers[f"block{i}/conv/kernel"] = some(channel=CHANNELS, **conv)
        layers[f"block{i}/dense/kernel"] = some(feature=CHANNELS)
    return layers | {"head/kernel": some(feature=CHANNELS)}


def factors_of(
    layers, share: float = 0.5, core_dtype: str | None = None, length: int | None = None
):
    """Random factors for what `lance_jax.layers` found, in the default modes.

    `length`: the number of scanned layers, for networks whose layers are all scanned.
    """
    generator = np.random.default_rng(3)
    factors = {}
    for layer in layers:
        modes = {m: n for m, n in layer.modes.items() if m not in ("batch", "patch")}
        ranks = {m: max(1, round(share * n)) for m, n in modes.items()}
        factors[layer.path] = lance_jax.LayerFactors(
            {
                m: orthonormal(generator, n, ranks[m])
                if length is None
                else jnp.stack([orthonormal(generator, n, ranks[m]) for _ in range(length)])
                for m, n in modes.items()
            },
            core_dtype=core_dtype,
        )
    return lance_jax.Factors(factors)


def network(framework: str, transformation: str) -> Network:
    scanned = transformation.startswith("scan")
    apply, like, suffix = {"linen": _linen, "nnx": _nnx, "raw": _raw}[framework](transformation)

    def pack(tree):
        return jax.tree.unflatten(like, jax.tree.leaves(_stacked(tree) if scanned else tree))

    def unpack(params):
        tree = jax.tree.unflatten(jax.tree.structure(_layout(scanned)), jax.tree.leaves(params))
        return _unstacked(tree) if scanned else tree

    def factors(layers):
        if scanned:
            layers = _stacked_bases(layers)
        return lance_jax.Factors(
            {path + suffix: lance_jax.LayerFactors(b) for path, b in layers.items()}
        )

    return Network(apply, pack, unpack, factors)


def _layout(scanned):
    return _stacked(weights()) if scanned else weights()


def _stacked(tree):
    blocks = [tree[f"block{i}"] for i in range(BLOCKS)]
    return {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *blocks), "head": tree["head"]}


def _unstacked(tree):
    blocks = {f"block{i}": jax.tree.map(lambda a, i=i: a[i], tree["blocks"]) for i in range(BLOCKS)}
    return blocks | {"head": tree["head"]}


def _stacked_bases(layers):
    stacked = {}
    for name in ("conv", "dense"):
        each = [layers[f"block{i}/{name}/kernel"] for i in range(BLOCKS)]
        stacked[f"blocks/{name}/kernel"] = jax.tree.map(lambda *a: jnp.stack(a), *each)
    return stacked | {"head/kernel": layers["head/kernel"]}


def _predicate(x):
    return jnp.isfinite(x.sum())  # true, and the compiler cannot know


def reference(bases, params, x):
    """The plain network; its weight gradients are taken at the projected inputs."""
    for i in range(BLOCKS):
        layers = params[f"block{i}"]
        of = {name: bases.get(f"block{i}/{name}/kernel", {}) for name in layers}
        y = jax.nn.relu(_at_projection(conv, of["conv"], layers["conv"], x))
        x = x + _at_projection(dense, of["dense"], layers["dense"], y)
    return _at_projection(dense, bases.get("head/kernel", {}), params["head"], x.mean((1, 2)))


def _at_projection(layer, bases, p, x):
    """layer(p, x), differentiated for x as it is and for the kernel at x's projection."""
    axes = {"height": 1, "width": 2, "channel": -1, "feature": -1}
    z = x
    for mode, u in bases.items():
        z = jnp.moveaxis(jnp.tensordot(z, u @ u.T, (axes[mode], 0)), -1, axes[mode])
    frozen, z = lax.stop_gradient((p["kernel"], z))
    zero = jnp.zeros_like(p["bias"])
    of_kernel = layer({"kernel": p["kernel"], "bias": zero}, z)
    exact = layer({"kernel": frozen, "bias": p["bias"]}, x)
    return exact + (of_kernel - lax.stop_gradient(of_kernel))


# --- raw functions


def conv(p, x):
    y = lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def block(p, x):
    return x + dense(p["dense"], jax.nn.relu(conv(p["conv"], x)))


def _raw(transformation):
    def apply(params, x):
        if transformation.startswith("scan"):
            body = jax.checkpoint(block) if "remat" in transformation else block
            x, _ = lax.scan(lambda x, p: (body(p, x), None), x, params["blocks"])
        else:
            once = {
                "plain": block,
                "jit": jax.jit(block),
                "remat": jax.checkpoint(block),
                "vmap": lambda p, x: jax.vmap(lambda x: block(p, x[None])[0])(x),
                "cond": lambda p, x: lax.cond(_predicate(x), block, lambda p, x: x, p, x),
            }[transformation]
            for i in range(BLOCKS):
                x = once(params[f"block{i}"], x)
        return dense(params["head"], x.mean((1, 2)))

    return apply, jax.tree.structure(_layout(transformation.startswith("scan"))), ""


# --- Linen


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(CHANNELS, (3, 3), name="conv")(x))
        return x + nn.Dense(CHANNELS, name="dense")(y)


class LinenNetwork(nn.Module):
    transformation: str

    @nn.compact
    def __call__(self, x):
        if self.transformation.startswith("scan"):
            block = nn.remat(LinenBlock) if "remat" in self.transformation else LinenBlock
            scan = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=BLOCKS,
            )
            x, _ = scan(block(name="blocks"), x, None)
        for i in range(0 if self.transformation.startswith("scan") else BLOCKS):
            x = self.once(f"block{i}", x)
        return nn.Dense(CLASSES, name="head")(x.mean((1, 2)))

    def once(self, name, x):
        match self.transformation:
            case "jit":
                return nn.jit(LinenBlock)(name=name)(x)
            case "remat":
                return nn.remat(LinenBlock)(name=name)(x)
            case "vmap":
                over_batch = nn.vmap(
                    LinenBlock, variable_axes={"params": None}, split_rngs={"params": False}
                )
                return over_batch(name=name)(x[:, None])[:, 0]
            case "cond":
                module = LinenBlock(name=name)
                return nn.cond(_predicate(x), lambda m, x: m(x), lambda m, x: x, module, x)
            case _:
                return LinenBlock(name=name)(x)


def _linen(transformation):
    model = LinenNetwork(transformation)
    structure = jax.tree.structure(_layout(transformation.startswith("scan")))
    return lambda params, x: model.apply({"params": params}, x), structure, ""


# --- NNX


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(CHANNELS, CHANNELS, (3, 3), rngs=rngs)
        self.dense = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)

    def __call__(self, x):
        return x + self.dense(nnx.relu(self.conv(x)))


class NNXNetwork(nnx.Module):
    def __init__(self, transformation, rngs):
        self.transformation = transformation
        if transformation.startswith("scan"):
            self.blocks = nnx.vmap(NNXBlock)(rngs.split(BLOCKS))
        else:
            for i in range(BLOCKS):
                setattr(self, f"block{i}", NNXBlock(rngs))
        self.head = nnx.Linear(CHANNELS, CLASSES, rngs=rngs)

    def __call__(self, x):
        if self.transformation.startswith("scan"):

            def call(x, block):
                return block(x)

            once = nnx.remat(call) if "remat" in self.transformation else call
            x = nnx.scan(once, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        else:
            for i in range(BLOCKS):
                x = self.once(getattr(self, f"block{i}"), x)
        return self.head(x.mean((1, 2)))

    def once(self, block, x):
        match self.transformation:
            case "jit":
                return nnx.jit(lambda block, x: block(x))(block, x)
            case "remat":
                return nnx.remat(lambda block, x: block(x))(block, x)
            case "vmap":
                return nnx.vmap(lambda block, x: block(x[None])[0], in_axes=(None, 0))(block, x)
            case "cond":
                return nnx.cond(_predicate(x), lambda b, x: b(x), lambda b, x: x, block, x)
            case _:
                return block(x)


def _nnx(transformation):
    graph, state = nnx.split(nnx.eval_shape(lambda: NNXNetwork(transformation, nnx.Rngs(0))))
    return lambda state, x: nnx.merge(graph, state)(x), jax.tree.structure(state), "/value"
