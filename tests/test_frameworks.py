"""Haiku, Equinox and Keras networks, with no adapter; each where it is installed."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import lance_jax

# The frameworks' own deprecations are not ours to fix.
pytestmark = [
    pytest.mark.usefixtures("exact_products"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def need(name):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: it comes with the extra `frameworks`")


def picture_batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), "float32")


def haiku_network():
    need("haiku")
    import haiku as hk

    def forward(x):
        x = jax.nn.relu(hk.Conv2D(6, 3, stride=2, name="stem")(x))
        x = jax.nn.relu(hk.Conv2D(8, 1, name="body")(x))
        return hk.Linear(5, name="head")(x.mean((1, 2)))

    model, x = hk.without_apply_rng(hk.transform(forward)), picture_batch()
    return model.apply, model.init(jax.random.key(0), x), x, ["stem/w", "body/w", "head/w"]


def haiku_scanned_network():
    need("haiku")
    import haiku as hk

    def forward(x):
        stack = hk.layer_stack(3, name="stack")
        x = stack(lambda x: jax.nn.relu(hk.Linear(7, name="linear")(x)))(x)
        return hk.Linear(5, name="head")(x)

    model = hk.without_apply_rng(hk.transform(forward))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 7)), "float32")
    return model.apply, model.init(jax.random.key(0), x), x, ["linear/w", "head/w"]


def equinox_network():
    need("equinox")
    import equinox as eqx

    class Model(eqx.Module):
        stem: eqx.nn.Conv2d
        body: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.stem = eqx.nn.Conv2d(3, 6, 3, stride=2, padding=1, key=keys[0])
            self.body = eqx.nn.Conv2d(6, 8, 1, key=keys[1])
            self.head = eqx.nn.Linear(8, 5, key=keys[2])

        def __call__(self, x):  # one picture, channels first
            x = jax.nn.relu(self.body(jax.nn.relu(self.stem(x))))
            return self.head(x.mean((1, 2)))

    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)

    def apply_fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x.transpose(0, 3, 1, 2))

    return apply_fn, params, picture_batch(), ["stem/weight", "body/weight", "head/weight"]


def keras_network():
    need("keras")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {keras.backend.backend()}; set KERAS_BACKEND=jax")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(6, 3, strides=2, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 1, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    rest = [v.value for v in model.non_trainable_variables]

    def apply_fn(params, x):
        return model.stateless_call(params, rest, x, training=True)[0]

    # Keras gives its parameters as a list: the kernels are those of two and more dimensions.
    params = [v.value for v in model.trainable_variables]
    return apply_fn, params, picture_batch(), [str(i) for i, p in enumerate(params) if p.ndim > 1]


NETWORKS = {
    "haiku": haiku_network,
    "haiku layer_stack": haiku_scanned_network,
    "equinox": equinox_network,
    "keras": keras_network,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_framework(name):
    apply_fn, params, x, ends = NETWORKS[name]()
    found = lance_jax.layers(apply_fn, params, x)
    assert len(found) == len(ends)
    for layer, end in zip(found, ends, strict=True):
        assert layer.path.endswith(end)
    assert tuple(found.skipped) == ()

    scanned = networks.factors_of([x for x in found if "stack" in x.path], length=3)
    others = networks.factors_of([x for x in found if "stack" not in x.path])
    factors = lance_jax.Factors({**scanned, **others})
    fast = lance_jax.compress(apply_fn, factors)
    np.testing.assert_array_equal(jax.jit(fast)(params, x), jax.jit(apply_fn)(params, x))

    def gradients(f):
        def loss(params, x):
            y = f(params, x)
            return (y * jnp.cos(y)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    (got, got_dx), (want, want_dx) = gradients(fast), gradients(apply_fn)
    np.testing.assert_allclose(got_dx, want_dx, rtol=1e-4, atol=2e-5)
    kinds = {layer.path: layer.kind for layer in found}
    for (key, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        if path in kinds:
            assert 0.05 < float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w)) < 1.5
        if kinds.get(path) == "dense" and w.ndim == 2:
            # The projection of the plain gradient, whichever axis of the kernel is the input's.
            u = factors[path].bases["feature"]
            w = u @ u.T @ w if len(w) == len(u) else w @ u @ u.T
        if path not in kinds or (kinds[path] == "dense" and w.ndim == 2):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-5)
