"""`value_and_grad` in two phases: equal to jax's own, with frozen parameters and without."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, nbytes, random, saved_of
from jax import lax
from losses import MLP_FACTORS, NETWORKS, factors_for, mlp, mlp_loss

import lance_jax
from lance_jax import Factors

pytestmark = pytest.mark.usefixtures("exact_products")


# --- equal to jax.value_and_grad


@pytest.mark.parametrize(
    ("name", "compressed"),
    [(name, True) for name in NETWORKS] + [("mlp", False), ("conv", False), ("scan", False)],
    ids=lambda value: {True: "compressed", False: "plain"}.get(value, value),
)
def test_equals_jax(name, compressed):
    loss, make, _ = NETWORKS[name]
    params, batch = make()
    if compressed:
        loss = lance_jax.compress(loss, factors_for(name))
    vg = lance_jax.value_and_grad(loss)
    want = jax.jit(jax.value_and_grad(loss))(params, *batch)
    assert_close(vg(params, *batch), want)
    value, saved = vg.forward(params, *batch)
    assert_close((value, vg.backward(saved, params, *batch)), want)


def test_gradient_is_at_the_arguments_given():
    """Nothing of the first call lives on: other parameters and another batch, other gradients."""
    vg = lance_jax.value_and_grad(mlp_loss)
    params, batch = mlp()
    vg(params, *batch)
    params = jax.tree.map(lambda a: a + 0.1, params)
    batch = (batch[0] * 2, batch[1] - 1)
    assert_close(vg(params, *batch), jax.value_and_grad(mlp_loss)(params, *batch))
    smaller = (batch[0][:3], batch[1][:3])
    assert_close(vg(params, *smaller), jax.value_and_grad(mlp_loss)(params, *smaller))


def test_two_steps_in_flight():
    """`saved` holds the state, the object none: phases of two batches may interleave."""
    vg = lance_jax.value_and_grad(mlp_loss)
    params, (x, target) = mlp()
    batches = [(x, target), (x + 1, target * 2)]
    saved = [vg.forward(params, *batch)[1] for batch in batches]
    for one, batch in zip(saved, batches, strict=True):
        want = jax.grad(mlp_loss)(params, *batch)
        assert_close(vg.backward(one, params, *batch), want)


def test_value_that_is_a_residual():
    """exp's output is its own residual, a constant loss has none, an identity keeps its input."""
    for loss in (
        lambda p, x: jnp.exp((p["w"] * x).sum()),
        lambda p, x: (p["w"] * 0 + x).sum(),
        lambda p, x: jnp.float32(3),
        lambda p, x: p["w"][0],
        lambda p, x: (p["w"] * p["w"]).sum(),
    ):
        params, x = {"w": random(4) / 3}, random(4, seed=1)
        assert_close(lance_jax.value_and_grad(loss)(params, x), jax.value_and_grad(loss)(params, x))


def test_auxiliary_output():
    def loss(params, x, target):
        h = jax.nn.relu(x @ params["hidden"]["kernel"])
        aux = {"h": h, "params": params, "x": x, "count": jnp.int32(3), "none": None, "flag": True}
        return (h.sum() * target).sum(), aux

    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = vg(params, x, target)
    (want, want_aux), want_grads = jax.value_and_grad(loss, has_aux=True)(params, x, target)
    assert_close((value, grads), (want, want_grads))
    assert_close(aux, want_aux)
    (value, aux), saved = vg.forward(params, x, target)
    assert_close((value, aux), (want, want_aux))
    assert_close(vg.backward(saved, params, x, target), want_grads)


@pytest.mark.parametrize("train", [True, False])
def test_keyword_arguments(train):
    def loss(params, x, *, target, train, key=None):
        assert train is True or train is False
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        return mlp_loss(params, x, target)

    params, (x, target) = mlp()
    kwargs = {"target": target, "train": train, "key": jax.random.key(0) if train else None}
    vg = lance_jax.value_and_grad(loss)
    want = jax.value_and_grad(loss)(params, x, **kwargs)
    assert_close(vg(params, x, **kwargs), want)
    value, saved = vg.forward(params, x, **kwargs)
    assert_close((value, vg.backward(saved, params, x, **kwargs)), want)


def test_batch_is_any_pytree():
    def loss(params, batch):
        return mlp_loss(params, batch["image"], batch["more"][0]) * batch["weight"]

    params, (x, target) = mlp()
    batch = {"image": np.asarray(x), "more": (target, None), "weight": 0.5, "id": jnp.arange(7)}
    assert_close(
        lance_jax.value_and_grad(loss)(params, batch), jax.value_and_grad(loss)(params, batch)
    )


def test_inside_jit():
    params, batch = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(mlp_loss, Factors(MLP_FACTORS)))
    assert_close(jax.jit(vg)(params, *batch), vg(params, *batch))

    @jax.jit
    def phases(params, *batch):
        value, saved = vg.forward(params, *batch)
        return value, vg.backward(saved, params, *batch)

    assert_close(phases(params, *batch), vg(params, *batch))


def test_inside_jit_closing_over_a_tracer():
    params, (x, target) = mlp()

    @jax.jit
    def step(params, x, scale):
        return lance_jax.value_and_grad(lambda p, x: mlp_loss(p, x, target) * scale)(params, x)

    want = jax.value_and_grad(lambda p, x: mlp_loss(p, x, target) * 2.0)(params, x)
    assert_close(step(params, x, 2.0), want)


def test_inside_vmap_and_scan():
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)

    def one(x, target):
        return vg(params, x[None], target[None])

    got = jax.jit(jax.vmap(one))(x, target)
    want = jax.vmap(lambda x, t: jax.value_and_grad(mlp_loss)(params, x[None], t[None]))(x, target)
    assert_close(got, want)
    got = jax.jit(lambda: lax.map(lambda batch: one(*batch), (x, target)))()
    assert_close(got, want)


def test_second_call_does_not_retrace():
    traces = 0

    def loss(params, x, target):
        nonlocal traces
        traces += 1
        return mlp_loss(params, x, target)

    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(loss, Factors(MLP_FACTORS)))
    vg(params, x, target)
    first = traces
    assert first > 0
    with jax.log_compiles(False):
        for scale in (2, 3):
            params = jax.tree.map(lambda a, scale=scale: a * scale, params)
            vg(params, x + scale, target)
            _, saved = vg.forward(params, x - scale, target)
            vg.backward(saved, params, x - scale, target)
    assert traces == first


def test_a_change_of_jax_settings_traces_again():
    """The precision of products is read while tracing, like the shapes of the arguments."""
    seen = []

    def loss(p, x):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.sum(x @ p["w"])

    vg = lance_jax.value_and_grad(loss)
    for precision in ("float32", "bfloat16", "float32"):
        with jax.default_matmul_precision(precision):
            vg({"w": random(4, 3)}, random(2, 4))
    assert seen == ["float32", "bfloat16"]


def test_a_constant_loss():
    value, grads = lance_jax.value_and_grad(lambda p: 3.0)({"w": jnp.ones(2)})
    assert value == 3 and value.dtype == jnp.float32
    np.testing.assert_array_equal(grads["w"], [0, 0])


def test_second_call_does_not_compile(caplog):
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)
    steps = [
        (jax.block_until_ready(jax.tree.map(lambda a, i=i: a * i, params)), x * i) for i in (1, 2)
    ]

    def compilations(params, x):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            jax.block_until_ready(vg(params, x, target))
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    assert compilations(*steps[0])
    assert compilations(*steps[1]) == []


# --- trainable and frozen


TRAINABLE = {
    "regex": "head",
    "anchored regex": "^head/",
    "callable": lambda path: path.startswith("head/"),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_frozen_layers_cost_nothing(name):
    params, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=TRAINABLE[name])
    value, grads = vg(params, *batch)
    want_value, want = jax.value_and_grad(mlp_loss)(params, *batch)
    assert_close(value, want_value)
    assert_close(grads, {"hidden": {"kernel": None, "bias": None}, "head": want["head"]})
    saved = saved_of(mlp_loss, params, *batch, trainable=TRAINABLE[name])
    assert nbytes(saved) == 7 * 13 * 4  # the head's input alone


def test_bias_only_keeps_masks_only():
    params, batch = mlp()
    loss = lance_jax.compress(mlp_loss, Factors({}))
    vg = lance_jax.value_and_grad(loss, trainable="bias")
    _, grads = vg(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    for layer in params:
        assert grads[layer]["kernel"] is None
        assert_close(grads[layer]["bias"], want[layer]["bias"])
    saved = saved_of(loss, params, *batch, trainable="bias")
    assert nbytes(saved) == math.ceil(7 * 13 / 8)


def test_list_of_expressions():
    params, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=["head/bias", "hidden/k"])
    _, grads = vg(params, *batch)
    assert grads["head"]["kernel"] is None and grads["hidden"]["bias"] is None
    want = jax.grad(mlp_loss)(params, *batch)
    assert_close(grads["hidden"]["kernel"], want["hidden"]["kernel"])
    assert_close(grads["head"]["bias"], want["head"]["bias"])


def test_frozen_suffix_is_passed_through():
    """A trainable first layer below a frozen one: exact gradient, no input of the frozen one."""
    params, batch = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(mlp_loss, Factors({})), trainable="hidden")
    _, grads = vg(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    assert_close(grads, {"hidden": want["hidden"], "head": {"kernel": None, "bias": None}})
    _, saved = vg.forward(params, *batch)
    assert nbytes(jax.tree.leaves(saved)) == math.ceil(7 * 13 / 8)


def test_integer_leaves_are_frozen():
    params, batch = mlp()
    params["steps"] = jnp.int32(3)
    params["flags"] = jnp.array([True, False])

    def loss(params, x, target):
        scale = jnp.where(params["flags"][0], params["steps"], 0)
        return mlp_loss(params, x, target) * scale.astype(x.dtype)

    vg = lance_jax.value_and_grad(loss)
    _, grads = vg(params, *batch)
    assert grads["steps"] is None and grads["flags"] is None
    want = jax.grad(mlp_loss)({k: params[k] for k in ("hidden", "head")}, *batch)
    assert_close({k: grads[k] for k in want}, jax.tree.map(lambda a: 3 * a, want))
    trainable, frozen = vg.partition(params)
    assert trainable["steps"] is None and int(frozen["steps"]) == 3


def test_partition_and_merge():
    params, _ = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable="bias$")
    trainable, frozen = vg.partition(params)
    for layer in params:
        assert trainable[layer]["kernel"] is None and frozen[layer]["bias"] is None
        assert trainable[layer]["bias"] is params[layer]["bias"]
        assert frozen[layer]["kernel"] is params[layer]["kernel"]
    merged = vg.merge(trainable, frozen)
    chex.assert_trees_all_equal_structs(merged, params)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(merged), jax.tree.leaves(params)))


def test_partition_of_other_trees():
    """Tuples, named tuples and None among the parameters keep their places."""
    params = {"a": (random(3), None, [random(2)]), "b": random(2)}
    vg = lance_jax.value_and_grad(lambda p: p["b"].sum() + p["a"][0].sum(), trainable="a/0")
    trainable, frozen = vg.partition(params)
    assert jax.tree.map(jnp.shape, trainable) == {"a": ((3,), None, [None]), "b": None}
    chex.assert_trees_all_equal(vg.merge(trainable, frozen), params)
    _, grads = vg(params)
    assert_close(grads, {"a": (jnp.ones(3), None, [None]), "b": None})


def test_nnx_state():

    model = nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state)(x)).sum()

    x = random(6, 4)
    vg = lance_jax.value_and_grad(loss, trainable="1/kernel")
    _, grads = vg(state, x)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    (path,) = leaves
    assert "1/kernel" in path
    want = jax.grad(loss)(state, x)
    kernel = [leaf for leaf in jax.tree.leaves(want) if leaf.shape == (5, 3)]
    assert_close(leaves[path], kernel[0])
    trainable, frozen = vg.partition(state)
    chex.assert_trees_all_equal(vg.merge(trainable, frozen), state)


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01)])
@jax.numpy_dtype_promotion("standard")  # optax mixes counts with floats
def test_optax(optimiser):
    """Three steps equal to those of jax.grad in the trainable leaves alone; the rest stays."""
    start, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=["head", "hidden/bias"])

    @jax.jit
    def update(trainable, grads, state):
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, frozen = vg.partition(start)
    state = optimiser.init(trainable)
    sizes = {leaf.size for leaf in jax.tree.leaves(state)}
    assert 11 * 13 not in sizes and 13 * 17 in sizes  # no state of the frozen kernel
    params = start
    for _ in range(3):
        _, grads = vg(params, *batch)
        trainable, state = update(trainable, grads, state)
        params = vg.merge(trainable, frozen)

    def rival(subset):
        return mlp_loss(
            {
                "hidden": {"kernel": start["hidden"]["kernel"], "bias": subset["b"]},
                "head": subset["h"],
            },
            *batch,
        )

    subset: Any = {"b": start["hidden"]["bias"], "h": start["head"]}
    state = optimiser.init(subset)
    for _ in range(3):
        updates, state = optimiser.update(jax.grad(rival)(subset), state, subset)
        subset = optax.apply_updates(subset, updates)
    assert_close(params["hidden"]["bias"], subset["b"])
    assert_close(params["head"], subset["h"])
    chex.assert_trees_all_equal(params["hidden"]["kernel"], start["hidden"]["kernel"])


def test_compressed_and_frozen():
    """Factors of a frozen layer cost nothing: its core is not kept."""
    params, batch = mlp()
    loss = lance_jax.compress(mlp_loss, Factors(MLP_FACTORS))
    saved = saved_of(loss, params, *batch, trainable="head")
    assert nbytes(saved) == 7 * 5 * 4
    _, grads = lance_jax.value_and_grad(loss, trainable="head")(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    u = MLP_FACTORS["head/kernel"].bases["feature"]
    assert_close(grads["head"]["kernel"], u @ u.T @ want["head"]["kernel"])
    assert_close(grads["head"]["bias"], want["head"]["bias"])
