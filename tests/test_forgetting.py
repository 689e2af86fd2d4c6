"""Accuracy, transfer and forgetting of a sequence of tasks."""

import numpy as np
import pytest

from lance_jax.forgetting import acc, bwt, forgetting, fwt

MATRIX = [[0.9, 0.2, 0.4], [0.95, 0.8, 0.3], [0.7, 0.6, 0.5]]


def test_by_hand():
    assert acc(MATRIX) == pytest.approx(0.6)
    assert bwt(MATRIX) == pytest.approx(((0.7 - 0.9) + (0.6 - 0.8)) / 2)
    assert forgetting(MATRIX) == pytest.approx(((0.95 - 0.7) + (0.8 - 0.6)) / 2)
    assert fwt(MATRIX, [0.5, 0.1, 0.2]) == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_nothing_is_forgotten_where_accuracies_stay(tasks):
    rows = np.tile(np.random.default_rng(0).uniform(size=tasks), (tasks, 1))
    assert acc(rows) == pytest.approx(rows[0].mean())
    assert bwt(rows) == forgetting(rows) == fwt(rows, rows[0]) == pytest.approx(0)


def test_forgetting_is_at_least_what_backward_transfer_lost():
    rng = np.random.default_rng(1)
    for _ in range(20):
        matrix = rng.uniform(size=(5, 5))
        assert forgetting(matrix) >= -bwt(matrix) - 1e-12


@pytest.mark.parametrize("matrix", [[], [0.5], [[0.5, 0.4]], [[np.nan]]])
def test_bad_input(matrix):
    with pytest.raises(ValueError, match="the accuracy matrix"):
        acc(matrix)


def test_bad_untrained():
    with pytest.raises(ValueError, match=r"untrained has shape \(2,\); it must be \(3,\)"):
        fwt(MATRIX, [0.1, 0.1])
