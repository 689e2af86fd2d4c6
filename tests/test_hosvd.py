"""Subspaces of Gram matrices: orthonormal, leading, and of the smallest sufficient rank."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import orthonormal
from hypothesis import given
from hypothesis import strategies as st

import lance_jax


def gram_of(spectrum, seed=0):
    """A Gram matrix with these eigenvalues, and its eigenvectors in the same order."""
    vectors = orthonormal(np.random.default_rng(seed), len(spectrum), len(spectrum))
    return vectors * spectrum @ vectors.T, vectors


@pytest.mark.parametrize(
    ("energy", "rank"),
    [(0.01, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.9, 3), (0.91, 4), (1.0, 4)],
)
def test_the_rank_is_the_smallest_that_suffices(energy, rank):
    """The directions hold the shares 0.4, 0.3, 0.2 and 0.1; a share that is met is enough."""
    gram = np.diag([2.0, 8.0, 4.0, 6.0])
    u = lance_jax.subspace(gram, energy)
    assert u.shape == (4, rank)
    order = [1, 3, 2, 0][:rank]
    np.testing.assert_allclose(np.abs(u), np.eye(4)[:, order], atol=1e-12)


def test_the_columns_are_the_leading_eigenvectors_in_falling_order():
    spectrum = 0.5 ** np.arange(7)
    gram, vectors = gram_of(spectrum)
    u = np.asarray(lance_jax.subspace(gram, 0.9))
    assert u.shape == (7, 4)  # 1/2 + 1/4 + 1/8 + 1/16 of the whole, and a little
    np.testing.assert_allclose(np.abs(u.T @ vectors), np.eye(4, 7), atol=1e-10)


def test_scale_does_not_matter():
    gram, _ = gram_of(0.6 ** np.arange(8))
    expected = reference.projector(lance_jax.subspace(gram, 0.8))
    for scale in (1e-20, 1e20):
        got = reference.projector(lance_jax.subspace(gram * scale, 0.8))
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_energy_one_keeps_every_direction_that_the_data_has_and_no_other():
    gram, vectors = gram_of(np.array([5.0, 3.0, 1e-3, 0, 0, 0]))
    u = lance_jax.subspace(gram, 1.0)
    assert u.shape == (6, 3)
    np.testing.assert_allclose(
        reference.projector(u), reference.projector(vectors[:, :3]), atol=1e-10
    )
    assert lance_jax.subspace(np.eye(5), 1.0).shape == (5, 5)


def test_a_mode_of_size_one():
    np.testing.assert_allclose(np.abs(lance_jax.subspace(np.array([[3.0]]), 0.9)), [[1.0]])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtypes(dtype):
    """A float32 or bfloat16 Gram matrix gives float32 bases, decomposed in at least float32."""
    gram = gram_of(0.5 ** np.arange(6))[0].astype(jnp.dtype(dtype))
    u = np.asarray(lance_jax.subspace(gram, 0.9))
    assert u.dtype == np.promote_types(jnp.dtype(dtype), np.float32)
    wide = u.astype(np.float64)
    eps = np.finfo(u.dtype).eps
    np.testing.assert_allclose(wide.T @ wide, np.eye(u.shape[1]), atol=16 * eps)
    exact = np.asarray(gram, np.float64)
    values = np.linalg.eigvalsh((exact + exact.T) / 2)[::-1]
    captured = np.trace(wide.T @ exact @ wide)
    np.testing.assert_allclose(captured, values[: u.shape[1]].sum(), rtol=64 * eps)


def test_jax_arrays_are_welcome():
    gram = jnp.asarray(gram_of(0.5 ** np.arange(4))[0], "float32")
    assert lance_jax.subspace(gram, 0.9).shape == (4, 3)


@given(st.integers(1, 12), st.floats(0.001, 1), st.integers(0, 99), st.integers(1, 12))
def test_drawn_gram_matrices(n, energy, seed, samples):
    """Any Gram matrix: orthonormal, sufficient, and one column fewer would not suffice."""
    x = np.random.default_rng(seed).normal(size=(n, samples)) * 0.7 ** np.arange(n)[:, None]
    gram = x @ x.T
    u = np.asarray(lance_jax.subspace(gram, energy))
    np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-12)
    assert u.shape == (n, reference.smallest_rank(gram, energy))
    assert 1 - reference.lost_share(gram, u) >= energy - 1e-9
    if u.shape[1] > 1:
        assert 1 - reference.lost_share(gram, u[:, :-1]) < energy + 1e-9


@pytest.mark.parametrize("energy", [0, 0.0, -0.1, 1.0001, 90, float("nan"), float("inf"), "0.9"])
def test_bad_energy(energy):
    with pytest.raises(ValueError, match="energy") as error:
        lance_jax.subspace(np.eye(3), energy)
    assert repr(energy) in str(error.value)
    assert "(0, 1]" in str(error.value)


@pytest.mark.parametrize(
    ("gram", "words"),
    [
        (np.ones((3, 4)), r"\(3, 4\).*square"),
        (np.ones(3), r"\(3,\).*square"),
        (np.ones((2, 3, 3)), r"\(2, 3, 3\).*square"),
        (np.zeros((3, 3)), "zero"),
        (np.full((3, 3), np.nan), "NaN"),
        (np.diag([1.0, np.inf]), "Inf"),
        (np.eye(3) * (1 + 2j), "complex128; it must be real"),
        (np.array([["1"]]), "<U1; it must be real"),
        (np.diag([1.0, 0.5, -0.2]), "positive semi-definite"),
        (-np.eye(2), "positive semi-definite"),
        (np.array([[1.0, 0.9], [-0.9, 1.0]]), "symmetric"),
    ],
)
def test_bad_gram(gram, words):
    with pytest.raises(ValueError, match=words):
        lance_jax.subspace(gram, 0.9)
