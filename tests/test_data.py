"""Pictures, cached features and the order of batches."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import pictures

from lance_jax import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/tfds")


def test_digits_are_real_and_divided_once():
    train, test = data.digits("train"), data.digits("test")
    assert len(train.labels) + len(test.labels) == 1797
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.all(np.abs(shares - 0.3) < 0.01), "stratified"
    x = train.read(range(len(train.labels)))
    assert x.shape[1:] == (8, 8, 1) and x.dtype == np.float32
    assert x.min() == -1 and x.max() == 1
    both = {bytes(image) for image in train.images} & {bytes(image) for image in test.images}
    assert not both


def test_restrict_keeps_the_named_classes_in_their_order():
    chosen, _ = pictures(7)
    part = data.restrict(chosen, ("c", "a"), "set")
    assert part.classes == ("c", "a")
    kept = [i for i, label in enumerate(chosen.labels) if label != 1]
    assert list(part.images) == [chosen.images[i] for i in kept]
    assert [part.classes[i] for i in part.labels] == ["abc"[chosen.labels[i]] for i in kept]
    assert data.restrict(chosen, (), "set") is chosen


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("Abysinian", "Bengal"), "'Abysinian' in data set 'pets': did you mean Abyssinian"),
        (("zzz", "Bengal"), "it has Abyssinian, Bengal"),
        (("Bengal", "Bengal"), "two or more different names"),
        (("Bengal",), "two or more different names"),
    ],
)
def test_bad_classes(classes, message):
    chosen, _ = pictures(classes=("Abyssinian", "Bengal"))
    with pytest.raises(ValueError, match=message):
        data.restrict(chosen, classes, "pets")


def test_unprepared_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"'cifar10' is not prepared in data_dir .* `tfds build"):
        data.tfds_pictures("cifar10", tmp_path, "train", 32)


def prepared(folder, version="3.0.2"):
    """A copy of the prepared CIFAR-10's descriptions, without its pictures."""
    directory = folder / "cifar10" / version
    directory.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json", "label.labels.txt"):
        text = (SHARED / "cifar10" / "3.0.2" / file).read_text()
        if file == "dataset_info.json":
            text = json.dumps({**json.loads(text), "version": version})
        (directory / file).write_text(text)
    return directory


@needs_shared
def test_the_newest_version_is_read(tmp_path):
    for version in ("9.0.0", "10.0.0"):
        prepared(tmp_path, version)
    with pytest.raises(ValueError, match="10.0.0"):
        data.tfds_pictures("cifar10", tmp_path, "train", 32)


def no_json(directory):
    (directory / "dataset_info.json").write_text("{")


def tfrecord(directory):
    path = directory / "dataset_info.json"
    path.write_text(path.read_text().replace("array_record", "tfrecord"))


def no_label(directory):
    path = directory / "features.json"
    path.write_text(path.read_text().replace('"label"', '"name"'))


def cut_short(directory):
    for split in ("train", "test"):
        (directory / f"cifar10-{split}.array_record-00000-of-00001").write_bytes(b"half")


def no_pictures(directory):
    pass


@needs_shared
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_json, "'cifar10' in .* is not one of TensorFlow Datasets"),
        (tfrecord, "cannot be read .*TFRECORD.* --file_format array_record"),
        (no_label, "no fields image and label; it has .*name"),
        (cut_short, "split 'train' of data set 'cifar10' in .* cannot be read"),
        (no_pictures, "cannot be read .*No such file"),
    ],
)
def test_damaged_data_set(tmp_path, damage, message):
    damage(prepared(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        data.tfds_pictures("cifar10", tmp_path, "train", 32)
    assert "\n" not in str(error.value)


@needs_shared
def test_prepared_data_set_is_that_of_tfds():
    tfds: Any = importlib.import_module("tensorflow_datasets")
    ours = data.tfds_pictures("cifar10", SHARED, "test", 32, ("truck", "cat"))
    names = tfds.builder_from_directory(SHARED / "cifar10" / "3.0.2").info.features["label"].names
    theirs = tfds.data_source("cifar10", data_dir=SHARED, split="test")
    wanted = [i for i in range(200) if names[theirs[i]["label"]] in ("truck", "cat")]
    assert len(ours.labels) == 400 and ours.classes == ("truck", "cat")
    for k, i in enumerate(wanted):
        assert ours.classes[ours.labels[k]] == names[theirs[i]["label"]]
        np.testing.assert_allclose(ours.read([k])[0], theirs[i]["image"] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_validation_split_is_stratified_and_by_seed(seed):
    labels = np.repeat(np.arange(4), 25)
    training, validation = data.validation_split(labels, 0.2, seed)
    assert sorted([*training, *validation]) == list(range(100))
    assert list(np.bincount(labels[validation])) == [5] * 4
    again = data.validation_split(labels, 0.2, seed)
    assert np.array_equal(validation, again[1])
    assert not np.array_equal(validation, data.validation_split(labels, 0.2, seed + 1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_validation_split_of_nothing(fraction):
    with pytest.raises(ValueError, match="validation_fraction"):
        data.validation_split(np.arange(4), fraction, 0)
