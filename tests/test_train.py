"""The comparison of methods, on a digits run made small."""

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lance_jax
from lance_jax import data, loop, train

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

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def settings(name="digits", **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    small = {"epochs": 1, "calibration_batches": 2, "checkpoint_every": 100}
    config.update({**small, **changes})
    return config


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
        for method in train.METHODS
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


@pytest.mark.parametrize("method", train.METHODS)
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
    x, y = problem.evaluation
    predicted = jnp.argmax(jax.jit(problem.apply_fn)(params, x[0]), axis=-1)
    assert result["test_accuracy"] == np.mean(np.asarray(predicted) == y)


def test_bytes_are_ordered_and_those_that_a_step_really_keeps(results, small):
    config, workdir, problem = small
    total = {method: result["saved_bytes"]["total"] for method, (result, _) in results.items()}
    assert total["head"] < total["bias"] < total["lance"] < total["backprop"] / 8
    plain = {result["saved_bytes_backprop"]["total"] for result, _ in results.values()}
    assert plain == {total["backprop"]}
    params = problem.params
    size = config.batch_size
    batch = jnp.asarray(problem.train.inputs[0, :size]), jnp.asarray(problem.train.labels[:size])
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


def test_a_mistyped_class_does_not_take_the_working_directory(tmp_path):
    with pytest.raises(ValueError, match="class"):
        train.prepare(settings(classes="five,6"), tmp_path)
    train.check(settings(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_one_working_directory_has_one_configuration(tmp_path):
    train.claim(settings(), tmp_path)
    train.check(settings(method="head"), tmp_path)
    message = f"run with config.energy = {settings().energy}, not 0.8; choose another"
    with pytest.raises(ValueError, match=message):
        train.check(settings(energy=0.8), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lanse"}, "config.method is 'lanse'; it must be one of 'head', 'bias'"),
        ({"method": "head,,backpro"}, "config.method is 'backpro'"),
        ({"method": ""}, "config.method is empty"),
        ({"model": "resnet"}, "config.model is 'resnet'"),
        ({"eval_split": "tset"}, "config.eval_split is 'tset'"),
        ({"core_dtype": "int3"}, "config.core_dtype is 'int3'; .*'int4'"),
        ({"energy": 1.5}, "config.energy is 1.5"),
        ({"batch_size": 0}, "config.batch_size is 0; it must be at least 1"),
        ({"epochs": 0}, "config.epochs is 0"),
        ({"classes": "5,six"}, "unknown class 'six' in data set 'digits'"),
        ({"trainable_layers": 9}, "trainable_layers is 9"),
        ({"learning_rate": {"head": -0.1}}, "config.learning_rate.head is -0.1; it must be pos"),
        ({"clip": float("nan")}, "config.clip is nan; it must be positive"),
        ({"modes": "channels"}, "config.modes is 'channels'; it must be one of .*'channel'"),
        ({"batch_size": 5000}, "batch_size is 5000; it must be 1 to"),
    ],
)
def test_bad_settings_are_told_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        train.compare(settings(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("metrics.jsonl")), "nothing was trained before"


@pytest.mark.parametrize(
    ("name", "field", "origin"), [("digits", "clip", "base"), ("pets", "data_dir", "mcunet")]
)
def test_a_missing_or_mistyped_field_is_told_at_once(tmp_path, name, field, origin):
    config = settings(name)
    del config[field]
    message = rf"config.{field} is missing; begin with lance_jax.config.{origin}\(\)"
    with pytest.raises(ValueError, match=message):
        train.check(config, tmp_path)
    config = settings(name)
    with config.ignore_type():
        config.epochs = "many"
    with pytest.raises(ValueError, match="config.epochs is 'many'; it must be a number"):
        train.check(config, tmp_path)


@pytest.mark.parametrize("setting", ["--workdir", "config.cache_dir"])
def test_an_unwritable_directory_is_told_at_once(tmp_path, setting):
    (tmp_path / "file").write_text("")
    places = {"--workdir": tmp_path / "run", "config.cache_dir": tmp_path / "cache"}
    places[setting] = tmp_path / "file" / "below"
    config = settings("cifar10", cache_dir=str(places["config.cache_dir"]))
    message = f"cannot write to {setting} '{places[setting]}': Not a directory"
    with pytest.raises(ValueError, match=re.escape(message)):
        train.compare(config, places["--workdir"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("mcunet-5fps.safetensors", "does not exist; give --config.weights=FILE"),
        (__file__, "is not a safetensors file"),
    ],
)
def test_bad_weights_are_told_at_once(tmp_path, weights, message):
    config = settings("cifar10", weights=weights, cache_dir="")
    with pytest.raises(ValueError, match=re.escape(message)):
        train.compare(config, tmp_path)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "'oxford_iiit_pet' is not prepared in data_dir 'nowhere'"),
        ({"classes": "Bengal,Abysinian"}, "unknown class 'Abysinian' .* did you mean Abyssinian"),
    ],
)
def test_bad_data_are_told_at_once(tmp_path, changes, message):
    places = {
        "data_dir": str(SHARED / "tfds"),
        "weights": str(SHARED / "weights" / "mcunet-5fps.safetensors"),
        "cache_dir": "",
    }
    with pytest.raises(ValueError, match=message):
        train.compare(settings("pets", **{**places, **changes}), tmp_path)


def test_a_diverging_run_names_method_step_and_rate(small, tmp_path):
    _, _, problem = small
    config = settings(learning_rate={"backprop": 1e30})
    with pytest.raises(
        FloatingPointError, match=r"method backprop: the loss is .* at step \d+ .*e\+?30"
    ):
        train.run(config, tmp_path, "backprop", problem)
