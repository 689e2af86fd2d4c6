"""`complement`: new directions, orthogonal to a protected basis."""

import jax
import numpy as np
import pytest
from cases import orthonormal
from real_data import GOLDENS, needs_goldens

from lance_jax.slices import RULES, Slices, complement


def random_gram(rng: np.random.Generator, n: int, decay: float = 0.8) -> np.ndarray:
    basis = orthonormal(rng, n, n)
    return basis * decay ** np.arange(n) @ basis.T


def residual(gram: np.ndarray, protected: np.ndarray) -> np.ndarray:
    away = np.eye(len(gram)) - protected @ protected.T
    return away @ gram @ away


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n, k", [(1, 0), (7, 0), (7, 3), (40, 13), (40, 39), (200, 100)])
def test_is_orthonormal_and_orthogonal_to_what_is_protected(n, k, dtype, rule):
    rng = np.random.default_rng(n + k)
    gram, protected = random_gram(rng, n).astype(dtype), orthonormal(rng, n, k)
    u = complement(gram, protected, 0.95, rule=rule)
    assert u.dtype == dtype
    assert u.shape[1] <= n - k
    both = np.concatenate([protected, u], 1)
    np.testing.assert_allclose(both.T @ both, np.eye(both.shape[1]), atol=1e-6)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("k", [0, 5, 20])
def test_residual_holds_the_share_of_what_is_left_with_the_fewest_directions(k, energy):
    rng = np.random.default_rng(k)
    gram, protected = random_gram(rng, 30), orthonormal(rng, 30, k)
    left = residual(gram, protected)
    u = complement(gram, protected, energy)
    held = np.diag(u.T @ left @ u)
    assert held.sum() >= energy * np.trace(left) * (1 - 1e-9)
    assert energy == 1 or held[:-1].sum() < energy * np.trace(left)
    largest = np.linalg.eigvalsh(left)[::-1][: u.shape[1]]
    np.testing.assert_allclose(held, largest, atol=1e-12)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("k", [0, 5, 20])
def test_total_reaches_the_share_together_with_what_is_protected(k, energy):
    rng = np.random.default_rng(k)
    gram, protected = random_gram(rng, 30), orthonormal(rng, 30, k)
    u = complement(gram, protected, energy, rule="total")
    explained = np.trace(protected.T @ gram @ protected)
    held = np.diag(u.T @ gram @ u)
    assert explained + held.sum() >= energy * np.trace(gram) * (1 - 1e-9)
    assert energy == 1 or u.shape[1] == 0 or explained + held[:-1].sum() < energy * np.trace(gram)


def test_total_needs_nothing_more_where_the_basis_explains_enough():
    gram = np.diag([8.0, 4.0, 1.0, 0.5])
    assert complement(gram, np.eye(4)[:, :2], 0.85, rule="total").shape == (4, 0)
    assert complement(gram, np.eye(4)[:, :2], 0.9, rule="total").shape == (4, 1)


@needs_goldens
@pytest.mark.parametrize("name", ["k3", "k4s2"])
def test_authors_rule_reproduces_their_subspaces(name):
    with np.load(GOLDENS / f"continual_{name}.npz") as file:
        golden = dict(file)
    protected = None
    for t in range(3):
        threshold = float(golden[f"threshold_{t}"])
        if t > 0:
            u = complement(golden[f"gram_{t}"], protected, threshold, rule="authors")
            theirs = golden[f"allocated_{t}"]
            np.testing.assert_allclose(u @ u.T, theirs @ theirs.T, atol=5e-6)
        u = complement(golden[f"protect_gram_{t}"], protected, threshold, rule="authors")
        both = u if protected is None else np.concatenate([protected, u], 1)
        theirs = golden[f"protected_{t}"]
        np.testing.assert_allclose(both @ both.T, theirs @ theirs.T, atol=5e-6)
        protected = np.linalg.qr(theirs.astype(np.float64))[0]


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_left_of_what_is_protected_already(rule):
    rng = np.random.default_rng(0)
    protected = orthonormal(rng, 12, 4)
    gram = protected * [4.0, 3.0, 2.0, 1.0] @ protected.T
    assert complement(gram, protected, 1.0, rule=rule).shape == (12, 0)
    assert complement(random_gram(rng, 12), orthonormal(rng, 12, 12), 1.0, rule=rule).shape[1] == 0
    assert complement(np.zeros((12, 12)), None, 0.9, rule=rule).shape == (12, 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_no_direction(dtype, rule):
    """Of sums over inputs of few directions, also where all that there is was asked for."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 6)) @ orthonormal(rng, 80, 6).T).astype(dtype)
    u = complement(x.T @ x, None, 1.0, rule=rule)
    assert u.shape == (80, 6)
    assert complement(x.T @ x, u, 1.0, rule=rule).shape == (80, 0)
    more = (rng.normal(size=(4000, 9)) @ orthonormal(rng, 80, 9).T).astype(dtype)
    assert complement(more.T @ more, u, 1.0, rule=rule).shape == (80, 9)


def test_slices_stay_orthogonal_over_twenty_tasks():
    rng = np.random.default_rng(0)
    slices = np.zeros((300, 0), np.float32)
    for _ in range(20):
        new = complement(random_gram(rng, 300, 0.7), slices, 0.97, rule="total")
        slices = np.concatenate([slices, new], 1)
    assert slices.shape[1] > 150
    products = slices.astype(np.float64).T @ slices
    assert np.abs(products - np.eye(slices.shape[1])).max() < 1e-5


GRAM = np.diag([2.0, 1.0])


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((GRAM, None, 0.0), r"energy is 0\.0; it must be in \(0, 1\]"),
        ((GRAM, None, 1.5), r"energy is 1\.5"),
        ((GRAM, np.eye(3), 0.9), r"protected has shape \(3, 3\); it must be \(2, k\)"),
        ((GRAM, np.eye(2)[:, 0], 0.9), r"protected has shape \(2,\)"),
        ((GRAM, 2 * np.eye(2), 0.9), "the columns of protected are not orthonormal"),
        ((GRAM, np.full((2, 1), np.nan), 0.9), "the columns of protected are not orthonormal"),
        ((np.ones((2, 3)), None, 0.9), r"gram has shape \(2, 3\); it must be a square matrix"),
        ((np.zeros((0, 0)), None, 0.9), "gram is empty"),
        ((np.full((2, 2), np.nan), None, 0.9), "gram holds NaN or Inf"),
        ((np.diag([1.0, -1.0]), None, 0.9), "gram is no Gram matrix"),
        ((np.array([[1.0, 1.0], [0.0, 1.0]]), None, 0.9), "gram is no Gram matrix"),
    ],
)
def test_bad_input(arguments, told):
    with pytest.raises(ValueError, match=told):
        complement(*arguments)


@pytest.mark.parametrize("rule", RULES)
def test_a_negative_matrix_is_no_gram_matrix(rule):
    with pytest.raises(ValueError, match="gram is no Gram matrix"):
        complement(-np.eye(3), None, 0.9, rule=rule)


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule is 'gpm'; it must be one of 'residual', 'total'"):
        complement(GRAM, None, 0.9, rule="gpm")


def test_slices_as_nested_dicts_and_back():
    slices = Slices(
        {"a/kernel": (np.eye(3)[:, :1], None, np.eye(3)[:, 1:]), "b": (None,) * 3},
        {"a/kernel": (np.ones(1), np.ones(1), np.arange(3.0)), "b": (np.zeros(0),) * 3},
    )
    stored = slices.as_dict()
    assert set(stored["a/kernel"]["bases"]) == {"0", "2"}
    assert stored["b"] == {"tasks": 3, "bases": {}, "energies": {}}
    found = Slices.from_dict(stored)
    assert jax.tree.structure(found) == jax.tree.structure(slices)
    jax.tree.map(np.testing.assert_array_equal, found, slices)
    assert found.tasks == 3 and found["a/kernel"][1] is None


def test_tasks_that_needed_nothing_are_counted():
    slices = Slices({"a": (None, None)}, {"a": (np.zeros(0, np.float32),) * 2})
    assert Slices.from_dict(slices.as_dict()).tasks == 2
