"""Weights files: read, refused with a reason, written again, and found in the hub's cache."""

import json
import pickle
import zipfile

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lance_jax.models import weights
from lance_jax.models.resnet import ResNet
from tests.pretrained import Reference, pictures
from tests.real_data import WEIGHTS, needs_real_data
from tests.test_models_mcunet import ARCHITECTURE, folded, with_norm
from tests.test_models_network import NETWORKS, drawn

RESNET = {"kind": "resnet", "resolution": 32, "stages": [1, 1], "width": 2}


def resnet():
    """State dict of a small network in torchvision's layout, as `save` writes it."""
    return ResNet(resolution=32, stages=(1, 1), width=2, classes=3)


@pytest.fixture
def tensors(tmp_path):
    path = tmp_path / "good.safetensors"
    weights.save(path, resnet(), drawn(resnet()))
    return load_file(path)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, got, want)))


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_saved_loads_again(tmp_path, name):
    network, variables = NETWORKS[name], drawn(NETWORKS[name])
    path = tmp_path / "file.safetensors"
    weights.save(path, network, variables)
    again, same = weights.load(path)
    assert again == network
    assert_equal(same, variables)
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize(
    ("forward", "options"), [(folded, {}), (with_norm, {"kind": "mcunet", "epsilon": 1e-3})]
)
def test_what_was_loaded_is_saved_under_the_same_names(tmp_path, forward, options):
    """Bit for bit, and in the same shapes."""
    file = Reference()
    forward(file, pictures(1, 18))
    loaded = weights.load(file.save(tmp_path / "in.safetensors", **ARCHITECTURE, **options))
    weights.save(tmp_path / "out.safetensors", *loaded)
    assert_equal(load_file(tmp_path / "out.safetensors"), file.tensors)


@needs_real_data
def test_published_weights_are_saved_as_they_were(tmp_path):
    weights.save(tmp_path / "out.safetensors", *weights.load(WEIGHTS / "mcunet-5fps.safetensors"))
    theirs = load_file(WEIGHTS / "mcunet-5fps.safetensors")
    assert_equal(load_file(tmp_path / "out.safetensors"), theirs)


def test_a_file_without_a_classifier(tmp_path, tensors):
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
    path = tmp_path / "file.safetensors"
    save_file(found, path, {"architecture": json.dumps(RESNET)})
    network, variables = weights.load(path)
    assert network.classes is None and "head" not in variables["params"]


def test_a_file_with_a_classifier_of_nothing(tmp_path, tensors):
    tensors["fc.weight"], tensors["fc.bias"] = np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, {"architecture": json.dumps(RESNET)})
    assert weights.load(path)[0].classes is None


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_floats_become_float32(tmp_path, tensors, dtype):
    """num_batches_tracked, an integer of torch's batch norm, is left out."""
    rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    counters = {"bn1.num_batches_tracked": np.array(7)}
    path = tmp_path / "file.safetensors"
    save_file(rounded | counters, path, {"architecture": json.dumps(RESNET)})
    _, variables = weights.load(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    kernel = rounded["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    assert np.array_equal(variables["params"]["stem"]["kernel"], kernel)


def test_a_file_that_says_nothing_needs_the_model(tmp_path, monkeypatch, tensors):
    path = tmp_path / "file.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="do not say what network .*--config.model, one of resnet"):
        weights.load(path)
    monkeypatch.setitem(weights.MODELS, "resnet18", resnet().clone(classes=None))
    network, variables = weights.load(path, "resnet18", resolution=64)
    assert network == resnet().clone(resolution=64)
    assert_equal(variables, drawn(resnet()))


def test_a_model_that_contradicts_the_file(tmp_path, tensors):
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, {"architecture": json.dumps(RESNET)})
    assert weights.load(path, "resnet34")[0] == resnet(), "the file says which ResNet"
    with pytest.raises(ValueError, match="those of a ResNet, and config.model is 'alexnet'"):
        weights.load(path, "alexnet")
    with pytest.raises(ValueError, match="those of a ResNet, and config.model is 'resnet50'"):
        weights.load(path, "resnet50")


@pytest.mark.parametrize(
    ("name", "resolution", "message"),
    [
        ("alexnet", 4, "config.resolution is 4, which suits no AlexNet .*; 0 stands for 32"),
        ("narrow resnet", 1, "config.resolution is 1, which suits no ResNet .*; 0 stands for 32"),
        ("deit", 32, r"misshapen: pos_embed .*\(at config.resolution=32; 0 stands for that of"),
    ],
)
def test_a_resolution_that_does_not_fit(tmp_path, name, resolution, message):
    path = tmp_path / "file.safetensors"
    weights.save(path, NETWORKS[name], drawn(NETWORKS[name]))
    with pytest.raises(ValueError, match=message) as error:
        weights.load(path, resolution=resolution)
    assert "\n" not in str(error.value)


def write_bad(path, kind, tensors):
    described = dict(RESNET)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(tensors))
        return
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
        return
    if kind in ("empty", "cut short"):
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[: 0 if kind == "empty" else -100])
        return
    if kind == "names":
        for i in range(7):
            tensors[f"extra.{i}"] = np.zeros(3, np.float32)
        del tensors["layer2.0.bn1.running_var"], tensors["conv1.weight"]
        tensors["layer1.0.conv2.weight"] = np.zeros((2, 2, 5, 5), np.float32)
        tensors["fc.bias"] = np.zeros(3, np.int32)
    elif kind == "not finite":
        tensors["fc.bias"] = np.array([0, np.nan, 0], np.float32)
        tensors["layer1.0.conv2.weight"] = np.full_like(tensors["layer1.0.conv2.weight"], np.inf)
    elif kind == "8 bits":
        tensors["fc.bias"] = tensors["fc.bias"].astype(jnp.float8_e4m3fn)
    elif kind == "flat kernel":
        tensors["conv1.weight"] = tensors["conv1.weight"].reshape(-1)
    elif kind == "wrong size":
        described["width"] = 3
    elif kind == "unknown kind":
        described["kind"] = "vgg"
    elif kind == "no resolution":
        described["resolution"] = 0
    elif kind == "small resolution":
        described |= {"resolution": 1, "small": True}
    elif kind == "unknown field":
        described["height"] = 3
    elif kind == "word for a size":
        described["stages"] = "large"
    save_file(tensors, path, {"architecture": json.dumps(described)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", "is a pickle: .* run whatever code it holds. Give a safetensors file"),
        ("zip", "is a pickle: "),
        ("empty", "is not a safetensors file"),
        ("cut short", "is not a safetensors file"),
        ("names", r"missing: conv1.weight, layer2.0.bn1.running_var; "),
        ("names", r"extra: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more; "),
        ("names", r"misshapen: fc.bias \(int32\[3\], not \[3\]\), layer1.0.conv2.weight "),
        ("names", r"layer1.0.conv2.weight \(float32\[2, 2, 5, 5\], not \[2, 2, 3, 3\]\)$"),
        ("flat kernel", r"does not fit a ResNet; misshapen: conv1.weight \(float32\[294\]"),
        ("not finite", r"fit a ResNet; not finite: fc.bias, layer1.0.conv2.weight$"),
        ("8 bits", "holds numbers that NumPy has not .*float8_e4m3fn.*; give float32"),
        ("wrong size", r"misshapen: bn1.bias \(float32\[2\], not \[3\]\), .* more$"),
        ("unknown kind", "describe no network .*'vgg'"),
        ("no resolution", "describe no network .* a resolution below 1"),
        ("small resolution", "describe no network"),
        ("unknown field", "describe no network .*'height'"),
        ("word for a size", "describe no network"),
    ],
)
def test_bad_files_are_one_line(tmp_path, tensors, kind, message):
    path = tmp_path / "bad.safetensors"
    write_bad(path, kind, tensors)
    with pytest.raises(ValueError, match=message) as error:
        weights.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": "large"}, "'large'"),
        ({"blocks": [{"kernel": 3}]}, "stride"),
        ({"stem": {"kernel": 0, "stride": 2, "out_channels": 4}}, "a size below 1"),
        (
            {"blocks": [ARCHITECTURE["blocks"][1] | {"residual": True}]},
            "a residual block of stride 2 from 6 to 8 channels",
        ),
    ],
)
def test_bad_descriptions_of_an_mcunet(tmp_path, changes, message):
    path = tmp_path / "bad.safetensors"
    architecture = json.dumps({**ARCHITECTURE, **changes})
    save_file({"stem.bias": np.zeros(4, np.float32)}, path, {"architecture": architecture})
    with pytest.raises(ValueError, match=f"describe no network .*{message}"):
        weights.load(path)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "~/no/file", "owner/name.pth"])
def test_a_missing_file(name):
    with pytest.raises(ValueError, match=f"{name!r} does not exist; give --config.weights=FILE"):
        weights.load(name)


def cached(root, repository, tensors):
    """A repository as huggingface_hub keeps it; the path of its file."""
    place = root / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0123abc")
    (place / "snapshots" / "0123abc").mkdir(parents=True)
    file = place / "snapshots" / "0123abc" / "model.safetensors"
    save_file(tensors, file)
    return file


def test_the_hub_is_read_from_its_cache(tmp_path, monkeypatch, tensors):
    """The repository's name says the model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(weights.MODELS, "resnet18", resnet().clone(classes=None))
    cached(tmp_path, "timm/resnet18.tv_in1k", tensors)
    network, variables = weights.load("timm/resnet18.tv_in1k")
    assert network == resnet()
    assert_equal(variables, drawn(resnet()))


def test_no_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "'timm/resnet18.tv_in1k' are neither in the cache .* give --config.weights=FILE"
    with pytest.raises(ValueError, match=message) as error:
        weights.load("timm/resnet18.tv_in1k")
    assert "\n" not in str(error.value)


def test_a_hub_that_fails_without_a_word(monkeypatch):
    def fetch(repository, file, local_files_only=False):
        raise LocalEntryNotFoundError("not here") if local_files_only else TimeoutError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(ValueError, match=r"from the hub \(TimeoutError\); give --config.weights"):
        weights.load("timm/resnet18.tv_in1k")


def test_the_metadata_are_plain_json(tmp_path):
    path = tmp_path / "file.safetensors"
    weights.save(path, NETWORKS["mcunet"], drawn(NETWORKS["mcunet"]))
    with safe_open(path, "numpy") as file:
        architecture = json.loads(file.metadata()["architecture"])
    assert architecture["kind"] == "mcunet" and architecture["resolution"] == 18
    assert architecture["stem"] == {"kernel": 3, "stride": 2, "out_channels": 4}
    assert architecture["blocks"][1]["hidden_channels"] == 16
    assert weights.classes(path) == ()


def test_the_names_of_the_classes(tmp_path):
    path = tmp_path / "file.safetensors"
    weights.save(path, resnet(), drawn(resnet()), ["cat", "dog, wet", "Löwe"])
    assert weights.classes(path) == ("cat", "dog, wet", "Löwe")
    assert_equal(weights.load(path)[1], drawn(resnet()))


@pytest.mark.parametrize("classes", ["cat,dog", "3"])
def test_names_of_classes_that_are_none(tmp_path, tensors, classes):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, {"architecture": json.dumps(RESNET), "classes": classes})
    with pytest.raises(ValueError, match="bad.safetensors' has no list of names"):
        weights.classes(path)
