"""`compress` changes weight gradients and nothing else, in any framework and transformation."""

from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import pytest
from flax import nnx
from helpers import assert_close, assert_equal, feature, orthonormal, random

import lance_jax

pytestmark = pytest.mark.usefixtures("exact_products")


# --- the matrix of frameworks and transformations


def loss_of(apply_fn):
    _, target = networks.batch()
    return lambda params, x: (apply_fn(params, x) * target).sum()


@cache
def reference_gradients(share):
    """Gradients of the network without transformations, at inputs projected without `compress`."""
    with jax.default_matmul_precision("highest"):
        bases = {} if share is None else networks.bases(share)
        x, _ = networks.batch()
        apply_fn = partial(networks.reference, bases)
        return jax.jit(jax.grad(loss_of(apply_fn), (0, 1)))(networks.weights(), x)


@pytest.mark.parametrize("transformation", networks.TRANSFORMATIONS)
@pytest.mark.parametrize("framework", networks.FRAMEWORKS)
def test_matrix(framework, transformation):
    net = networks.network(framework, transformation)
    params = net.pack(networks.weights())
    x, _ = networks.batch()

    found = lance_jax.layers(net.apply, params, x)
    low_rank = net.factors(networks.bases(0.5))
    assert {layer.path for layer in found if layer.kind != "block"} == set(low_rank)
    assert ("remat" in transformation) == any(layer.kind == "block" for layer in found)
    assert tuple(found.skipped) == ()

    fast = lance_jax.compress(net.apply, low_rank)
    assert_equal(jax.jit(fast)(params, x), jax.jit(net.apply)(params, x))

    # Full rank in one row and one column of the matrix, low rank everywhere.
    shares = {0.5: 0.5} | ({1.0: None} if "raw" in framework or transformation == "scan" else {})
    for share, reference in shares.items():
        fast = lance_jax.compress(net.apply, net.factors(networks.bases(share)))
        got, got_dx = jax.jit(jax.grad(loss_of(fast), (0, 1)))(params, x)
        want, want_dx = reference_gradients(reference)
        assert_close(net.unpack(got), want)
        assert_close(got_dx, want_dx)


def test_reference_gradients():
    """The matrix' reference: other gradients than the plain ones in the kernels, and only there."""
    plain, plain_dx = reference_gradients(None)
    low, low_dx = reference_gradients(0.5)
    assert_close(low_dx, plain_dx)
    for path, modes in networks.bases(0.5).items():
        *parents, name = path.split("/")
        got, want = low, plain
        for key in parents:
            got, want = got[key], want[key]
        assert_close(got["bias"], want["bias"])
        difference = jnp.linalg.norm(got[name] - want[name]) / jnp.linalg.norm(want[name])
        assert 0.1 < difference < 1.1
        if set(modes) == {"feature"}:
            u = modes["feature"]
            assert_close(got[name], u @ u.T @ want[name])


# --- what surrounds the layers


class Regularised(nn.Module):
    """Dropout, batch statistics and an auxiliary output around two dense layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x)
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(0.4, deterministic=not train)(x)
        return nn.Dense(3, name="second")(x)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_batch_statistics_auxiliary_outputs_keywords(train):
    model = Regularised()
    x, key = random(8, 5), jax.random.key(3, impl="unsafe_rbg")  # compiles in no time
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]

    def apply_fn(params, stats, x, key, *, train):
        return model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=train,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
        )

    found = lance_jax.layers(apply_fn, params, stats, x, key, train=train)
    assert [layer.path for layer in found] == ["first/kernel", "second/kernel"]
    fast = lance_jax.compress(
        apply_fn, feature({"first/kernel": orthonormal(5, 5), "second/kernel": orthonormal(6, 6)})
    )

    def outputs(f):
        return jax.jit(partial(f, train=train))(params, stats, x, key)

    got, want = outputs(fast), outputs(apply_fn)
    assert set(got[1]) == {"batch_stats", "intermediates"}
    assert_equal(got, want)
    if train:
        assert not jnp.array_equal(got[1]["batch_stats"]["norm"]["mean"], stats["norm"]["mean"])

    def grads(f):
        def loss(params, stats, x, key):
            y, state = f(params, stats, x, key, train=train)
            return (y * jnp.cos(y)).sum(), state

        return jax.jit(jax.grad(loss, has_aux=True))(params, stats, x, key)

    (got, got_state), (want, want_state) = grads(fast), grads(apply_fn)
    assert_close(got, want)
    assert_close(got_state, want_state)


def test_nnx_dropout_and_batch_statistics():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.4, rngs=rngs)
            self.second = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    x = random(8, 5)
    found = lance_jax.layers(apply_fn, params, rest, x)
    fast = lance_jax.compress(apply_fn, networks.factors_of(found, share=1))
    assert len(found) == 2
    assert_equal(jax.jit(fast)(params, rest, x), jax.jit(apply_fn)(params, rest, x))
    got, want = (
        jax.jit(jax.grad(lambda p, f=f: jnp.square(f(p, rest, x)[0]).sum()))(params)
        for f in (fast, apply_fn)
    )
    assert_close(got, want)


@pytest.mark.parametrize("kwargs", [{"train": True}, {"train": False}, {"train": 1, "name": "a"}])
def test_static_keyword_arguments_stay_python_values(kwargs):
    def apply_fn(p, x, *, train, name=None):
        assert isinstance(train, bool | int) and (name is None or isinstance(name, str))
        return (x @ p["w"]) * (2.0 if train else 1.0)

    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    params, x = {"w": random(4, 3)}, random(2, 4)
    assert_equal(fast(params, x, **kwargs), apply_fn(params, x, **kwargs))
    jitted = jax.jit(fast, static_argnames=("train", "name"))
    assert_close(jitted(params, x, **kwargs), apply_fn(params, x, **kwargs))


def test_keyword_arguments_are_differentiable():
    def apply_fn(p, *, x, scale):
        return (x @ p["w"]) * scale

    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 4)}))
    params, x, scale = {"w": random(4, 3)}, random(2, 4), random(3)
    got, want = (
        jax.grad(lambda x, scale, f=f: f(params, x=x, scale=scale).sum(), (0, 1))(x, scale)
        for f in (fast, apply_fn)
    )
    assert_close(got, want)


def test_pytrees_in_and_out():
    def apply_fn(p, data, nothing):
        assert nothing is None
        y = data["x"][0] @ p["w"]
        return {"y": y, "count": data["n"] + 1, "none": None, "static": (jnp.arange(3), [])}

    data = {"x": (random(2, 4), random(1)), "n": jnp.int32(3)}
    params = {"w": random(4, 3)}
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    assert_equal(jax.jit(fast)(params, data, None), jax.jit(apply_fn)(params, data, None))


def test_bf16_activations_with_f32_parameters():
    model = networks.network("raw", "plain")
    params = networks.weights()
    x, _ = networks.batch()

    def apply_fn(params, x):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        return model.apply(half, x.astype(jnp.bfloat16))

    found = lance_jax.layers(apply_fn, params, x)
    assert len(found) == 5  # followed through the casts
    fast = lance_jax.compress(apply_fn, model.factors(networks.bases(1.0)))
    got = jax.jit(fast)(params, x)
    assert got.dtype == jnp.bfloat16
    assert_equal(got, jax.jit(apply_fn)(params, x))

    def loss(f):
        return lambda p, x: (f(p, x).astype(jnp.float32)).sum()

    (got, got_dx), (want, want_dx), (exact, _) = (
        jax.jit(jax.grad(loss(f), (0, 1)))(params, x) for f in (fast, apply_fn, model.apply)
    )
    chex.assert_trees_all_equal_dtypes(got, params)
    assert_equal(got_dx, want_dx)
    for g, w, e in zip(*map(jax.tree.leaves, (got, want, exact)), strict=True):
        # Bases and cores are rounded to bfloat16 too: a few of its steps, as of plain backprop.
        assert jnp.linalg.norm(g - e) <= jnp.linalg.norm(w - e) + 2**-6 * jnp.linalg.norm(e)


def test_module_with_its_own_compute_dtype():
    model = nn.Dense(3, dtype=jnp.bfloat16)
    x = random(4, 6)
    params = model.init(jax.random.key(0), x)["params"]

    def apply_fn(p, x):
        return model.apply({"params": p}, x)

    fast = lance_jax.compress(apply_fn, feature({"kernel": orthonormal(6, 3)}))
    assert_equal(jax.jit(fast)(params, x), jax.jit(apply_fn)(params, x))
    got = jax.jit(jax.grad(lambda p: fast(p, x).astype(jnp.float32).sum()))(params)
    chex.assert_trees_all_equal_dtypes(got, params)
