"""Subspaces of Gram matrices: orthonormal, leading, and of the smallest sufficient rank.

And of sketches: never above the Gram matrix, and as close to it as the theory says.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import orthonormal
from hypothesis import given
from hypothesis import strategies as st

import lance_jax
from lance_jax import hosvd


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


# --- sketches of wide modes ----------------------------------------------------------------------

N, K = 600, 100
INDEX = np.arange(1, N + 1.0)
SPECTRA = {
    "geometric": 0.9**INDEX,
    "fast": 0.5 ** INDEX[:40],
    "1 / i": 1 / INDEX,
    "1 / i^2": INDEX**-2,
    "plateau over a floor": np.where(INDEX <= 30, 1.0, 1e-3),
    "one large": np.where(INDEX == 1, 1e4, 0.95**INDEX),
    "flat": np.ones(N),
}
spectra = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)


@functools.cache
def vectors_of(n, r, seed):
    return orthonormal(np.random.default_rng(seed), n, r)


def rows_of(spectrum, n=N):
    """(m, n) whose Gram matrix has these m eigenvalues, and its eigenvectors in this order."""
    vectors = vectors_of(n, len(spectrum), 0)
    return vectors_of(len(spectrum), len(spectrum), 1) * np.sqrt(spectrum) @ vectors.T, vectors


def sketch(rows, k=K, dtype="float32", parts=3):
    """Summed over parts of the rows, as calibration sums over batches."""
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        some = [jnp.asarray(part, dtype) for part in np.array_split(rows, parts)]
        return sum(np.asarray(hosvd.sketch(part, 1, k), np.float64) for part in some)


def shares(rows, directions):
    """The energy along each direction, in float64."""
    return np.sum((rows @ directions) ** 2, 0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_sketch_is_what_it_says(axis):
    """The Gram matrix times random signs, and its diagonal: streamed, or of the matrix itself."""
    x = np.random.default_rng(0).normal(size=(12, 10, 11)).astype(np.float32)
    columns = reference.unfold(x, axis)
    gram = columns @ columns.T
    omega = np.asarray(hosvd.signs(len(gram), 4, jnp.float32), np.float64)
    assert set(np.unique(omega)) == {-1, 1}
    expected = np.concatenate([gram @ omega, np.diag(gram)[:, None]], 1)
    np.testing.assert_allclose(hosvd.sketch(jnp.asarray(x), axis, 4), expected, atol=1e-3)
    np.testing.assert_allclose(hosvd.sketch_of(gram, 4), expected, atol=1e-12)
    stacked = hosvd.sketch_of(np.stack([gram, 2 * gram]), 4)
    np.testing.assert_allclose(stacked, [expected, 2 * expected], atol=1e-12)
    np.testing.assert_allclose(hosvd.trace(stacked), [np.trace(gram), 2 * np.trace(gram)])
    np.testing.assert_allclose(hosvd.trace(gram), np.trace(gram))


def test_a_sketch_does_not_form_the_matrix():
    traced = str(jax.make_jaxpr(lambda x: hosvd.sketch(x, 1, 7))(jnp.ones((5, 5000))))
    assert "[5000,7]" in traced
    assert "[5000,5000]" not in traced


def test_random_signs():
    """The same in every call and dtype, the first rows whatever their number; and no pattern."""
    some = np.asarray(hosvd.signs(50, 30, jnp.float32))
    np.testing.assert_array_equal(some, hosvd.signs(50, 30, jnp.bfloat16))
    np.testing.assert_array_equal(some[:20], jax.jit(lambda: hosvd.signs(20, 30, jnp.float32))())
    # Singular values of independent signs: sqrt(n) +- sqrt(k), and a little.
    values = np.linalg.svd(np.asarray(hosvd.signs(N, K, jnp.float32)), compute_uv=False)
    assert 0.9 * (np.sqrt(N) - np.sqrt(K)) < values[-1] < values[0] < 1.1 * (N**0.5 + K**0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 40, K])
def test_a_sketch_of_low_rank_is_exact(rank, dtype):
    spectrum = 0.95 ** np.arange(rank)
    rows, vectors = rows_of(spectrum)
    values, directions = hosvd.nystrom(sketch(rows, dtype=dtype))
    tolerance = 3e-4 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(values[:rank], spectrum, rtol=tolerance)
    assert values[-1] == 0
    assert hosvd.rank(values, 1.0) == rank
    leading = vectors.T @ directions[:, :rank]
    np.testing.assert_allclose(np.abs(np.diag(leading)), 1, atol=tolerance)
    np.testing.assert_allclose(leading @ leading.T, np.eye(rank), atol=tolerance)


@spectra
def test_what_a_sketch_captures(spectrum):
    """Orthonormal, honest, and within the bound of theory for random sketches of k columns.

    That is Theorem 10.5 of Halko, Martinsson and Tropp (2011) for the root of the Gram matrix.
    """
    rows, _ = rows_of(spectrum)
    values, directions = hosvd.nystrom(sketch(rows))
    whole = spectrum.sum()
    assert (values.shape, directions.shape) == ((K + 1,), (N, K))
    np.testing.assert_allclose(directions.T @ directions, np.eye(K), atol=1e-12)
    np.testing.assert_allclose(values.sum(), whole, rtol=1e-5)
    assert np.all(np.diff(values[:K]) <= 0)
    head = spectrum[:K]
    assert np.all(values[: len(head)] <= head + 1e-5 * whole)
    # What the first r directions are said to hold is there.
    said = np.cumsum(values[:K])
    assert np.all(said <= np.cumsum(shares(rows, directions)) + 1e-5 * whole)
    tails = whole - np.cumsum(head)
    r = np.arange(1, min(len(head), K - 2) + 1)
    bound = np.min((1 + r / (K - r - 1)) * tails[: len(r)])
    # The theorem bounds the mean over Omega; the nuclear norm hardly varies.
    assert values[-1] <= 1.1 * bound + 1e-5 * whole


@spectra
@pytest.mark.parametrize("energy", [0.15, 0.5, 0.9, 0.98, 1.0])
def test_the_rank_from_a_sketch(spectrum, energy):
    """Enough; fewer than what reaches `energy` and all that the sketch misses; or told apart."""
    rows, _ = rows_of(spectrum)
    values, directions = hosvd.nystrom(sketch(rows))
    rank = hosvd.rank(values, energy)
    whole = spectrum.sum()
    if values[:K].sum() < (energy - 1e-5) * whole:
        assert rank == K + 1
        return
    held = shares(rows, directions[:, :rank]).sum()
    assert held >= (energy - 2e-5) * whole
    missed = values[-1] / whole
    enough = np.cumsum(spectrum) / whole >= min(energy + missed + 2e-5, 1 - 1e-12)
    assert rank <= np.argmax(enough) + 1 or energy == 1


def test_energies_that_a_sketch_cannot_reach():
    """Of a flat spectrum 100 of 600 directions hold a sixth, and there are no others."""
    values, _ = hosvd.nystrom(sketch(rows_of(SPECTRA["flat"])[0]))
    assert 1 - values[-1] / N == pytest.approx(K / N, rel=1e-4)
    assert hosvd.rank(values, 0.159) == 96
    assert hosvd.rank(values, 0.17) == K + 1


@pytest.mark.parametrize("gap", [10.0, 1000.0])
def test_the_leading_subspace_of_a_gapped_spectrum(gap):
    """The largest angle to the exact one (its sine), the smaller the wider the gap."""
    rows, vectors = rows_of(np.where(INDEX <= 20, 1.0, 0.9**INDEX / gap))
    _, directions = hosvd.nystrom(sketch(rows))
    exact, found = vectors[:, :20], directions[:, :20]
    assert np.linalg.norm(exact - found @ (found.T @ exact), 2) < 1e-3 / gap


def test_a_sketch_about_a_mean():
    """A difference of sketches: rounding is that of the larger one, and must not be kept."""
    rows, _ = rows_of(0.8 ** np.arange(60))
    mean = np.full(N, 0.5)
    shifted = (rows + mean).astype(np.float32).astype(np.float64)
    mean = shifted.mean(0)
    about = sketch(shifted) - len(rows) * sketch(mean[None], dtype="float64", parts=1)
    values, directions = hosvd.nystrom(about)
    exact = shifted - mean
    whole = np.sum(exact**2)
    assert np.sum(shifted**2) > 100 * whole
    rank = hosvd.rank(values, 0.99)
    best = np.linalg.svd(exact, compute_uv=False) ** 2
    assert shares(exact, directions[:, :rank]).sum() >= (0.99 - 1e-4) * whole
    assert rank <= np.argmax(np.cumsum(best) / whole >= 0.991) + 1


def test_nothing_has_no_direction():
    """One of several groups or layers may be all zero: finite, orthonormal, and of no energy."""
    values, directions = hosvd.nystrom(np.zeros((20, 5)))
    np.testing.assert_array_equal(values, np.zeros(5))
    np.testing.assert_allclose(directions.T @ directions, np.eye(4), atol=1e-12)


@pytest.mark.parametrize(
    ("power", "most"), [(1.0, {0.5: 1.3, 0.7: 1.3, 0.9: 1.3}), (1.5, {0.9: 1.05, 0.98: 1.2})]
)
def test_a_mode_of_4608(power, most):
    """The patches of 3x3 taps and 512 channels, in the columns that calibration takes.

    `most`: by energy, the rank over the least possible one.
    """
    spectrum = np.arange(1, 1401.0) ** -power
    rows, _ = rows_of(spectrum, 4608)
    summed = sketch(rows, hosvd.COLUMNS)
    values, directions = hosvd.decompose(summed)
    assert summed.shape == (4608, hosvd.columns(4608)) == (4608, 1025)
    held = np.cumsum(shares(rows, directions)) / spectrum.sum()
    for energy, times in most.items():
        rank = hosvd.rank(values, energy)
        best = np.argmax(np.cumsum(spectrum) >= energy * spectrum.sum()) + 1
        assert best <= rank <= times * best
        assert held[rank - 1] >= energy - 2e-5
