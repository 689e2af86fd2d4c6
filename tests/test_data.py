"""Pictures, cached features and the order of batches."""

import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lance_jax import data

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data/tfds")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(n=5, side=4, seed=0, classes=("a", "b", "c")):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)
    labels = np.arange(n, dtype=np.int32) % len(classes)
    return data.Pictures([png(p) for p in pixels], labels, classes, side), pixels


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


def test_pictures_are_scaled_to_minus_one_to_one():
    chosen, pixels = pictures()
    x = chosen.read([3, 1])
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, pixels[[3, 1]] / 127.5 - 1, atol=1e-7)


def test_pictures_are_resized_bicubically_whatever_their_form():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5), np.uint8)
    grey = data.Pictures([png(pixels)], np.zeros(1, np.int32), ("a",), 16).read([0])
    expected = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    assert grey.shape == (1, 16, 16, 3)
    for channel in range(3):
        np.testing.assert_allclose(
            grey[0, ..., channel], np.asarray(expected) / 127.5 - 1, atol=1e-6
        )


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


def test_loader_goes_over_everything_once_an_epoch():
    loader = data.Loader(11, 3, seed=5)
    epochs = [[next(loader) for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        assert len(set(np.concatenate(epoch))) == 9
    assert len({tuple(np.concatenate(epoch)) for epoch in epochs}) == 4
    assert loader.position == (4, 0)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_loader_goes_on_from_a_saved_position(after):
    loader = data.Loader(11, 3, seed=5)
    for _ in range(after):
        next(loader)
    resumed = data.Loader(11, 3, seed=5, position=loader.position)
    for _ in range(8):
        np.testing.assert_array_equal(next(loader), next(resumed))


@pytest.mark.parametrize("batch_size", [0, -1, 12])
def test_loader_of_an_impossible_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be 1 to 11"):
        data.Loader(11, batch_size, seed=0)


class Prefix:
    """A stand-in for the frozen network, which counts its pictures."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images * np.float32(2)


ONES = np.ones(3)


def features(chosen, prefix, cache_dir="", weights=(ONES,), flip=True):
    return data.features(
        prefix, chosen, weights=weights, flip=flip, batch_size=2, cache_dir=cache_dir
    )


@pytest.mark.parametrize("cached", [False, True])
def test_features_of_both_views(tmp_path, cached):
    chosen, _ = pictures(5)
    found = features(chosen, Prefix(), tmp_path if cached else "")
    x = 2 * chosen.read(range(5))
    np.testing.assert_array_equal(found, np.stack([x, x[:, :, ::-1]]))
    np.testing.assert_array_equal(features(chosen, Prefix(), flip=False), x[None])


def test_features_are_computed_once_for_the_same_weights_pictures_and_transform(tmp_path):
    chosen, _ = pictures(5)
    first = features(chosen, Prefix(), tmp_path)
    prefix = Prefix()
    again = features(chosen, prefix, tmp_path)
    assert prefix.seen == 0
    np.testing.assert_array_equal(first, again)
    changes: tuple[dict[str, Any], ...] = (
        {"weights": (np.zeros(3),)},
        {"weights": ("stem", ONES)},
        {"flip": False},
        {"chosen": pictures(5, seed=1)[0]},
        {"chosen": chosen.take(np.array([1, 0, 2, 3, 4]))},
        {"chosen": chosen._replace(side=8)},
    )
    for change in changes:
        prefix = Prefix()
        features(**{"chosen": chosen, "prefix": prefix, "cache_dir": tmp_path, **change})
        assert prefix.seen > 0, change


@pytest.mark.parametrize("damage", [b"", b"half an array"])
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    chosen, _ = pictures(5)
    first = np.array(features(chosen, Prefix(), tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    np.testing.assert_array_equal(features(chosen, Prefix(), tmp_path), first)


def test_a_cache_that_was_not_finished_is_not_read(tmp_path, monkeypatch):
    chosen, _ = pictures(5)

    def killed(file, array):
        file.write(b"half an array")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            features(chosen, Prefix(), tmp_path)
    assert not list(tmp_path.iterdir())
    prefix = Prefix()
    features(chosen, prefix, tmp_path)
    assert prefix.seen > 0
