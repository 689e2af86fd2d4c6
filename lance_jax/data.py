"""The data sets: scikit-learn's digits; TensorFlow Datasets, read without TensorFlow."""

import difflib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import einops
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lance_jax.pictures import Pictures

SPLITS = ("train", "test")
# what is trained on, where the published protocol takes more than the split of that name
TRAINING_SPLITS = {"oxford_flowers102": "train+validation"}
DIGITS_SPLIT_SEED = 0  # the digits have no official test split: this one is fixed for all seeds


def digits(split: str, classes: Sequence[str] = ()) -> Pictures:
    """Scikit-learn's handwritten digits, 8x8x1 in -1 to 1; three in ten pictures are the test."""
    pixels, target = load_digits(return_X_y=True)
    images = einops.rearrange(np.asarray(pixels, np.float32), "n (h w) -> n h w 1", h=8) / 8 - 1
    labels = np.asarray(target).astype(np.int32)
    parts = train_test_split(
        np.arange(len(labels)), test_size=0.3, random_state=DIGITS_SPLIT_SEED, stratify=labels
    )
    chosen = np.sort(parts[SPLITS.index(split)])
    return restrict(
        Pictures(images[chosen], labels[chosen], tuple("0123456789"), 8), classes, "digits"
    )


def tfds_pictures(
    name: str, data_dir: str | Path, split: str, side: int, classes: Sequence[str] = ()
) -> Pictures:
    """A split of a data set prepared by TensorFlow Datasets as array_record.

    Pictures stay encoded in memory; `read` decodes them, resizes them to (side, side) and scales
    them to -1 to 1. A data set that is not under `data_dir` is prepared there. ValueError where it
    cannot be, or cannot be read.
    """
    prepare(name, data_dir)
    builder, decode = _tfds_builder(name, data_dir)
    encoded = {field: decode.SkipDecoding() for field in builder.info.features if field != "label"}
    images, labels = [], []
    if split == "train":
        split = TRAINING_SPLITS.get(name, split)
    try:
        source = builder.as_data_source(split, decoders=encoded)
        for i in range(len(source)):
            example = source[i]
            images.append(example["image"])
            labels.append(example["label"])
    except RuntimeError as error:  # another file format, or a file missing or cut short
        reason = str(error).splitlines()[0]
        again = "put a whole one in its place"
        if name in _catalogue():
            command = f"python -m lance_jax.prepare {name} --data_dir {data_dir}"
            again = f"remove that folder, and prepare it again with `{command}`"
        raise ValueError(
            f"split {split!r} of data set {name!r} in {str(builder.data_path)!r} cannot be read "
            f"({reason}); {again}"
        ) from None
    names = tuple(builder.info.features["label"].names)
    return restrict(Pictures(images, np.asarray(labels, np.int32), names, side), classes, name)


def prepare(name: str, data_dir: str | Path) -> None:
    """Downloads a data set of the TensorFlow Datasets catalogue, unless it is under `data_dir`.

    It is written there as array_record. ValueError where TensorFlow is not installed, or the data
    set cannot be had.
    """
    if _versions(name, data_dir):
        return
    missing = f"data set {name!r} is not prepared in data_dir {str(data_dir)!r}"
    known = _catalogue()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f": did you mean {', '.join(close)}?" if close else "."
        raise ValueError(
            f"{missing}, nor known to TensorFlow Datasets{hint} One that is not in their catalogue "
            f"must be there in their layout, in {str(Path(data_dir) / name / 'VERSION')!r}"
        )
    if find_spec("tensorflow") is None:
        raise ValueError(
            f"{missing}; give the directory that it is in, or install TensorFlow, which prepares "
            "it once: pip install -e '.[data]'"
        )
    import tensorflow_datasets as tfds

    try:
        place = Path(data_dir).expanduser()
        tfds.builder(name, data_dir=place, file_format="array_record").download_and_prepare()
    except Exception as error:
        # Each data set's builder is code of its author, over the network, archives and TensorFlow:
        # it may raise anything, and none of it is this program's fault or can be mended here.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"data set {name!r} cannot be prepared: {reason[0]}") from error


def _catalogue() -> list[str]:
    """The data sets that TensorFlow Datasets can prepare."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def _versions(name: str, data_dir: str | Path) -> list[Path]:
    """Folders of the prepared versions of a data set."""
    found = Path(data_dir).expanduser().joinpath(name).glob("*/dataset_info.json")
    return [path.parent for path in found]


def _tfds_builder(name: str, data_dir: str | Path) -> tuple[Any, Any]:
    """The builder, and the module of decoders."""
    import tensorflow_datasets as tfds  # a second to import, not needed by the digits

    try:
        newest = max(_versions(name, data_dir), key=lambda path: tfds.core.Version(path.name))
        builder = tfds.builder_from_directory(newest)
    except Exception as error:
        # The folder's files name classes to import and hold protocol buffers: those who parse them
        # raise errors of their own, without a common class.
        raise ValueError(
            f"data set {name!r} in {str(data_dir)!r} is not one of TensorFlow Datasets: {error}"
        ) from error
    fields: Any = builder.info.features
    if not {"image", "label"} <= set(fields):
        raise ValueError(
            f"data set {name!r} has no fields image and label; it has {', '.join(fields)}"
        )
    if not isinstance(fields["label"], tfds.features.ClassLabel):
        raise ValueError(f"data set {name!r} has no classes; its label is a {fields['label']}")
    for split in (*TRAINING_SPLITS.get(name, "train").split("+"), "test"):
        if split not in builder.info.splits:
            raise ValueError(f"data set {name!r} in {str(data_dir)!r} has no split {split!r}")
    return builder, tfds.decode


def restrict(pictures: Pictures, classes: Sequence[str], name: str) -> Pictures:
    """The pictures of the named classes, which are numbered in the order given; () keeps all."""
    if not classes:
        return pictures
    wanted = _class_indices(pictures.classes, classes, name)
    renumber = np.full(len(pictures.classes), -1, np.int32)
    renumber[wanted] = np.arange(len(wanted))
    kept = np.flatnonzero(renumber[pictures.labels] >= 0)
    part = pictures.take(kept)
    return part._replace(labels=renumber[part.labels], classes=tuple(classes))


def _class_indices(known: tuple[str, ...], classes: Sequence[str], name: str) -> list[int]:
    for wanted in classes:
        if wanted not in known:
            close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(close)}?" if close else f"it has {', '.join(known)}"
            raise ValueError(f"unknown class {wanted!r} in data set {name!r}: {hint}")
    if len(set(classes)) != len(classes) or len(classes) == 1:
        raise ValueError(f"classes must be two or more different names, got {','.join(classes)!r}")
    return [known.index(wanted) for wanted in classes]


def validation_split(
    labels: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, validation) of labels (n,), every class divided in the same proportion."""
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}; it must lie between 0 and 1")
    try:
        training, validation = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:  # too few examples for the classes
        raise ValueError(f"validation_fraction is {fraction}: {error}") from None
    return np.sort(training), np.sort(validation)
