"""Blocks of networks that were not written for them: found, recomputed, and all else as it was."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import assert_close, assert_equal, random, saved_of

import lance_jax
from lance_jax import LayerFactors

WHOLE = LayerFactors({})
TOKENS, PICTURES = random(3, 6, 8), random(2, 8, 8, 3)

pytestmark = [
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the frameworks' own
]

# Each gives (apply_fn, params, x, names of the blocks); the blocks are found already.


class Feed(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


def linen_remat():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            for i in range(2):
                x = nn.remat(Feed)(name=f"feed_{i}")(x)
            return nn.Dense(5)(x.mean(1))

    net = Net()
    params = net.init(jax.random.key(0), TOKENS)
    return net.apply, params, TOKENS, ["params/feed_0", "params/feed_1"]


def linen_scan():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Feed(name="feed")(x), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(8)(x))
            steps = nn.scan(
                nn.remat(Step), length=3, variable_axes={"params": 0}, split_rngs={"params": True}
            )
            x, _ = steps(name="steps")(x, None)
            return nn.Dense(5)(x.mean(1))

    net = Net()
    return net.apply, net.init(jax.random.key(0), TOKENS), TOKENS, ["params/steps/feed"]


def nnx_network():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, 8, rngs=rngs, decode=False)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            x = x + self.attend(self.norm(x))
            return x + self.down(nnx.gelu(self.up(x)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Linear(8, 8, rngs=rngs)
            self.encoder = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, x):
            x = jnp.tanh(self.stem(x))
            for block in self.encoder:
                x = block(x)
            return self.head(x.mean(1))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    blocked = lance_jax.blocks(apply_fn, r"encoder/\d")
    return blocked, params, TOKENS, ["encoder/0", "encoder/1"]


def equinox_network():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        one: eqx.nn.Conv2d
        two: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm

        def __init__(self, key):
            keys = jax.random.split(key)
            self.one = eqx.nn.Conv2d(6, 6, 3, padding=1, key=keys[0])
            self.two = eqx.nn.Conv2d(6, 6, 3, padding=1, key=keys[1])
            self.norm = eqx.nn.GroupNorm(2, 6)

        def __call__(self, x):
            return jax.nn.relu(x + self.two(jax.nn.relu(self.norm(self.one(x)))))

    class Net(eqx.Module):
        stem: eqx.nn.Conv2d
        stages: list
        head: eqx.nn.Linear

        def __init__(self, key):
            stem, *stages, head = jax.random.split(key, 4)
            self.stem = eqx.nn.Conv2d(3, 6, 3, padding=1, key=stem)
            self.stages = [Block(stage) for stage in stages]
            self.head = eqx.nn.Linear(6, 5, key=head)

        def __call__(self, x):  # one picture, channels first
            x = jnp.tanh(self.stem(x))
            for stage in self.stages:
                x = stage(x)
            return self.head(x.mean((1, 2)))

    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x.transpose(0, 3, 1, 2))

    blocked = lance_jax.blocks(apply_fn, r"stages/\d")
    return blocked, params, PICTURES, ["stages/0", "stages/1"]


def haiku_network():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jnp.tanh(hk.Linear(8, name="stem")(x))
        for i in range(2):
            attend = hk.MultiHeadAttention(
                2, 4, w_init=hk.initializers.VarianceScaling(), model_size=8, name=f"block{i}_mix"
            )
            h = hk.LayerNorm(-1, True, True, name=f"block{i}_norm")(x)
            x = x + attend(h, h, h)
            x = x + hk.Linear(8, name=f"block{i}_out")(jax.nn.gelu(x))
        return hk.Linear(5, name="head")(x.mean(1))

    net = hk.without_apply_rng(hk.transform(forward))
    blocked = lance_jax.blocks(net.apply, r"block\d")
    return blocked, net.init(jax.random.key(0), TOKENS), TOKENS, ["block0", "block1"]


def keras_encoder():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="it comes with the extra `frameworks`")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
    layers = keras.layers
    inputs = keras.Input(TOKENS.shape[1:])
    x = layers.Dense(8, activation="tanh", name="stem")(inputs)
    for i in range(2):
        h = layers.LayerNormalization(name=f"encoder_{i}_norm1")(x)
        x = x + layers.MultiHeadAttention(2, 4, name=f"encoder_{i}_attention")(h, h)
        h = layers.LayerNormalization(name=f"encoder_{i}_norm2")(x)
        h = layers.Dense(16, activation="gelu", name=f"encoder_{i}_up")(h)
        x = x + layers.Dense(8, name=f"encoder_{i}_down")(h)
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(5, name="head")(x))
    variables = model.trainable_variables
    rest = [v.value for v in model.non_trainable_variables]

    def apply_fn(params, x):
        return model.stateless_call([params[v.path] for v in variables], rest, x)[0]

    params = {v.path: v.value for v in variables}
    blocked = lance_jax.blocks(apply_fn, r"encoder_\d")
    return blocked, params, TOKENS, ["encoder_0", "encoder_1"]


NETWORKS = {
    "linen remat": linen_remat,
    "linen scan": linen_scan,
    "nnx": nnx_network,
    "equinox": equinox_network,
    "haiku": haiku_network,
    "keras": keras_encoder,
}


def loss_of(apply_fn):
    return lambda params, x: jnp.sum(jnp.sin(apply_fn(params, x)))


@pytest.mark.parametrize("name", NETWORKS)
def test_framework(name):
    apply_fn, params, x, names = NETWORKS[name]()
    found = [layer for layer in lance_jax.layers(apply_fn, params, x) if layer.kind == "block"]
    assert [layer.path for layer in found] == names
    want = jax.jit(jax.grad(loss_of(apply_fn)))(params, x)

    whole = lance_jax.compress(apply_fn, dict.fromkeys(names, WHOLE))
    assert_equal(jax.jit(whole)(params, x), jax.jit(apply_fn)(params, x))
    assert_close(jax.jit(jax.grad(loss_of(whole)))(params, x), want)

    select = [f"^{name}$" for name in names]
    full = lance_jax.calibrate(apply_fn, params, [x], select=select, energy=1.0)
    got = jax.jit(jax.grad(loss_of(lance_jax.compress(apply_fn, full))))(params, x)
    assert_close(got, want, rtol=1e-3, atol=1e-4)

    own = lance_jax.calibrate(apply_fn, params, [x], select=select, energy=0.7, core_dtype="int8")
    fast = lance_jax.compress(apply_fn, own)
    assert_equal(jax.jit(fast)(params, x), jax.jit(apply_fn)(params, x))
    report = lance_jax.report(loss_of(apply_fn), params, x, factors=own)
    assert report.saved_bytes.total == sum(a.nbytes for a in saved_of(loss_of(fast), params, x))
    exact = lance_jax.report(loss_of(apply_fn), params, x, factors=dict.fromkeys(names, WHOLE))
    for cut, kept in zip(report.layers, exact.layers, strict=True):
        assert cut.path not in names or 0 < cut.bytes < 0.4 * kept.bytes
