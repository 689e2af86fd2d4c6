"""The comparison of methods, on a digits run made small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from samples import encoded
from settings import settings

import lance_jax
from lance_jax import data, devices, loop, train
from lance_jax.config import METHODS
from lance_jax.features import Features
from lance_jax.pictures import Pictures
from lance_jax.problem import prepare

KEYS = {
    "config",
    "method",
    "test_accuracy",
    "loss",
    "micro_batch",
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
    return config, workdir, prepare(config, workdir)


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


def test_modes_that_no_layer_has_end_before_anything_trains(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: trained.append(args))
    for keep in ("layers", "blocks"):
        config = settings(pretrain={"epochs": 1}, keep=keep, modes="token", method="head,lance")
        message = f"config.modes is 'token', but the {keep} .* no others than batch, height, width"
        with pytest.raises(ValueError, match=message):
            train.compare(config, tmp_path / keep)
    assert not trained


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


def test_blocks_are_recomputed_from_less_than_the_layers_keep(results, small, tmp_path):
    """The same parameters are trained, and what is counted is held."""
    _, _, problem = small
    config = settings(pretrain={"epochs": 1}, keep="blocks")
    result = train.run(config, tmp_path, "lance", problem)
    assert set(result["ranks"]) == {"blocks_2", "blocks_3", "head"}
    assert result["ranks"]["head"] == {}
    layers, params = results["lance"]
    fitted = train.fit_method(config, problem, "lance", tmp_path / "lance")
    assert changed(fitted.params, problem.params) == changed(params, problem.params)
    assert result["saved_bytes_backprop"] == layers["saved_bytes_backprop"]
    total = result["saved_bytes"]["total"]
    assert total < layers["saved_bytes"]["total"] / 3
    assert result["saved_bytes"]["transient"] > layers["saved_bytes"]["transient"] == 0
    batch = problem.train.read(range(64)), jnp.asarray(problem.train.labels[:64])
    loss = train.loss_in_blocks(loop.loss_of(problem.train_fn))
    trainable = train.trainable_patterns("lance", problem.layers)
    step = lance_jax.value_and_grad(lance_jax.compress(loss, fitted.factors), trainable=trainable)
    _, saved = step.forward(problem.params, jnp.asarray(batch[0]), batch[1])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
    assert held == pytest.approx(total, rel=0.01)
    logits = problem.train_fn(problem.params, batch[0]).shape
    assert logits not in {leaf.shape for leaf in jax.tree.leaves(saved)}


def test_bytes_of_micro_batches(results, small):
    """A quarter of what plain backprop keeps, and each device's sum of the gradients."""
    config, workdir, problem = small
    fitted = train.fit_method(config, problem, "backprop", workdir / "backprop")
    quarter = fitted._replace(micro_batch=config.batch_size // 4)
    saved, plain = train.saved_bytes(config, "backprop", problem, quarter)
    names = ["head/kernel", "head/bias"]
    names += [f"{layer}/{leaf}" for layer in problem.layers for leaf in ("kernel", "bias")]
    gradients = sum(flatten_dict(problem.params, sep="/")[name].nbytes for name in names)
    gradients *= devices.mesh_for(quarter.micro_batch).size
    assert saved["total"] - gradients == pytest.approx(plain["total"] / 4, rel=0.001)
    assert saved["layer_inputs"] == plain["layer_inputs"] / 4


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
    problem = prepare(config, tmp_path)
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


def write_mcunet(path):
    """Weights of an MCUNet of two blocks, for pictures of 8 x 8."""
    block = {"kernel": 3, "stride": 2, "residual": False}
    sizes = ("in_channels", "hidden_channels", "out_channels")
    blocks = [
        {**block, **dict(zip(sizes, (8, 8, 12), strict=True)), "expand": False},
        {**block, **dict(zip(sizes, (12, 24, 16), strict=True)), "expand": True},
    ]
    stem = {"out_channels": 8, "kernel": 3, "stride": 2}
    shapes = {"stem": (8, 3, 3, 3)}
    for i, b in enumerate(blocks):
        inputs, hidden, outputs = (b[size] for size in sizes)
        if b["expand"]:
            shapes[f"blocks.{i}.conv1"] = (hidden, inputs, 1, 1)
        shapes[f"blocks.{i}.conv2"] = (hidden, 1, 3, 3)
        shapes[f"blocks.{i}.conv3"] = (outputs, hidden, 1, 1)
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        weight = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensors[f"{name}.weight"] = weight.astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    architecture = {"resolution": 8, "stem": stem, "blocks": blocks}
    save_file(tensors, path, {"architecture": json.dumps(architecture)})


@pytest.fixture
def folder(tmp_path):
    """Settings for a folder of red and blue pictures, of which one cannot be read."""
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 60, (9, 12, 3), np.uint8)
            pixels[..., channel] += 180
            (tmp_path / "pictures" / name / f"{i}.png").write_bytes(encoded(pixels))
    (tmp_path / "pictures" / "red" / "20.png").write_bytes(b"")
    write_mcunet(tmp_path / "mcunet.safetensors")
    return {
        "folder": str(tmp_path / "pictures"),
        "weights": str(tmp_path / "mcunet.safetensors"),
        "unreadable": "skip",
        "resolution": 0,
        "cache_dir": "",
        "batch_size": 8,
        "epochs": 20,
        "learning_rate": {"lance": 0.3},
    }


@pytest.mark.parametrize(
    ("layers", "inputs"), [(1, Features), (2, Features), (3, Pictures)], ids=["1", "2", "3"]
)
def test_a_folder_of_pictures(folder, tmp_path, layers, inputs):
    """With nothing frozen the pictures themselves are the inputs, decoded as they are needed."""
    config = settings("folder", trainable_layers=layers, method="lance", **folder)
    workdir = tmp_path / "run"
    problem = prepare(config, workdir)
    assert type(problem.train) is inputs and problem.train.views == 2
    assert type(problem.evaluation) is inputs and problem.evaluation.views == 1
    assert len(problem.train.labels) == 32 and len(problem.evaluation.labels) == 8
    result = train.run(config, workdir, "lance", problem)
    assert result["test_accuracy"] == 1
    assert len(result["ranks"]) == layers + 1


def test_features_and_pictures_are_of_one_network(folder, tmp_path):
    """A network's logits do not depend on where it is divided."""
    logits = []
    for layers in (1, 3):
        config = settings("folder", trainable_layers=layers, **folder)
        problem = prepare(config, tmp_path / str(layers))
        params = {**problem.params, "head": {"kernel": np.eye(16, 2, dtype=np.float32)}}
        params["head"]["bias"] = np.zeros(2, np.float32)
        logits.append(problem.apply_fn(params, jnp.asarray(problem.evaluation.read(range(8)))))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_validation_pictures_are_held_out(folder, tmp_path):
    config = settings("folder", trainable_layers=3, eval_split="validation", **folder)
    problem = prepare(config, tmp_path / "run")
    kept, held_out = problem.train, problem.evaluation
    assert len(kept.labels) + len(held_out.labels) == 32
    assert not set(kept.images) & set(held_out.images)
