"""Pictures, their cached frozen features, and the order in which they are drawn. No TensorFlow."""

import difflib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import einops
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SPLITS = ("train", "test")
DIGITS_SPLIT_SEED = 0  # the digits have no official test split: this one is fixed for all seeds


class Pictures(NamedTuple):
    """One split of a data set: encoded files (bytes) or arrays, labels (n,) int32, class names.

    `side` is the pictures' height and width in pixels once read.
    """

    images: Sequence[bytes] | np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    side: int

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures (n, side, side, channels) in float32, from -1 to 1."""
        return np.stack([_read(self.images[i], self.side) for i in indices])

    def take(self, indices: np.ndarray) -> "Pictures":
        """The pictures at `indices`."""
        images = self.images
        chosen = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return self._replace(images=chosen, labels=self.labels[indices])

    def fingerprint(self) -> str:
        """Hash of the pictures in their order, and of how they are read."""
        digest = hashlib.sha256(f"rgb bicubic {self.side} /127.5-1 v1".encode())
        for image in self.images:
            digest.update(hashlib.sha256(image).digest())
        return digest.hexdigest()


def _read(image: bytes | np.ndarray, side: int) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    with Image.open(io.BytesIO(image)) as picture:
        resized = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32) / np.float32(127.5) - np.float32(1)


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
    them to -1 to 1. ValueError where the data set is not prepared under `data_dir`, or cannot be
    read.
    """
    builder, decode = _tfds_builder(name, data_dir)
    encoded = {field: decode.SkipDecoding() for field in builder.info.features if field != "label"}
    images, labels = [], []
    try:
        source = builder.as_data_source(split, decoders=encoded)
        for i in range(len(source)):
            example = source[i]
            images.append(example["image"])
            labels.append(example["label"])
    except RuntimeError as error:  # another file format, or a file missing or cut short
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"split {split!r} of data set {name!r} in {str(builder.data_path)!r} cannot be read "
            f"({reason}); prepare it again with `{_tfds_build(name, data_dir)}`"
        ) from None
    names = tuple(builder.info.features["label"].names)
    return restrict(Pictures(images, np.asarray(labels, np.int32), names, side), classes, name)


def _tfds_build(name: str, data_dir: str | Path) -> str:
    return f"tfds build {name} --data_dir {data_dir} --file_format array_record"


def _tfds_builder(name: str, data_dir: str | Path) -> tuple[Any, Any]:
    """The builder, and the module of decoders."""
    found = [
        path.parent for path in Path(data_dir).expanduser().glob(f"{name}/*/dataset_info.json")
    ]
    if not found:
        raise ValueError(
            f"data set {name!r} is not prepared in data_dir {str(data_dir)!r}: give "
            "--config.data_dir, or prepare it once where TensorFlow is installed with "
            f"`{_tfds_build(name, data_dir)}`"
        )
    import tensorflow_datasets as tfds  # a second to import, not needed by the digits

    try:
        newest = max(found, key=lambda path: tfds.core.Version(path.name))
        builder = tfds.builder_from_directory(newest)
    except Exception as error:  # its parsers share no class of errors
        raise ValueError(
            f"data set {name!r} in {str(data_dir)!r} is not one of TensorFlow Datasets: {error}"
        ) from None
    fields: Any = builder.info.features
    if not {"image", "label"} <= set(fields):
        raise ValueError(
            f"data set {name!r} has no fields image and label; it has {', '.join(fields)}"
        )
    for split in SPLITS:
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
    training, validation = train_test_split(
        np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
    )
    return np.sort(training), np.sort(validation)


class Loader:
    """Endless shuffled batches of indices into `size` examples, the same for the same seed.

    Every epoch is a fresh permutation, its last short batch is left out. `position` is where the
    next batch lies, and a loader built from it goes on from there.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, position: tuple[int, int] = (0, 0)
    ) -> None:
        if not 1 <= batch_size <= size:
            raise ValueError(
                f"batch_size is {batch_size}; it must be 1 to {size}, the training examples"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps_per_epoch = size // batch_size
        self.epoch, self.step = position
        self._order = self._permutation()

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.size)

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, step within the epoch) of the next batch."""
        return self.epoch, self.step

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> np.ndarray:
        start = self.step * self.batch_size
        batch = self._order[start : start + self.batch_size]
        self.step += 1
        if self.step == self.steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0
            self._order = self._permutation()
        return batch


def features(
    prefix: Callable[[np.ndarray], np.ndarray],
    pictures: Pictures,
    *,
    weights: Iterable[np.ndarray | str],
    flip: bool,
    batch_size: int,
    cache_dir: str | Path = "",
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _: steps,
) -> np.ndarray:
    """Output of the frozen `prefix` for every picture: (1, n, ...), or (2, n, ...) with `flip`.

    The second view is that of the picture mirrored left to right. With a `cache_dir` the array
    is kept there under a hash of `weights` (arrays and descriptions that determine the prefix), the
    pictures and their transform, and comes back as a read-only memory map. `track` wraps the loop,
    for a progress bar.
    """
    path = None
    if cache_dir:
        digest = hashlib.sha256(f"{pictures.fingerprint()} flip={flip}".encode())
        for weight in weights:
            data = weight.encode() if isinstance(weight, str) else weight.tobytes()
            digest.update(hashlib.sha256(data).digest())
        path = Path(cache_dir).expanduser() / f"features-{digest.hexdigest()[:32]}.npy"
        if path.is_file():
            try:
                return np.load(path, mmap_mode="r")
            except (ValueError, EOFError):  # damaged: computed again
                pass
    n = len(pictures.labels)
    views: list[list[np.ndarray]] = [[] for _ in range(1 + flip)]
    for start in track(range(0, n, batch_size), "frozen features"):
        indices = np.arange(start, start + batch_size) % n  # a full last batch: no second compile
        images = pictures.read(indices)
        for view, mirrored in zip(views, (images, images[:, :, ::-1]), strict=False):
            view.append(np.asarray(prefix(mirrored))[: n - start])
    result = np.stack([np.concatenate(view) for view in views])
    if path is None:
        return result
    _save_atomically(path, result)
    return np.load(path, mmap_mode="r")


def _save_atomically(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, array)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
