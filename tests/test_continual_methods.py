"""Each method of continual learning by the property that defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random
from samples import pictures

from lance_jax import continual, continual_config
from lance_jax.continual_methods import METHODS, ewc, lora, projection, replay
from lance_jax.continual_methods.method import Plan, Setting
from lance_jax.pictures import Pictures

CLASSES = 3
PARAMS = {
    "first": {"kernel": random(12, 10, seed=1) / 4, "bias": random(10, seed=2)},
    "second": {"kernel": random(10, 8, seed=3) / 4},
    "head": {"kernel": random(8, 2 * CLASSES, seed=4) / 3},
}
LAYERS = ["first/kernel", "second/kernel"]


def apply_fn(params, x):
    x = jax.nn.relu(x.reshape(len(x), -1) @ params["first"]["kernel"] + params["first"]["bias"])
    return jax.nn.relu(x @ params["second"]["kernel"]) @ params["head"]["kernel"]


def examples(task=0, n=24):
    """Pictures (n, 2, 2, 3) of few directions, another few for each task."""
    rng = np.random.default_rng(task)
    images = np.tensordot(rng.normal(size=(n, 3)), rng.normal(size=(3, 2, 2, 3)), 1)
    labels = (np.arange(n) % CLASSES + CLASSES * task).astype(np.int32)
    return Pictures(np.clip(images / 4, -1, 1).astype(np.float32), labels, ("a", "b", "c"), 2)


def setting(task=0, memory=None, params=PARAMS, train=None, **fields):
    config = continual_config.continual()
    config.update({"task_classes": CLASSES, "batch_size": 8, "threshold": 0.9, **fields})
    seen = examples(task)
    batches = [jnp.asarray(seen.images[i : i + 8]) for i in range(0, 24, 8)]
    return Setting(
        config,
        task,
        apply_fn,
        apply_fn,
        params,
        LAYERS,
        seen,
        lambda: iter(batches),
        memory or {},
        train,
    )


def learnt(method, **fields):
    """The memory after the first task, with the params as they are."""
    return METHODS[method].learned(setting(**fields))[1]


def transformed(plan, gradients, params=PARAMS):
    transform = plan.transform
    return transform.update(gradients, transform.init(params), params)[0]


def test_the_methods_are_those_of_the_configuration():
    assert tuple(METHODS) == continual_config.METHODS


@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_plain_training_does_nothing_more(method):
    assert METHODS[method].plan(setting()) == Plan()
    assert METHODS[method].joint == (method == "joint")


def plan_bytes(memory):
    return METHODS["gpm"].storage(memory)["slices"]


# --- projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gpm", "gpm_int4"])
def test_projected_gradients_are_orthogonal_to_what_is_protected(method):
    memory = learnt(method)
    plan = METHODS[method].plan(setting(1, memory))
    gradients = jax.tree.map(jnp.cos, PARAMS)
    found = transformed(plan, gradients)
    slices = projection.slices_of(memory)
    for path in LAYERS:
        name = path.split("/")[0]
        protected, got = slices.protected(path), np.asarray(found[name]["kernel"], np.float64)
        assert protected.shape[1] > 0
        assert np.abs(protected.T @ got).max() < 1e-6 * np.abs(got).max()
        given = np.asarray(gradients[name]["kernel"], np.float64)
        left = given - protected @ (protected.T @ given)
        np.testing.assert_allclose(got, left, atol=1e-5)
    assert plan.ram == {"projectors": slices.nbytes} == {"projectors": plan_bytes(memory)}
    np.testing.assert_array_equal(found["head"]["kernel"], gradients["head"]["kernel"])


def test_scaled_projection_lets_through_what_is_less_important():
    memory = learnt("sgp", threshold=0.999)
    gradients = jax.tree.map(jnp.cos, PARAMS)
    sizes = [
        [
            float(jnp.linalg.norm(slices.T @ found[path.split("/")[0]]["kernel"]))
            for path, slices in (
                (path, projection.slices_of(memory).protected(path)) for path in LAYERS
            )
        ]
        for found in (
            transformed(METHODS["gpm"].plan(setting(1, memory)), gradients),
            transformed(METHODS["sgp"].plan(setting(1, memory, scale=1e6)), gradients),
            transformed(METHODS["sgp"].plan(setting(1, memory, scale=1.0)), gradients),
            gradients,
        )
    ]
    for none, almost_none, some, everything in zip(*sizes, strict=True):
        assert none < 1e-5 and almost_none < 1e-3 * everything
        assert 1e-2 * everything < some < everything


def test_gpm_int4_keeps_every_input_in_int4():
    plans = {name: METHODS[name].plan(setting(1, learnt(name))) for name in ("gpm", "gpm_int4")}
    assert plans["gpm"].calibrate is None
    factors = plans["gpm_int4"].calibrate()
    assert set(factors) == {*LAYERS, "head/kernel"}
    for layer in factors.values():
        assert layer.core_dtype == "int4" and not layer.bases and layer.update is None


def test_lance_authors_counts_energies_by_the_authors_rule():
    task = setting(1, learnt("lance_authors"), authors_energy=0.99, energy=0.1)
    found = METHODS["lance_authors"].plan(task).calibrate()

    def by(rule):
        slices = continual.protect(
            None, apply_fn, PARAMS, setting().batches(), select=LAYERS, threshold=0.9, rule=rule
        )
        return continual.allocate(
            slices, apply_fn, PARAMS, task.batches(), select=LAYERS, energy=0.99,
            rule="residual" if rule == "total" else rule,
        )  # fmt: skip

    for path in LAYERS:
        np.testing.assert_array_equal(found[path].update, by("authors")[path].update)
    assert any(found[path].update.shape != by("total")[path].update.shape for path in LAYERS)


@pytest.mark.parametrize("method", ["lance", "lance_authors"])
def test_lance_allocates_outside_of_what_is_protected(method):
    memory = learnt(method)
    factors = METHODS[method].plan(setting(1, memory)).calibrate()
    slices = projection.slices_of(memory)
    for path in LAYERS:
        update = np.asarray(factors[path].update, np.float64)
        assert np.abs(slices.protected(path).T @ update).max() < 1e-6
        assert factors[path].core_dtype == "int4"
    assert factors["head/kernel"].update is None


def test_lance_scaled_comes_back_to_what_is_less_important():
    memory = learnt("lance_scaled", threshold=0.999)
    slices = projection.slices_of(memory)
    factors = METHODS["lance_scaled"].plan(setting(1, memory, scale=1.0)).calibrate()
    for path in LAYERS:
        update = np.asarray(factors[path].update, np.float64)
        assert np.abs(slices.protected(path).T @ update).max() > 0.05


def test_before_anything_is_protected_lance_only_keeps_less():
    factors = METHODS["lance"].plan(setting()).calibrate()
    assert set(factors) == {*LAYERS, "head/kernel"}
    assert all(layer.update is None and not layer.frozen for layer in factors.values())


@pytest.mark.parametrize("method", ["gpm", "gpm_int4", "sgp", "lance", "lance_scaled"])
def test_biases_learn_in_the_first_task_alone(method):
    assert METHODS[method].plan(setting()).trainable is None
    trainable = METHODS[method].plan(setting(1, learnt(method))).trainable
    assert sorted(trainable) == ["^first/kernel$", "^head/", "^second/kernel$"]


# --- elastic weight consolidation -----------------------------------------------------------------


def test_the_penalty_is_zero_at_the_old_optimum():
    plan = METHODS["ewc"].plan(setting(1, learnt("ewc")))
    for leaf in jax.tree.leaves(transformed(plan, jax.tree.map(jnp.zeros_like, PARAMS))):
        np.testing.assert_array_equal(leaf, 0)


def test_the_penalty_pulls_back_by_importance():
    memory = learnt("ewc")
    plan = METHODS["ewc"].plan(setting(1, memory, ewc_strength=3.0))
    moved = jax.tree.map(lambda leaf: leaf + 0.5, PARAMS)
    found = transformed(plan, jax.tree.map(jnp.zeros_like, PARAMS), moved)
    for name in ("first/kernel", "first/bias", "second/kernel", "head/kernel"):
        layer, leaf = name.split("/")
        np.testing.assert_allclose(
            found[layer][leaf], 1.5 * memory[name]["importance"], rtol=1e-4, atol=1e-9
        )


def test_a_frozen_parameter_has_no_penalty():
    plan = METHODS["ewc"].plan(setting(1, learnt("ewc")))
    frozen = {"first": {"kernel": None, "bias": None}}
    gradients = {**jax.tree.map(jnp.zeros_like, PARAMS), **frozen}
    assert transformed(plan, gradients, {**PARAMS, **frozen})["first"] == frozen["first"]


def test_importance_is_the_mean_squared_gradient_of_a_sample():
    seen = examples()
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)

        def loss(params, x, label):
            logits = apply_fn(params, x[None])[0, :CLASSES]
            return jax.nn.logsumexp(logits) - logits[label]

        images = jnp.asarray(seen.images, jnp.float64)
        each = [jax.grad(loss)(params, x, y) for x, y in zip(images, seen.labels, strict=True)]
        want = jax.tree.map(lambda *g: np.mean(np.square(np.stack(g)), 0), *each)
    found = ewc.importance(setting())
    for name in found:
        layer, leaf = name.split("/")
        np.testing.assert_allclose(found[name], want[layer][leaf], rtol=1e-3, atol=1e-9)


def test_importance_adds_up_and_the_anchor_moves():
    first = learnt("ewc")
    moved = jax.tree.map(lambda leaf: leaf + 0.25, PARAMS)
    second = METHODS["ewc"].learned(setting(1, first, moved))[1]
    alone = ewc.importance(setting(1, first, moved))
    for name, part in second.items():
        np.testing.assert_allclose(part["importance"], first[name]["importance"] + alone[name])
        np.testing.assert_array_equal(part["anchor"] - first[name]["anchor"] > 0.2, True)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_keeps_as_many_pictures_of_each_class():
    seen = setting(er_pictures=9)
    memory = METHODS["er"].learned(seen)[1]
    images, labels = replay.replayed(memory)
    assert sorted(labels) == sorted([0, 1, 2] * 3)
    for image, label in zip(images, labels, strict=True):
        away = np.abs(seen.pictures.images - image).max(axis=(1, 2, 3))
        assert away.min() < 1 / 255 + 1e-6
        assert seen.pictures.labels[away.argmin()] == label
    assert METHODS["er"].storage(memory)["replay"] == 9 * 12 + 9 * 4


def test_replay_trains_on_old_pictures_with_the_new():
    memory = learnt("er", er_pictures=6)
    assert METHODS["er"].plan(setting()) == Plan()
    plan = METHODS["er"].plan(setting(1, memory))
    assert len(plan.pictures.labels) == 24 + 6
    np.testing.assert_array_equal(plan.pictures.images[:24], examples(1).images)
    np.testing.assert_array_equal(plan.pictures.images[24:], replay.replayed(memory)[0])
    assert METHODS["er"].mixes and plan.ram == METHODS["er"].storage(memory)


def test_replay_of_encoded_pictures_is_exact():
    encoded, pixels = pictures(n=6)
    memory = METHODS["er"].learned(setting(er_pictures=6)._replace(pictures=encoded))[1]
    for image in replay.replayed(memory)[0]:
        assert any((image == pixels[i] / np.float32(127.5) - 1).all() for i in range(6))


# --- adapters -------------------------------------------------------------------------------------

ADAPTERS = ["lora_per_task", "lora_shared", "lora_dynamic"]


def changed(path):
    """A training that changes one kernel by a matrix of rank 2, and the others not at all."""

    def train(plan, name, epochs):
        assert (name, epochs) == ("task_1_probe", 1)
        layer = path.split("/")[0]
        d, out = PARAMS[layer]["kernel"].shape
        change = random(d, 2, seed=7) @ random(2, out, seed=8)
        return {**PARAMS, layer: {**PARAMS[layer], "kernel": PARAMS[layer]["kernel"] + change}}

    return train


@pytest.mark.parametrize("method", ADAPTERS)
def test_new_adapters_change_nothing(method):
    plan = METHODS[method].plan(setting(1, {}, train=changed("first/kernel")))
    assert plan.trainable == ["^head/", "^adapters/"]
    x = examples().images
    np.testing.assert_array_equal(plan.wrap(apply_fn)(plan.params, x), apply_fn(PARAMS, x))
    grads = jax.grad(lambda p: plan.wrap(apply_fn)(p, x).sum())(plan.params)
    for part in grads["adapters"].values():
        assert np.abs(part["b"]).max() > 0  # but can learn


def test_an_adapter_adds_a_product():
    adapters = {"first/kernel": {"a": random(12, 2, seed=5), "b": random(2, 10, seed=6)}}
    found = lora.adapted(PARAMS, adapters)
    want = PARAMS["first"]["kernel"] + adapters["first/kernel"]["a"] @ adapters["first/kernel"]["b"]
    np.testing.assert_allclose(found["first"]["kernel"], want, rtol=1e-6)
    np.testing.assert_array_equal(found["second"]["kernel"], PARAMS["second"]["kernel"])


def test_an_adapter_of_a_convolution_has_a_row_for_each_weight_of_a_filter():
    params = {"conv": {"kernel": random(3, 3, 4, 5)}}
    adapters = lora.new_adapters(params, {"conv/kernel": 2}, jax.random.key(0))
    assert adapters["conv/kernel"]["a"].shape == (36, 2)
    assert adapters["conv/kernel"]["b"].shape == (2, 5)
    b = random(2, 5, seed=3)
    found = lora.adapted(params, {"conv/kernel": {**adapters["conv/kernel"], "b": b}})
    change = np.asarray(found["conv"]["kernel"] - params["conv"]["kernel"]).reshape(36, 5)
    np.testing.assert_allclose(change, adapters["conv/kernel"]["a"] @ b, atol=1e-6)


def trained(plan):
    """The params of a plan with another B in each adapter."""
    parts = {path: {**part, "b": part["b"] + 0.1} for path, part in plan.params["adapters"].items()}
    return {**plan.params, "adapters": parts}


def test_adapters_for_each_task_leave_the_others_as_they_were():
    method = METHODS["lora_per_task"]
    first = trained(method.plan(setting(1, {})))
    params, memory = method.learned(setting(1, {}, first))
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    before = method.params_of(params, memory, 1)
    second = trained(method.plan(setting(2, memory, params)))
    params, memory = method.learned(setting(2, memory, second))
    jax.tree.map(np.testing.assert_array_equal, method.params_of(params, memory, 1), before)
    jax.tree.map(np.testing.assert_array_equal, method.params_of(params, memory, 0), PARAMS)
    assert set(memory) == {"1", "2"}


def test_shared_adapters_go_on_from_the_last_task():
    method = METHODS["lora_shared"]
    first = trained(method.plan(setting(1, {})))
    params, memory = method.learned(setting(1, {}, first))
    second = method.plan(setting(2, memory, params))
    jax.tree.map(np.testing.assert_array_equal, second.params["adapters"], first["adapters"])
    assert np.abs(
        np.asarray(method.params_of(params, memory, 0)["first"]["kernel"])
        - np.asarray(PARAMS["first"]["kernel"])
    ).max()


def test_the_rank_follows_the_change_of_each_kernel():
    train = changed("second/kernel")
    plan = METHODS["lora_dynamic"].plan(setting(1, {}, train=train, lora_energy=0.999))
    ranks = {path: part["a"].shape[1] for path, part in plan.params["adapters"].items()}
    assert ranks == {"first/kernel": 1, "second/kernel": 2}


def test_a_rank_is_at_most_that_of_the_kernel():
    plan = METHODS["lora_per_task"].plan(setting(1, {}, lora_rank=9))
    ranks = {path: part["a"].shape[1] for path, part in plan.params["adapters"].items()}
    assert ranks == {"first/kernel": 9, "second/kernel": 8}


def test_a_transform_goes_before_the_optimiser():
    plan = METHODS["gpm"].plan(setting(1, learnt("gpm")))
    chain = optax.chain(plan.transform, optax.sgd(0.1))
    gradients = jax.tree.map(jnp.cos, PARAMS)
    updates, _ = chain.update(gradients, chain.init(PARAMS), PARAMS)
    want = jax.tree.map(lambda g: -0.1 * g, transformed(plan, gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, want)
