"""Pictures, cached features and the order of batches."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_data import TFDS, needs_real_data
from samples import encoded, pictures
from settings import settings

from lance_jax import data


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


def without_tensorflow(name):
    assert name == "tensorflow"


def with_tensorflow(name):
    assert name == "tensorflow"
    return "a specification"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", "'cifar10' is not prepared in data_dir .*; .* pip install -e '.\\[data\\]'"),
        ("cifar11", "nor known to TensorFlow Datasets: did you mean cifar10"),
        (
            "",
            r"nor known to TensorFlow Datasets\. One that is not in their catalogue must be there",
        ),
        ("notmnist", "did you mean mnist.*One that is not in .* layout, in '.*/notmnist/VERSION'"),
        ("/cifar10", "nor known to TensorFlow Datasets: did you mean cifar10"),
    ],
)
def test_unprepared_data_set_without_tensorflow(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(data, "find_spec", without_tensorflow)
    for act in (
        lambda: data.tfds_pictures(name, tmp_path, "train", 32),
        lambda: data.prepare(name, tmp_path),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def prepared(folder, version="3.0.2"):
    """A copy of the prepared CIFAR-10's descriptions, without its pictures."""
    directory = folder / "cifar10" / version
    directory.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json", "label.labels.txt"):
        text = (TFDS / "cifar10" / "3.0.2" / file).read_text()
        if file == "dataset_info.json":
            text = json.dumps({**json.loads(text), "version": version})
        (directory / file).write_text(text)
    return directory


@needs_real_data
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


def no_classes(directory):
    path = directory / "features.json"
    described = json.loads(path.read_text())
    described["featuresDict"]["features"]["label"] = {
        "pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
        "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"},
    }
    path.write_text(json.dumps(described))


def cut_short(directory):
    for split in ("train", "test"):
        (directory / f"cifar10-{split}.array_record-00000-of-00001").write_bytes(b"half")


def no_pictures(directory):
    pass


@needs_real_data
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_json, "'cifar10' in .* is not one of TensorFlow Datasets"),
        (
            tfrecord,
            "cannot be read .*TFRECORD.*; remove that folder, and .*lance_jax.prepare cifar10",
        ),
        (no_label, "no fields image and label; it has .*name"),
        (no_classes, "'cifar10' has no classes; its label is a "),
        (cut_short, "split 'train' of data set 'cifar10' in .* cannot be read"),
        (no_pictures, "cannot be read .*No such file"),
    ],
)
def test_damaged_data_set(tmp_path, damage, message):
    damage(prepared(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        data.tfds_pictures("cifar10", tmp_path, "train", 32)
    assert "\n" not in str(error.value)


@needs_real_data
def test_a_damaged_data_set_that_is_in_no_catalogue_cannot_be_prepared_again(tmp_path):
    directory = prepared(tmp_path)
    cut_short(directory)
    (tmp_path / "cifar10").rename(tmp_path / "own")
    with pytest.raises(ValueError, match="cannot be read .*; put a whole one in its place"):
        data.tfds_pictures("own", tmp_path, "train", 32)


@needs_real_data
def test_prepared_data_set_is_that_of_tfds():
    tfds: Any = importlib.import_module("tensorflow_datasets")
    ours = data.tfds_pictures("cifar10", TFDS, "test", 32, ("truck", "cat"))
    names = tfds.builder_from_directory(TFDS / "cifar10" / "3.0.2").info.features["label"].names
    theirs = tfds.data_source("cifar10", data_dir=TFDS, split="test")
    wanted = [i for i in range(200) if names[theirs[i]["label"]] in ("truck", "cat")]
    assert len(ours.labels) == 400 and ours.classes == ("truck", "cat")
    for k, i in enumerate(wanted):
        assert ours.classes[ours.labels[k]] == names[theirs[i]["label"]]
        np.testing.assert_allclose(ours.read([k])[0], theirs[i]["image"] / 127.5 - 1, atol=1e-6)


FLOWERS = {"train": [0, 1, 2], "validation": [3, 4, 5], "test": [6, 7, 8, 9]}
BIRDS = {"train": [0, 1, 2], "test": [3, 4]}


def write_tfds(folder, name, splits):
    """Pictures of noise in the layout of a data set of the catalogue, written without TensorFlow.

    Its own features and versions; picture number i has label i % 7.
    """
    tfds: Any = importlib.import_module("tensorflow_datasets")
    records: Any = importlib.import_module("array_record.python.array_record_module")
    builder = tfds.builder(name, data_dir=folder, file_format="array_record")
    fields, directory = builder.info.features, Path(builder.data_path)
    directory.mkdir(parents=True)
    fields.save_config(directory)
    files = pictures(10)[0].images
    others = {
        "file_name": "a.jpg",
        "image/filename": "a.jpg",
        "label_name": "bird",
        "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        "segmentation_mask": io.BytesIO(encoded(np.zeros((4, 4), np.uint8))),
    }
    for split, indices in splits.items():
        path = directory / f"{name}-{split}.array_record-00000-of-00001"
        writer = records.ArrayRecordWriter(str(path), "group_size:1")
        for i in indices:
            example = {"image": io.BytesIO(files[i]), "label": i % 7, **others}
            example = {field: example[field] for field in fields}
            writer.write(fields.serialize_example(fields.encode_example(example)))
        writer.close()
    described = {
        "name": name,
        "version": directory.name,
        "fileFormat": "array_record",
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "0",
                "shardLengths": [str(len(indices))],
            }
            for split, indices in splits.items()
        ],
    }
    (directory / "dataset_info.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("config", "splits", "classes"), [("flowers102", FLOWERS, 102), ("cub200", BIRDS, 200)]
)
def test_configs_of_the_catalogue(tmp_path, config, splits, classes):
    """All pictures are there, undamaged; the flowers are trained on with the validation split."""
    name = settings(config).dataset
    write_tfds(tmp_path, name, splits)
    pixels = pictures(10)[1] / 127.5 - 1
    wanted = {"test": splits["test"], "train": [*splits["train"], *splits.get("validation", ())]}
    for split, indices in wanted.items():
        found = data.tfds_pictures(name, tmp_path, split, 4)
        assert list(found.labels) == [i % 7 for i in indices] and len(found.classes) == classes
        np.testing.assert_allclose(found.read(range(len(indices))), pixels[indices], atol=1e-6)


@pytest.mark.parametrize("missing", FLOWERS)
def test_a_split_that_is_missing(tmp_path, missing):
    splits = {split: indices for split, indices in FLOWERS.items() if split != missing}
    write_tfds(tmp_path, "oxford_flowers102", splits)
    with pytest.raises(ValueError, match=f"has no split '{missing}'"):
        data.tfds_pictures("oxford_flowers102", tmp_path, "train", 4)


@pytest.fixture
def catalogue(monkeypatch):
    """TensorFlow and a downloader that are there, in name; what was asked of them."""
    tfds: Any = importlib.import_module("tensorflow_datasets")
    builder, asked = tfds.builder, []

    class Builder:
        def __init__(self, name, data_dir, file_format):
            self.asked = name, Path(data_dir), file_format

        def download_and_prepare(self):
            asked.append(self.asked)
            with monkeypatch.context() as patch:
                patch.setattr(tfds, "builder", builder)
                write_tfds(self.asked[1], self.asked[0], BIRDS)

    monkeypatch.setattr(tfds, "builder", Builder)
    monkeypatch.setattr(data, "find_spec", with_tensorflow)
    return asked


def test_a_data_set_is_prepared_on_first_use(tmp_path, catalogue):
    for _ in range(2):
        found = data.tfds_pictures("caltech_birds2011", tmp_path, "train", 4)
        assert list(found.labels) == [0, 1, 2]
    assert catalogue == [("caltech_birds2011", tmp_path, "array_record")]


def test_a_data_set_that_cannot_be_had(tmp_path, monkeypatch, catalogue):
    tfds: Any = importlib.import_module("tensorflow_datasets")

    def fail(self):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(tfds.builder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match="'cifar10' cannot be prepared: no route to host$"):
        data.prepare("cifar10", tmp_path)


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
