"""The order in which examples are drawn, and their reading ahead of the device."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Batch = TypeVar("Batch")


class Loader:
    """Endless shuffled batches of indices into `size` examples, the same for the same seed.

    Every epoch is a fresh permutation, its last short batch is left out. `position` is where the
    next batch lies, and a loader built from it goes on from there.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, position: tuple[int, int] = (0, 0)
    ) -> None:
        check_batch(size, batch_size)
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


def check_batch(size: int, batch_size: int) -> None:
    """ValueError where `size` examples do not fill a batch."""
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"config.batch_size is {batch_size}; it must be 1 to {size}, the training examples"
        )


def read_ahead(
    read: Callable[[Item], Batch], items: Iterable[Item]
) -> Generator[Batch, None, None]:
    """`read(item)` for each item in order, the next one in a thread while the last one is used.

    At most one result is held that was not asked for yet.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead: deque[Future[Batch]] = deque()
        for item in items:
            ahead.append(reader.submit(read, item))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
