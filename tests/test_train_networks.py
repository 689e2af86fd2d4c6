"""Fine-tuning of each kind of network: what is trained, and batch norm's statistics."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from settings import settings

from lance_jax import data, problem, train
from lance_jax.models import network, weights
from lance_jax.models.deit import DeiT
from lance_jax.models.mobilenet import MobileNetV2
from lance_jax.models.resnet import ResNet
from lance_jax.pictures import Pictures
from tests.test_models_network import drawn
from tests.test_train import changed

NETWORKS = {
    "resnet": ResNet(resolution=8, stages=(1, 2), width=4, small=True),
    "deit": DeiT(resolution=8, patch=4, width=12, depth=2),
    "mobilenetv2": MobileNetV2(resolution=32, width=0.1),
}


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """prepare(name, **changes) -> (config, workdir, problem), on drawn weights and pictures."""

    def pictures(name, data_dir, split, side, classes):
        rng = np.random.default_rng(0)
        labels = np.arange(32, dtype=np.int32) % 2
        images = rng.normal(0, 0.3, (32, side, side, 3)) + (labels - 0.5)[:, None, None, None]
        return Pictures(images.astype(np.float32), labels, ("dark", "light"), side)

    monkeypatch.setattr(data, "tfds_pictures", pictures)

    def prepare(name, **changes):
        path, workdir = tmp_path / f"{name}.safetensors", tmp_path / "run"
        net = NETWORKS[name].clone(classes=7)
        weights.save(path, net, drawn(net))
        small = {"weights": str(path), "resolution": 0, "cache_dir": "", "batch_size": 8}
        config = settings("pets", **{**small, "epochs": 3, "trainable_layers": 3, **changes})
        return config, workdir, problem.prepare(config, workdir)

    return prepare


LAYERS = {
    "resnet": ["blocks_1/shortcut", "blocks_2/conv1", "blocks_2/conv2"],
    "deit": ["blocks_1/proj", "blocks_1/fc1", "blocks_1/fc2"],
    "mobilenetv2": ["blocks_16/conv1", "blocks_16/conv3", "features"],
}


@pytest.mark.parametrize("name", ["resnet", "deit", "mobilenetv2"])
def test_methods_train_what_they_say(prepare, name):
    """With batch norm, a layer's bias is that of the norm behind it."""
    config, workdir, problem = prepare(name)
    assert problem.layers == LAYERS[name]
    norm = "" if name == "deit" else "_norm"
    head = {"head/kernel"} if name == "resnet" else {"head/kernel", "head/bias"}
    biases = {f"{layer}{norm}/bias" for layer in problem.layers}
    kernels = {f"{layer}/kernel" for layer in problem.layers}
    for method, expected in {"bias": head | biases, "lance": head | biases | kernels}.items():
        fitted = train.fit_method(config, problem, method, workdir / method)
        assert changed(fitted.params, problem.params) == expected
    assert set(fitted.factors) == kernels | {"head/kernel"}
    result = train.run(config, workdir, "lance", problem)
    assert result["saved_bytes"]["total"] < result["saved_bytes_backprop"]["total"]


IN_BLOCKS = {
    "resnet": {"blocks_1", "blocks_2"},
    "deit": {"blocks_1"},
    "mobilenetv2": {"blocks_16", "features"},
}


@pytest.mark.parametrize("name", ["resnet", "deit", "mobilenetv2"])
def test_blocks_keep_less_and_train_the_same(prepare, name):
    modes = "token,feature" if name == "deit" else "channel"
    config, workdir, problem = prepare(name, keep="blocks", core_dtype="int8", modes=modes)
    fitted = train.fit_method(config, problem, "lance", workdir / "lance")
    assert {layer.core_dtype for layer in fitted.factors.values()} == {"int8"}, "the head's, too"
    found = {mode for layer in fitted.factors.values() for mode in layer.ranks}
    assert found == set(modes.split(","))
    assert set(fitted.factors) == IN_BLOCKS[name] | {"head"}
    norm = "" if name == "deit" else "_norm"
    expected = {"head/kernel"} | ({"head/bias"} if name != "resnet" else set())
    for layer in problem.layers:
        expected |= {f"{layer}{norm}/bias", f"{layer}/kernel"}
    assert changed(fitted.params, problem.params) == expected
    by_block = train.run(config, workdir, "lance", problem)["saved_bytes"]["total"]
    other, elsewhere, _ = prepare(name, core_dtype="int8", modes=modes)
    by_layer = train.run(other, elsewhere / "layers", "lance", problem)["saved_bytes"]["total"]
    assert by_block < by_layer


def test_blocks_with_trained_statistics(prepare):
    """They are those of the true inputs: the same as when layers are kept, after one step."""
    found = []
    for keep in ("layers", "blocks"):
        config, workdir, problem = prepare("resnet", batch_stats="trained", keep=keep, epochs=1)
        config.batch_size = 32  # one step
        fitted = train.fit_method(config, problem, "lance", workdir / keep)
        found.append(fitted.params["batch_stats"])
    chex.assert_trees_all_close(*found, rtol=1e-6)
    assert changed(found[0], problem.params["batch_stats"])


def test_trained_statistics(prepare):
    """They move with the training, are restored with it, and are those that evaluation uses."""
    config, workdir, problem = prepare("resnet", batch_stats="trained", epochs=6)
    fitted = train.fit_method(config, problem, "lance", workdir / "lance")
    moved = {path for path in changed(fitted.params, problem.params) if "batch_stats" in path}
    norms = ["blocks_1/conv1", "blocks_1/conv2", "blocks_1/shortcut"]
    norms += ["blocks_2/conv1", "blocks_2/conv2"]
    assert moved == {f"batch_stats/{n}_norm/{leaf}" for n in norms for leaf in ("mean", "var")}
    again = train.fit_method(config, problem, "lance", workdir / "lance")
    assert changed(again.params, fitted.params) == set()
    result = train.run(config, workdir, "lance", problem)
    logits = problem.apply_fn(fitted.params, jnp.asarray(problem.evaluation.read(range(32))))
    right = np.mean(np.argmax(logits, -1) == problem.evaluation.labels)
    assert result["test_accuracy"] == right == 1
    net, variables = weights.load(workdir / "lance" / weights.FILE)
    pictures = data.tfds_pictures("", "", "test", 8, ()).read(range(32))
    np.testing.assert_allclose(net.apply(variables, pictures), logits, rtol=1e-4, atol=1e-5)
    stale = {**fitted.params, "batch_stats": problem.params["batch_stats"]}
    other = problem.apply_fn(stale, jnp.asarray(problem.evaluation.read(range(32))))
    assert not np.allclose(logits, other)


def test_trained_statistics_need_batch_norm(prepare):
    message = "config.batch_stats is 'trained', and the network of .*deit.* has no batch norm"
    with pytest.raises(ValueError, match=message):
        prepare("deit", batch_stats="trained")


def test_the_new_head_is_told_of(prepare, capsys):
    prepare("resnet")
    line = capsys.readouterr().out.splitlines()[0]
    # a tensor of each of 8 convolutions, 4 of each one's norm, and the head's
    assert "loaded 41 tensors of a ResNet (8 px) from " in line and "resnet.safetensors" in line
    assert "its head ('head', 2 classes) is new" in line


def test_frozen_statistics_stay(prepare):
    config, workdir, problem = prepare("resnet")
    start = jax.tree.leaves(problem.params["batch_stats"])
    fitted = train.fit_method(config, problem, "backprop", workdir / "backprop")
    end = jax.tree.leaves(fitted.params["batch_stats"])
    assert start and all(map(np.array_equal, start, end))
    assert network.as_variables(fitted.params).keys() == {"params", "batch_stats"}
