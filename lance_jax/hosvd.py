"""The leading subspace of a mode: one-shot higher-order SVD from its Gram matrix."""

import numbers

import numpy as np
import numpy.typing as npt

_ROUNDING = 1e-2  # of sums in bfloat16, relative to the largest


def subspace(gram: npt.ArrayLike, energy: float) -> np.ndarray:
    """Leading eigenvectors of a Gram matrix, as few as reach a share of its trace.

    The factor of one mode in the one-shot HOSVD of LANCE (arXiv 2509.21617, section 3), with the
    smallest sufficient rank.

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
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram has shape {gram.shape}; it must be a square matrix")
    if gram.dtype.kind not in "fiu" and gram.dtype.name != "bfloat16":
        raise ValueError(f"gram is {gram.dtype}; it must be real")
    if not np.isfinite(gram).all():
        raise ValueError("gram holds NaN or Inf; it must be finite")
    if not gram.any():
        raise ValueError("gram is all zero: it has no leading subspace")
    values, vectors = eigh(gram)
    exact = np.asarray(gram, np.float64)
    asymmetry = np.abs(exact - exact.T).max()
    if asymmetry > _ROUNDING * np.abs(exact).max() or values[-1] < -_ROUNDING * values[0]:
        raise ValueError("gram is no Gram matrix: it must be symmetric and positive semi-definite")
    dtype = np.promote_types(gram.dtype, np.float32)
    return vectors[:, : rank(values, energy)].astype(dtype)


def eigh(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in falling order and their eigenvectors, in float64."""
    gram = np.asarray(gram, np.float64)
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    return values[::-1], np.ascontiguousarray(vectors[:, ::-1])


def rank(values: np.ndarray, energy: float) -> int:
    """The smallest r whose first r values reach the share `energy` of their sum."""
    values = np.maximum(values, 0.0)  # a Gram matrix has none below zero but by rounding
    share = np.cumsum(values) / values.sum()
    # A share of 1 means every direction that the data has, and rounding must not hide the last.
    reached = share >= min(energy, 1.0 - 1e-12)
    return int(np.argmax(reached)) + 1


def check_energy(energy: float) -> None:
    """Raise if `energy` is no share."""
    if not isinstance(energy, numbers.Real) or not 0.0 < energy <= 1.0:
        raise ValueError(f"energy is {energy!r}; it must be in (0, 1]")
