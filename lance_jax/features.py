"""Outputs of a frozen network for all pictures, computed once and cached."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lance_jax.loader import read_ahead
from lance_jax.pictures import Pictures


class Features(NamedTuple):
    """Network inputs (views, n, ...), one view per mirror image, and labels (n,) int32."""

    inputs: np.ndarray
    labels: np.ndarray

    @property
    def views(self) -> int:
        """The number of views of each example."""
        return len(self.inputs)

    def read(self, indices: Sequence[int] | np.ndarray, views: int | np.ndarray = 0) -> np.ndarray:
        """Inputs (n, ...) of the examples at `indices`, each in its view of `views`."""
        return self.inputs[views, indices]

    def take(self, indices: np.ndarray) -> "Features":
        """The examples at `indices`."""
        return Features(self.inputs[:, indices], self.labels[indices])


def features(
    prefix: Callable[[np.ndarray], np.ndarray],
    pictures: Pictures,
    *,
    weights: Iterable[np.ndarray | str],
    batch_size: int,
    cache_dir: str | Path = "",
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, _: steps,
) -> Features:
    """Output of the frozen `prefix` for every view of every picture.

    Pictures are read ahead of the prefix. With a `cache_dir` the array is kept there under a hash
    of `weights` (arrays and descriptions that determine the prefix), the pictures and their
    transform, and comes back as a read-only memory map. `track` wraps the loop, for a progress bar.
    """
    path = None
    if cache_dir:
        digest = hashlib.sha256(f"{pictures.fingerprint()} flip={pictures.flip}".encode())
        for weight in weights:
            data = weight.encode() if isinstance(weight, str) else weight.tobytes()
            digest.update(hashlib.sha256(data).digest())
        path = Path(cache_dir).expanduser() / f"features-{digest.hexdigest()[:32]}.npy"
        if path.is_file():
            try:
                return Features(np.load(path, mmap_mode="r"), pictures.labels)
            except (ValueError, EOFError):  # damaged: computed again
                pass
    result = _compute(prefix, pictures, batch_size, track)
    if path is not None:
        _save_atomically(path, result)
        result = np.load(path, mmap_mode="r")
    return Features(result, pictures.labels)


def _compute(
    prefix: Callable[[np.ndarray], np.ndarray],
    pictures: Pictures,
    batch_size: int,
    track: Callable[[Iterable[int], str], Iterable[int]],
) -> np.ndarray:
    n = len(pictures.labels)
    # a full last batch: no second compile
    batches = (np.arange(start, start + batch_size) % n for start in range(0, n, batch_size))
    images = read_ahead(pictures.read, batches)
    views: list[list[np.ndarray]] = [[] for _ in range(pictures.views)]
    for start in track(range(0, n, batch_size), "frozen features"):
        batch = next(images)
        for view, mirrored in zip(views, (batch, batch[:, :, ::-1]), strict=False):
            view.append(np.asarray(prefix(mirrored))[: n - start])
    return np.stack([np.concatenate(view) for view in views])


def _save_atomically(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, array)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
