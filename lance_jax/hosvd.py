"""The leading subspace of a mode: one-shot higher-order SVD from its Gram matrix or a sketch of it.

A mode wider than `WIDEST` never meets its (n, n) Gram matrix C. What is summed over the batches is
linear in C and has few columns: a sketch (n, k + 1), the columns of C Omega and, last, the diagonal
of C. Omega (n, k) is a fixed random matrix. One pass over the batches gives the leading
eigenvectors of C by the Nystrom approximation (Tropp, Yurtsever, Udell and Cevher, Fixed-rank
approximation of a positive-semidefinite matrix from streaming data, 2017, arXiv 1706.05736).
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

WIDEST = 4096  # size of the widest mode whose Gram matrix is formed
COLUMNS = 1024  # of the sketch of a wider mode, and so the largest rank that it can get
_ROUNDING = 1e-2  # of sums in bfloat16, relative to the largest
_NO_GRAM = "gram is no Gram matrix: it must be symmetric and positive semi-definite"
_NOTHING = 1e-5  # the share of a trace that float32 sums cannot tell from nothing


def subspace(gram: npt.ArrayLike, energy: float) -> np.ndarray:
    """Leading eigenvectors of a Gram matrix, as few as reach a share of its trace.

    The factor of one mode in the one-shot HOSVD of LANCE (arXiv 2509.21617, section 3), with the
    smallest sufficient rank. Exact for any n, in O(n^3) operations; `calibrate` sketches the modes
    wider than 4096 instead, which do not need the matrix.

    Args:
      gram: (n, n) symmetric positive semi-definite, the sum of X_(m) X_(m)^T.
      energy: share of the trace to reach, in (0, 1].

    Returns:
      (n, r) orthonormal columns, leading direction first, of the same floating dtype as `gram`
      (at least float32); the decomposition itself runs in float64 on the host.

    Raises:
      ValueError: if `energy` is outside (0, 1], or `gram` is not a real square matrix, not finite,
        all zero, not symmetric or has an eigenvalue below zero (by more than rounding).
    """
    check_energy(energy)
    gram = np.asarray(gram)
    check_gram(gram)
    if not gram.any():
        raise ValueError("gram is all zero: it has no leading subspace")
    values, vectors = eigh(gram)
    check_positive(values, values[0])
    dtype = np.promote_types(gram.dtype, np.float32)
    return vectors[:, : rank(values, energy)].astype(dtype)


def check_positive(values: np.ndarray, scale: float) -> None:
    """Raise where falling eigenvalues end below zero by more than rounding at `scale`."""
    if values[-1] < -_ROUNDING * scale:
        raise ValueError(_NO_GRAM)


def check_gram(gram: np.ndarray) -> None:
    """Raise for what is no square, real, finite and symmetric matrix."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {gram.shape}; it must be a square matrix")
    if gram.dtype.kind not in "fiu" and gram.dtype.name != "bfloat16":
        raise ValueError(f"gram is {gram.dtype}; it must be real")
    if not np.isfinite(gram).all():
        raise ValueError("gram holds NaN or Inf; it must be finite")
    exact = np.asarray(gram, np.float64)
    asymmetry = np.abs(exact - exact.T).max(initial=0.0)
    if asymmetry > _ROUNDING * np.abs(exact).max(initial=0.0):
        raise ValueError(_NO_GRAM)


def decompose(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`eigh` of a Gram matrix, or `nystrom` of a sketch: values for `rank`, and directions."""
    return eigh(sums) if is_gram(sums) else nystrom(sums)


def eigh(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in falling order and their eigenvectors, in float64."""
    gram = np.asarray(gram, np.float64)
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], np.ascontiguousarray(vectors[:, ::-1])


def nystrom(sketched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (k + 1,) and eigenvectors (n, k) of C from its sketch (n, k + 1), in float64.

    The Nystrom approximation is (C Omega) (Omega^T C Omega)^+ (C Omega)^T (Tropp et al. 2017):
    exact where C has rank k or less, and never above C. So the first r directions hold at least the
    sum of the first r values. What the k values lack to the trace of C is the last, and has no
    direction: `rank` gives k + 1 where they do not suffice.

    Their Algorithm 3 shifts C against rounding and takes a Cholesky factor. Here the pseudo-inverse
    leaves out what rounding has made: the eigenvalues of Omega^T C Omega below zero tell how large
    that is, also where C is a difference (about a mean), in which a shift by the rounding of C
    itself would not do.
    """
    sketched = np.asarray(sketched, np.float64)
    y, diagonal = sketched[:, :-1], sketched[:, -1]
    n, k = y.shape
    omega = np.asarray(signs(n, k, jnp.float32), np.float64)
    core = omega.T @ y
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    real = values > max(0.0, -2 * values[0])
    scale = np.where(real, values, 1.0) ** -0.5 * real
    directions, roots, _ = np.linalg.svd(y @ (vectors * scale), full_matrices=False)
    missed = diagonal.sum() - np.sum(roots**2)
    return np.append(roots**2, missed if missed > _NOTHING * diagonal.sum() else 0.0), directions


def rank(values: np.ndarray, energy: float) -> int:
    """The smallest r whose first r values reach the share `energy` of their sum."""
    values = np.maximum(values, 0.0)  # a Gram matrix has none below zero but by rounding
    share = np.cumsum(values) / values.sum()
    # A share of 1 means every direction that the data has, and rounding must not hide the last.
    reached = share >= min(energy, 1.0 - 1e-12)
    return int(np.argmax(reached)) + 1


def check_energy(energy: float, name: str = "energy") -> None:
    """Raise if it is no share."""
    if not isinstance(energy, numbers.Real) or not 0.0 < energy <= 1.0:
        raise ValueError(f"{name} is {energy!r}; it must be in (0, 1]")


# --- what is summed over the batches -------------------------------------------------------------


def columns(n: int) -> int:
    """Columns of what is summed for a mode of size n: its Gram matrix, or a sketch."""
    return n if n <= WIDEST else COLUMNS + 1


def gram(x: jax.Array, axis: int) -> jax.Array:
    """The Gram matrix (n, n) of one axis of x, summed over all others, in x's dtype."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    return lax.dot_general(x, x, ((others, others), ((), ())), lax.Precision.HIGHEST)


def sketch(x: jax.Array, axis: int, k: int) -> jax.Array:
    """(n, k + 1): the sketch of that Gram matrix, which is not formed, in x's dtype."""
    others = tuple(i for i in range(x.ndim) if i != axis)
    omega = signs(x.shape[axis], k, x.dtype)
    small = lax.dot_general(x, omega, (((axis,), (0,)), ((), ())), lax.Precision.HIGHEST)
    rows = tuple(range(len(others)))
    y = lax.dot_general(x, small, ((others, rows), ((), ())), lax.Precision.HIGHEST)
    return jnp.column_stack([y, jnp.sum(x * x, others)])


def sketch_of(gram: np.ndarray, k: int) -> np.ndarray:
    """The sketch (..., n, k + 1) of Gram matrices (..., n, n) that are there already."""
    omega = np.asarray(signs(gram.shape[-1], k, jnp.float32), gram.dtype)
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    return np.concatenate([gram @ omega, diagonal[..., None]], -1)


def signs(n: int, k: int, dtype: Any) -> jax.Array:
    """Omega (n, k): random signs, exact in every dtype and the same in every call.

    Row i is the same for every n: a short last batch has the first rows of a batch mode's.
    """
    key = jax.random.key(0, impl="threefry2x32")
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
    bits = jax.vmap(lambda row: jax.random.bits(row, (k,), jnp.uint8))(rows)
    return jnp.where(bits % 2 == 0, jnp.ones((), dtype), -jnp.ones((), dtype))


def trace(sums: np.ndarray) -> np.ndarray:
    """The traces of Gram matrices (..., n, n), or of those whose sketches these are."""
    return np.trace(sums, axis1=-2, axis2=-1) if is_gram(sums) else sums[..., -1].sum(-1)


def is_gram(sums: np.ndarray) -> bool:
    """Whether these are Gram matrices; a sketch has far fewer columns than rows."""
    return sums.shape[-1] == sums.shape[-2]
