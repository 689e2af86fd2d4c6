"""Folders of class folders: what is found, what is told, and how it is divided."""

import logging
import re
from collections import Counter

import numpy as np
import pytest
from samples import encoded

from lance_jax import folder


def grey(shade):
    """A picture that can be told from others by its shade."""
    return encoded(np.full((6, 6), shade, np.uint8))


def write(root, counts, first=0):
    """`counts` pictures of each class, in different shades."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:02}.png").write_bytes(grey(first + i))
        first += count


def read(root, classes=(), **changes):
    given = {"test_fraction": 0.2, "seed": 0, "unreadable": "error", **changes}
    return folder.folder_pictures(root, 4, classes, **given)


def contents(part):
    """(class, folder and name) of every picture."""
    paths = [path.relative_to(path.parents[1]) for path in part.images]
    return [(part.classes[k], str(path)) for k, path in zip(part.labels, paths, strict=True)]


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.4])
def test_every_class_is_divided_in_the_same_share(tmp_path, fraction):
    counts = {"dog": 20, "cat": 7, "eel": 3}
    write(tmp_path, counts)
    splits = read(tmp_path, test_fraction=fraction)
    train, test = splits["train"], splits["test"]
    assert train.classes == test.classes == ("cat", "dog", "eel")
    for name, count in Counter(k for k, _ in contents(test)).items():
        assert count == max(1, round(fraction * counts[name]))
    everything = contents(train) + contents(test)
    assert sorted(everything) == [
        (name, f"{name}/{i:02}.png") for name in sorted(counts) for i in range(counts[name])
    ]
    assert contents(train) == sorted(contents(train)), "in the order of the names"


def test_division_is_by_seed(tmp_path):
    write(tmp_path, {"a": 20, "b": 20})
    first, again, other = (read(tmp_path, seed=seed)["test"] for seed in (0, 0, 1))
    assert contents(first) == contents(again) != contents(other)


def test_train_and_test_folders_are_kept(tmp_path):
    write(tmp_path / "train", {"b": 3, "a": 2})
    write(tmp_path / "test", {"b": 1, "a": 2}, first=100)
    splits = read(tmp_path)
    assert contents(splits["train"]) == [("a", f"a/0{i}.png") for i in range(2)] + [
        ("b", f"b/0{i}.png") for i in range(3)
    ]
    shades = (splits["test"].read(range(3))[:, 0, 0, 0] + 1) * 127.5
    np.testing.assert_allclose(shades, [101, 102, 100], atol=1e-3)


def test_what_is_no_picture_is_ignored(tmp_path):
    write(tmp_path, {"a": 3, "b": 3, ".git": 1})
    for name in ("README.txt", "a/.DS_Store", "a/._00.png", "b/notes.md", "b/Thumbs.db", "x.png"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "a" / ".cache").mkdir()
    (tmp_path / "a" / "upper.JPG").write_bytes(grey(9))
    splits = read(tmp_path)
    names = [name for part in splits.values() for _, name in contents(part)]
    assert len(names) == 7 and "a/upper.JPG" in names


def test_named_classes_alone_are_read(tmp_path):
    write(tmp_path, {"a": 3, "b": 3, "c": 3})
    (tmp_path / "b" / "00.png").write_bytes(b"?")
    assert read(tmp_path, ("c", "a"))["train"].classes == ("c", "a")
    with pytest.raises(ValueError, match="unknown class 'd' in data set .* it has a, b, c"):
        read(tmp_path, ("a", "d"))


def damaged(root):
    write(root, {"a": 6, "b": 6})
    (root / "a" / "01.png").write_bytes(b"")
    (root / "a" / "03.png").write_bytes(grey(0)[:40])
    for i in (0, 2):
        (root / "b" / f"0{i}.png").write_bytes(b"?")


def test_unreadable_files_are_named_and_counted(tmp_path):
    damaged(tmp_path)
    with pytest.raises(ValueError, match="4 of 12 pictures .* cannot be read: .*skip") as error:
        read(tmp_path)
    told = str(error.value)
    assert re.findall(r"[ab]/\d\d\.png", told) == ["a/01.png", "a/03.png", "b/00.png"]
    assert ", and 1 more" in told and "\n" not in told


def test_unreadable_files_are_left_out(tmp_path, caplog):
    damaged(tmp_path)
    with caplog.at_level(logging.WARNING, "absl"):
        splits = read(tmp_path, unreadable="skip")
    assert "4 of 12 pictures" in caplog.text and "a/01.png" in caplog.text
    names = {name for part in splits.values() for _, name in contents(part)}
    wanted = {f"{k}/{i:02}.png" for k in "ab" for i in range(6)}
    assert names == wanted - {"a/01.png", "a/03.png", "b/00.png", "b/02.png"}
    for part in splits.values():
        part.read(range(len(part.labels)))


def test_unreadable_files_of_train_and_test_folders(tmp_path):
    damaged(tmp_path / "train")
    damaged(tmp_path / "test")
    splits = read(tmp_path, unreadable="skip")
    assert contents(splits["train"]) == contents(splits["test"])
    assert len(splits["train"].labels) == 8


def nothing(root):
    pass


def no_class(root):
    (root / "a.png").write_bytes(grey(0))


def one_class(root):
    write(root, {"cat": 9})


def empty_class(root):
    write(root, {"cat": 9, "dog": 0})


def no_pictures_in_a_class(root):
    write(root, {"cat": 9, "dog": 0})
    (root / "dog" / "a.txt").write_text("")


def few(root):
    write(root, {"cat": 9, "dog": 2})


def few_that_are_readable(root):
    write(root, {"cat": 9, "dog": 3})
    (root / "dog" / "00.png").write_bytes(b"")


def few_for_training(root):
    write(root / "train", {"cat": 9, "dog": 1})
    write(root / "test", {"cat": 1, "dog": 1})


def deeper(root):
    write(root, {"cat": 3, "dog": 3})
    write(root / "dog", {"pug": 3})


def train_without_test(root):
    write(root / "train", {"cat": 3, "dog": 3})
    write(root / "val", {"cat": 3, "dog": 3})


def train_of_one_class(root):
    write(root / "train", {"cat": 3})
    write(root / "test", {"cat": 3})


def different_classes(root):
    write(root / "train", {"cat": 3, "dog": 3})
    write(root / "test", {"cat": 3, "eel": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "holds no class folders; it must hold one for each"),
        (no_class, "holds no class folders"),
        (one_class, "holds only one class folder, 'cat'"),
        (empty_class, "class folder '.*dog' holds no pictures; their extensions are .*.jpg"),
        (no_pictures_in_a_class, "class folder '.*dog' holds no pictures"),
        (few, "class 'dog' in .* has too few pictures: 1 in the train split, which needs 2"),
        (few_that_are_readable, "class 'dog' in .* has too few pictures: 1 in the train"),
        (few_for_training, "class 'dog' in .* has too few pictures: 1 in the train"),
        (deeper, "class folder '.*dog' holds a folder, 'pug'; pictures must lie in DIR/CLASS"),
        (train_without_test, "class folder '.*train' holds a folder, 'cat'; .*DIR/test/CLASS"),
        (train_of_one_class, "train' holds only one class folder, 'cat'"),
        (different_classes, "class 'dog' is in only one of train and test"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, unreadable="skip")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "nowhere", "file"])
def test_what_is_no_folder(tmp_path, name):
    (tmp_path / "file").write_text("")
    given = str(tmp_path / name) if name else ""
    with pytest.raises(ValueError, match=f"config.folder is '{given}', which is no folder; give"):
        read(given)
