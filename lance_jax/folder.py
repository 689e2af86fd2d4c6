"""Pictures in a folder of class folders: found, tried, and divided into training and test."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from absl import logging

from lance_jax.data import SPLITS, restrict
from lance_jax.pictures import Pictures, decode

# what people keep pictures in; what Pillow cannot read of it is told, not ignored
EXTENSIONS = frozenset(
    (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg")
    + (".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
LEAST = {"train": 2, "test": 1}  # pictures of a class
NAMED = 3  # unreadable files that a message names
CHUNK = 32  # pictures


def folder_pictures(
    folder: str | Path,
    side: int,
    classes: Sequence[str] = (),
    *,
    test_fraction: float,
    seed: int,
    unreadable: str,
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _: steps,
) -> dict[str, Pictures]:
    """The pictures of both splits, by name; their files are read each time they are asked for.

    `folder` holds a folder for each class, with its pictures, or `train` and `test`, each with
    such folders. Without the two, `test_fraction` of every class is drawn for the test by `seed`.
    Classes and pictures are in the order of their names; files that are hidden, or no pictures by
    their extension, are ignored. Every picture is decoded once: those that fail raise a ValueError,
    or, with `unreadable` "skip", are left out with a warning. ValueError too for a class with fewer
    than 2 pictures for training or none for the test. `track` wraps the loop, for a progress bar.
    """
    root = class_root(folder)
    divided = all((root / split).is_dir() for split in SPLITS)
    parts = [_listed(root / split, side) for split in SPLITS] if divided else [_listed(root, side)]
    missing = set(parts[0].classes) ^ set(parts[-1].classes)
    if missing:
        raise ValueError(
            f"class {min(missing)!r} is in only one of train and test in {str(root)!r}"
        )
    parts = [restrict(part, classes, str(root)) for part in parts]
    parts = _readable(parts, root, unreadable, track)
    if not divided:
        indices = _divide(parts[0].labels, test_fraction, seed)
        parts = [parts[0].take(chosen) for chosen in indices]
    splits: dict[str, Pictures] = dict(zip(SPLITS, parts, strict=True))
    _check_counts(splits, root)
    return splits


def class_root(folder: str | Path) -> Path:
    """The folder of class folders; ValueError where it is none."""
    root = Path(folder).expanduser()
    if not folder or not root.is_dir():
        raise ValueError(
            f"config.folder is {str(folder)!r}, which is no folder; give "
            "--config.folder=DIR, with a folder of pictures for each class"
        )
    return root


def _listed(root: Path, side: int) -> Pictures:
    """All pictures below `root`, by class folder."""
    classes = [path.name for path in _visible(root) if path.is_dir()]
    if len(classes) < 2:
        held = f"only one class folder, {classes[0]!r}" if classes else "no class folders"
        raise ValueError(f"{str(root)!r} holds {held}; it must hold one for each of the classes")
    paths, labels = [], []
    for label, name in enumerate(classes):
        inside = _visible(root / name)
        for path in inside:
            if path.is_dir():
                raise ValueError(
                    f"class folder {str(root / name)!r} holds a folder, {path.name!r}; pictures "
                    "must lie in DIR/CLASS, or in DIR/train/CLASS and DIR/test/CLASS"
                )
        found = [path for path in inside if path.suffix.lower() in EXTENSIONS]
        if not found:
            raise ValueError(
                f"class folder {str(root / name)!r} holds no pictures; their extensions are "
                f"{' '.join(sorted(EXTENSIONS))}"
            )
        paths += found
        labels += [label] * len(found)
    return Pictures(paths, np.asarray(labels, np.int32), tuple(classes), side)


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _readable(
    parts: Sequence[Pictures],
    root: Path,
    unreadable: str,
    track: Callable[[Iterable[int], str], Iterable[int]],
) -> list[Pictures]:
    """The pictures that can be decoded."""
    whole = [(path, part.side) for part in parts for path in part.images]
    reasons: list[str | None] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in track(range(0, len(whole), CHUNK), "trying pictures"):
            reasons += threads.map(_failure, whole[start : start + CHUNK])
    failures = [reason for reason in reasons if reason]
    if failures:
        more = f", and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
        told = (
            f"{len(failures)} of {len(whole)} pictures in {str(root)!r} cannot be read: "
            f"{'; '.join(failures[:NAMED])}{more}"
        )
        if unreadable == "error":
            raise ValueError(f"{told}. Remove them, or leave them out by --config.unreadable=skip")
        logging.warning("%s. They are left out", told)
    kept = np.split([reason is None for reason in reasons], [len(parts[0].labels)])
    return [part.take(np.flatnonzero(k)) for part, k in zip(parts, kept, strict=False)]


def _failure(picture: tuple[Path, int]) -> str | None:
    """Why a picture cannot be decoded."""
    try:
        decode(*picture)
    except ValueError as error:
        return str(error)
    return None


def _divide(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, test); of every class the same share, and at least one, is for the test.

    Scikit-learn's stratified split leaves small classes without any.
    """
    rng = np.random.default_rng(seed)
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: max(1, round(fraction * len(members)))]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def _check_counts(splits: dict[str, Pictures], root: Path) -> None:
    for split, part in splits.items():
        counts = np.bincount(part.labels, minlength=len(part.classes))
        for name, count in zip(part.classes, counts, strict=True):
            if count < LEAST[split]:
                raise ValueError(
                    f"class {name!r} in {str(root)!r} has too few pictures: {count} in the {split} "
                    f"split, which needs {LEAST[split]} or more"
                )
