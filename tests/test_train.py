"""The comparison of methods, on a digits run made small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import settings

import lance_jax
from lance_jax import data, loop, train
from lance_jax.config import METHODS

KEYS = {
    "config",
    "method",
    "test_accuracy",
    "loss",
    "saved_bytes",
    "saved_bytes_backprop",
    "step_seconds",
    "calibration_seconds",
    "ranks",
    "versions",
    "device",
    "seed",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A problem that these tests share: (config, workdir, problem)."""
    config, workdir = settings(pretrain={"epochs": 1}), tmp_path_factory.mktemp("small")
    return config, workdir, train.prepare(config, workdir)


@pytest.fixture(scope="module")
def results(small):
    """A result and the trained parameters of every method."""
    config, workdir, problem = small
    return {
        method: (
            train.run(config, workdir, method, problem),
            train.fit_method(config, problem, method, workdir / method).params,
        )
        for method in METHODS
    }


def changed(params, start):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), before in zip(leaves, jax.tree.leaves(start), strict=True)
        if np.any(leaf != before)
    }


def test_methods_train_what_they_say(results, small):
    """From the same start, the head alone, with the biases, and all of the last layers."""
    _, _, problem = small
    head = {"head/kernel", "head/bias"}
    biases = {f"{layer}/bias" for layer in problem.layers}
    kernels = {f"{layer}/kernel" for layer in problem.layers}
    assert len(kernels) == 4
    trained = {name: changed(params, problem.params) for name, (_, params) in results.items()}
    assert trained == {
        "head": head,
        "bias": head | biases,
        "backprop": head | biases | kernels,
        "lance": head | biases | kernels,
    }


@pytest.mark.parametrize("method", METHODS)
def test_result_file(results, small, method):
    config, workdir, _ = small
    result, _ = results[method]
    assert json.loads((workdir / method / "result.json").read_text()) == result
    assert set(result) == KEYS
    assert result["method"] == method and result["seed"] == 0
    assert result["config"] == config.to_dict()
    assert 0 <= result["test_accuracy"] <= 1 and result["loss"] > 0
    assert set(result["saved_bytes"]) == set(result["saved_bytes_backprop"])
    times = result["step_seconds"]
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert (result["calibration_seconds"] is not None) == (method == "lance")
    convolutions = {f"blocks_{i}/conv{j}/kernel" for i in (2, 3) for j in (1, 2)}
    assert set(result["ranks"]) == ({*convolutions, "head/kernel"} if method == "lance" else set())


def test_accuracy_is_that_of_the_plain_network(results, small):
    _, _, problem = small
    result, params = results["lance"]
    labels = problem.evaluation.labels
    x = problem.evaluation.read(range(len(labels)))
    predicted = jnp.argmax(jax.jit(problem.apply_fn)(params, x), axis=-1)
    assert result["test_accuracy"] == np.mean(np.asarray(predicted) == labels)


def test_bytes_are_ordered_and_those_that_a_step_really_keeps(results, small):
    config, workdir, problem = small
    total = {method: result["saved_bytes"]["total"] for method, (result, _) in results.items()}
    assert total["head"] < total["bias"] < total["lance"] < total["backprop"] / 8
    plain = {result["saved_bytes_backprop"]["total"] for result, _ in results.values()}
    assert plain == {total["backprop"]}
    params = problem.params
    size = config.batch_size
    batch = jnp.asarray(problem.train.read(range(size))), jnp.asarray(problem.train.labels[:size])
    for method in ("head", "bias", "lance"):
        factors = train.fit_method(config, problem, method, workdir / method).factors
        step = lance_jax.value_and_grad(
            loop.loss_of(loop.for_device(lance_jax.compress(problem.apply_fn, factors))),
            trainable=train.trainable_patterns(method, problem.layers),
        )
        _, saved = step.forward(params, *batch)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
        assert held == pytest.approx(total[method], rel=0.01), method


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        (
            {"modes": "paper", "energy": 0.7, "core_dtype": ""},
            {"batch", "channel", "height", "width"},
        ),
        ({"modes": "none"}, set()),
        ({"modes": "channel, height"}, {"channel", "height"}),
    ],
)
def test_modes_of_the_config(small, tmp_path, changes, modes):
    _, _, problem = small
    result = train.run(settings(**changes), tmp_path, "lance", problem)
    ranks = result["ranks"]
    assert ranks.pop("head/kernel") == {}, "the head keeps its whole input"
    assert len(ranks) == 4 and all(set(found) == modes for found in ranks.values())


def test_validation_split_leaves_the_test_pictures_alone(small, tmp_path, monkeypatch):
    """The held-out pictures are training pictures, and nothing is called a test accuracy."""
    read = data.digits

    def train_only(split, classes=()):
        assert split == "train"
        return read(split, classes)

    monkeypatch.setattr(data, "digits", train_only)
    config = settings(eval_split="validation", pretrain={"epochs": 1})
    problem = train.prepare(config, tmp_path)
    kept, held_out = problem.train, problem.evaluation
    _, _, whole = small
    assert len(kept.labels) + len(held_out.labels) == len(whole.train.labels)
    assert len(held_out.labels) == pytest.approx(0.2 * len(whole.train.labels), abs=1)
    result = train.run(config, tmp_path, "head", problem)
    assert set(result) == KEYS - {"test_accuracy"} | {"validation_accuracy"}


def test_a_diverging_run_names_method_step_and_rate(small, tmp_path):
    _, _, problem = small
    config = settings(learning_rate={"backprop": 1e30})
    with pytest.raises(FloatingPointError, match=r"backprop: the loss is .* at step \d+ .*e\+?30"):
        train.run(config, tmp_path, "backprop", problem)
