"""Settings, working directories and files that cannot be: one line, before anything long starts."""

import os
import re

import numpy as np
import pytest
from huggingface_hub import constants
from real_data import TFDS, WEIGHTS, needs_real_data
from settings import settings

from lance_jax import config, train
from lance_jax.pictures import Pictures
from lance_jax.problem import prepare


def claim(workdir, train=None, weights=None):
    images = np.zeros((2, 8, 8, 1), np.float32)
    images[0, 0, 0, 0] = 0 if train is None else 1
    pictures = Pictures(images, np.zeros(2, np.int32), ("a",), 8)
    params = {"w": np.zeros(3, np.float32) if weights is None else weights}
    config.claim(settings(), workdir, {"train": pictures}, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "five,6"}, "class 'five'"),
        ({"pretrain": {"classes": "zero,1"}}, "class 'zero'"),
        ({"batch_size": 1000}, "config.batch_size is 1000; it must be 1 to 6.., the training ex"),
        ({"pretrain": {"classes": "0,1"}, "batch_size": 300}, "is 300; it must be 1 to 2.., the"),
        ({"eval_split": "validation", "validation_fraction": 0.95}, "is 64; it must be 1 to 31,"),
    ],
)
def test_a_mistake_does_not_take_the_working_directory(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(settings(**changes), tmp_path)
    config.check(settings(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_one_working_directory_has_one_configuration(tmp_path):
    claim(tmp_path)
    config.check(settings(method="head"), tmp_path)
    message = f"run with config.energy = {settings().energy}, not 0.8; choose another"
    with pytest.raises(ValueError, match=message):
        config.check(settings(energy=0.8), tmp_path)


@pytest.mark.parametrize("place", ["lance/checkpoints", "lance/tasks"])
def test_a_run_that_lost_its_claim(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run, but not its config.json; put it back, or"):
        claim(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"energy": 0.9}', '{"config": 3}'])
def test_a_damaged_claim(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json' does not say what its directory holds"):
        config.check(settings(), tmp_path)


@pytest.mark.parametrize("what", ["weights", "train"])
def test_one_working_directory_has_the_same_inputs(tmp_path, what):
    """A file that was replaced by another of its name must not be trained on halfway."""
    claim(tmp_path)
    claim(tmp_path)
    with pytest.raises(ValueError, match=f"run with contents.{what} = .*; choose another"):
        claim(tmp_path, **{what: np.ones(3, np.float32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lanse"}, "config.method is 'lanse'; it must be one of 'head', 'bias'"),
        ({"method": "head,,backpro"}, "config.method is 'backpro'"),
        ({"method": ""}, "config.method is empty"),
        ({"model": "resnet"}, "config.model is 'resnet'"),
        ({"eval_split": "tset"}, "config.eval_split is 'tset'"),
        ({"core_dtype": "int3"}, "config.core_dtype is 'int3'; .*'int4'"),
        ({"keep": "block"}, "config.keep is 'block'; it must be one of 'layers', 'blocks'"),
        ({"keep": "blocks", "modes": "patch"}, "config.modes is 'patch', but config.keep is 'bloc"),
        ({"energy": 1.5}, "config.energy is 1.5"),
        ({"batch_size": 0}, "config.batch_size is 0; it must be at least 1"),
        ({"epochs": 0}, "config.epochs is 0"),
        ({"micro_batch": -1}, "config.micro_batch is -1; it must be at least 0"),
        (
            {"modes": "batch", "micro_batch": 8},
            "config.micro_batch is 8, but .* the batch mode .* need the whole batch, 64",
        ),
        ({"classes": "5,six"}, "unknown class 'six' in data set 'digits'"),
        ({"trainable_layers": 11}, "trainable_layers is 11: .* than the 10 that"),
        ({"learning_rate": {"head": -0.1}}, "config.learning_rate.head is -0.1; it must be pos"),
        ({"clip": float("nan")}, "config.clip is nan; it must be positive"),
        ({"modes": "paper"}, "config.modes=paper stands for config.energy=0.7, and it is 0.96"),
        ({"modes": "paper,channel", "energy": 0.7}, "'paper,channel'; paper and none stand alone"),
        ({"modes": "patch,channel"}, "'patch,channel'; patch goes with batch alone"),
        ({"dataset": "cifar10"}, "config.model is 'digits' and config.dataset is 'cifar10'"),
        ({"seed": -1}, "config.seed is -1; it must be at least 0"),
        ({"seed": 2**32}, "config.seed is 4294967296; it must be below 4294967296"),
        ({"pretrain": {"epochs": 0}}, "config.pretrain.epochs is 0; it must be at least 1"),
        ({"pretrain": {"learning_rate": float("nan")}}, "pretrain.learning_rate is nan"),
        ({"momentum": 1.5}, "config.momentum is 1.5"),
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
    ("name", "field", "origin"),
    [
        ("digits", "clip", "digits"),
        ("digits", "pretrain", "digits"),
        ("pets", "data_dir", "pretrained"),
        ("folder", "unreadable", "folder"),
    ],
)
def test_a_missing_or_mistyped_field_is_told_at_once(tmp_path, name, field, origin):
    given = settings(name)
    del given[field]
    message = rf"config.{field} is missing; begin with lance_jax.config.{origin}\(\)"
    with pytest.raises(ValueError, match=message):
        config.check(given, tmp_path)
    given = settings(name)
    del given.learning_rate.lance
    given.method = "head"
    config.check(given, tmp_path)
    given.method = "head,lance"
    with pytest.raises(ValueError, match="config.learning_rate has no entry 'lance'"):
        config.check(given, tmp_path)
    given = settings(name)
    with given.ignore_type():
        given.epochs = 1.5
    with pytest.raises(ValueError, match="config.epochs is 1.5; it must be an integer"):
        config.check(given, tmp_path)
    with given.ignore_type():
        given.energy, given.epochs = "most", 1
    with pytest.raises(ValueError, match="config.energy is 'most'; it must be a number"):
        config.check(given, tmp_path)


@pytest.mark.parametrize("setting", ["--workdir", "config.cache_dir"])
def test_an_unwritable_directory_is_told_at_once(tmp_path, setting):
    (tmp_path / "file").write_text("")
    places = {"--workdir": tmp_path / "run", "config.cache_dir": tmp_path / "cache"}
    places[setting] = tmp_path / "file" / "below"
    given = settings("cifar10", cache_dir=str(places["config.cache_dir"]))
    message = f"cannot write to {setting} '{places[setting]}': Not a directory"
    with pytest.raises(ValueError, match=re.escape(message)):
        train.compare(given, places["--workdir"])


def test_a_directory_whose_name_is_no_utf8_is_told_at_once(tmp_path):
    place = tmp_path / os.fsdecode(b"L\xf6we")
    with pytest.raises(ValueError, match="^--workdir is .*, which is not UTF-8$"):
        train.compare(settings(), place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("mcunet-5fps.safetensors", "does not exist; give --config.weights=FILE"),
        (__file__, "is not a safetensors file"),
        ("timm/resnet18.tv_in1k", "neither in the cache of huggingface_hub nor to be had"),
    ],
)
def test_bad_weights_are_told_at_once(tmp_path, monkeypatch, weights, message):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        train.compare(settings("cifar10", weights=weights, cache_dir=""), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet50"}, "config.model is 'resnet50'; it must be one of '', .*'resnet34'"),
        ({"resolution": -1}, "config.resolution is -1; it must be at least 0"),
        ({"batch_stats": "tuned"}, "config.batch_stats is 'tuned'; .* 'frozen', 'trained'"),
    ],
)
def test_bad_settings_of_a_pretrained_network_are_told_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.compare(settings("pets", cache_dir="", **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"unreadable": "ignore"},
            "config.unreadable is 'ignore'; .* 'error', 'skip'",
        ),
        ({"test_fraction": 1.0}, r"config.test_fraction is 1.0; it must lie in \(0, 1\)"),
    ],
)
def test_bad_settings_of_a_folder_are_told_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.compare(settings("folder", **changes), tmp_path)


@needs_real_data
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "'oxford_iiit_pet' is not prepared in data_dir 'nowhere'"),
        ({"classes": "Bengal,Abysinian"}, "unknown class 'Abysinian' .* did you mean Abyssinian"),
    ],
)
def test_bad_data_are_told_at_once(tmp_path, changes, message):
    places = {
        "data_dir": str(TFDS),
        "weights": str(WEIGHTS / "mcunet-5fps.safetensors"),
        "cache_dir": "",
    }
    with pytest.raises(ValueError, match=message):
        train.compare(settings("pets", **{**places, **changes}), tmp_path)
