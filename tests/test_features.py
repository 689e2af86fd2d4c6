"""Frozen features and their cache."""

from typing import Any

import numpy as np
import pytest
from samples import pictures

from lance_jax.features import Features, features


class Prefix:
    """A stand-in for the frozen network, which counts its pictures."""

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images * np.float32(2)


ONES = np.ones(3)


def found(chosen, prefix, cache_dir="", weights=(ONES,)):
    result = features(prefix, chosen, weights=weights, batch_size=2, cache_dir=cache_dir)
    np.testing.assert_array_equal(result.labels, chosen.labels)
    return result.inputs


@pytest.mark.parametrize("cached", [False, True])
def test_features_of_both_views(tmp_path, cached):
    chosen, _ = pictures(flip=True)
    both = found(chosen, Prefix(), tmp_path if cached else "")
    x = 2 * chosen.read(range(5))
    np.testing.assert_array_equal(both, np.stack([x, x[:, :, ::-1]]))
    np.testing.assert_array_equal(found(chosen._replace(flip=False), Prefix()), x[None])


def test_features_are_computed_once_for_the_same_weights_pictures_and_transform(tmp_path):
    chosen, _ = pictures(flip=True)
    first = found(chosen, Prefix(), tmp_path)
    prefix = Prefix()
    again = found(chosen, prefix, tmp_path)
    assert prefix.seen == 0
    np.testing.assert_array_equal(first, again)
    changes: tuple[dict[str, Any], ...] = (
        {"weights": (np.zeros(3),)},
        {"weights": ("stem", ONES)},
        {"chosen": chosen._replace(flip=False)},
        {"chosen": pictures(seed=1, flip=True)[0]},
        {"chosen": chosen.take(np.array([1, 0, 2, 3, 4]))},
        {"chosen": chosen._replace(side=8)},
    )
    for change in changes:
        prefix = Prefix()
        found(**{"chosen": chosen, "prefix": prefix, "cache_dir": tmp_path, **change})
        assert prefix.seen > 0, change


@pytest.mark.parametrize("damage", [b"", b"half an array"])
def test_a_damaged_cache_is_computed_again(tmp_path, damage):
    chosen, _ = pictures(flip=True)
    first = np.array(found(chosen, Prefix(), tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    np.testing.assert_array_equal(found(chosen, Prefix(), tmp_path), first)


def test_a_cache_that_was_not_finished_is_not_read(tmp_path, monkeypatch):
    chosen, _ = pictures(flip=True)

    def killed(file, array):
        file.write(b"half an array")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            found(chosen, Prefix(), tmp_path)
    assert not list(tmp_path.iterdir())
    prefix = Prefix()
    found(chosen, prefix, tmp_path)
    assert prefix.seen > 0


def test_examples_are_read_in_their_views():
    inputs = np.arange(24.0).reshape(2, 4, 3)
    examples = Features(inputs, np.arange(4))
    assert examples.views == 2
    np.testing.assert_array_equal(examples.read([3, 1]), inputs[0, [3, 1]])
    mixed = examples.read(np.array([3, 1]), np.array([0, 1]))
    np.testing.assert_array_equal(mixed, [inputs[0, 3], inputs[1, 1]])
    part = examples.take(np.array([2, 0]))
    np.testing.assert_array_equal(part.labels, [2, 0])
    np.testing.assert_array_equal(part.read([0], 1), inputs[1, [2]])
