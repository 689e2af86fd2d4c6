"""The order of batches, and reading ahead."""

import threading

import numpy as np
import pytest

from lance_jax.loader import Loader, read_ahead


def test_loader_goes_over_everything_once_an_epoch():
    loader = Loader(11, 3, seed=5)
    epochs = [[next(loader) for _ in range(3)] for _ in range(4)]
    for epoch in epochs:
        assert len(set(np.concatenate(epoch))) == 9
    assert len({tuple(np.concatenate(epoch)) for epoch in epochs}) == 4
    assert loader.position == (4, 0)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
def test_loader_goes_on_from_a_saved_position(after):
    loader = Loader(11, 3, seed=5)
    for _ in range(after):
        next(loader)
    resumed = Loader(11, 3, seed=5, position=loader.position)
    for _ in range(8):
        np.testing.assert_array_equal(next(loader), next(resumed))


@pytest.mark.parametrize("batch_size", [0, -1, 12])
def test_loader_of_an_impossible_batch(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; it must be 1 to 11"):
        Loader(11, batch_size, seed=0)


def test_reading_ahead_changes_nothing():
    assert list(read_ahead(lambda x: 2 * x, range(5))) == [0, 2, 4, 6, 8]
    assert list(read_ahead(lambda x: 2 * x, [])) == []


def test_one_batch_is_read_while_the_last_one_is_used():
    """Without being asked for it, and no more than one."""
    begun = [threading.Event() for _ in range(4)]

    def read(item):
        begun[item].set()
        return item

    batches = read_ahead(read, range(4))
    for item in range(3):
        assert next(batches) == item
        assert begun[item + 1].wait(timeout=10)
        assert not any(event.is_set() for event in begun[item + 2 :])
    batches.close()


def test_an_error_comes_with_its_own_batch():
    batches = read_ahead(lambda x: 1 // x, [1, 2, 0])
    assert [next(batches), next(batches)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(batches)
