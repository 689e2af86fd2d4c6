"""Slices: what finished tasks need of each layer's input; and new directions orthogonal to them."""

import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from jax.tree_util import DictKey, GetAttrKey, register_pytree_with_keys_class

from lance_jax import hosvd
from lance_jax.factors import FrozenMapping, table

RULES = ("residual", "total", "authors")

_NOTHING = 1e-10  # the share of a trace below which what is left of it is rounding
_ORTHONORMAL = 0.05


@register_pytree_with_keys_class
class Slices(FrozenMapping, Mapping[str, tuple[Any, ...]]):
    """What earlier tasks need of each layer's input: a frozen mapping and a pytree of host arrays.

    A layer's path -> a tuple with one entry for each finished task: an orthonormal basis (D, k),
    with the leading axes of a patch or feature basis (a group or scan step that needs fewer
    directions than another has columns of zeros), or None where the task needed no more than what
    was there.

    Attributes:
      energies: path -> a tuple with one array for each finished task: the task's energy along all
        directions protected after it (..., k of all tasks so far), relative to the largest.
    """

    __slots__ = ("energies",)

    energies: Mapping[str, tuple[np.ndarray, ...]]

    def __init__(
        self,
        bases: Mapping[str, tuple[Any, ...]] = types.MappingProxyType({}),
        energies: Mapping[str, tuple[Any, ...]] = types.MappingProxyType({}),
    ):
        if set(bases) != set(energies):
            raise ValueError("bases and energies must be of the same layers")
        object.__setattr__(self, "_layers", dict(bases))
        object.__setattr__(self, "energies", types.MappingProxyType(dict(energies)))

    @property
    def tasks(self) -> int:
        """The number of finished tasks."""
        return max((len(bases) for bases in self.values()), default=0)

    def protected(self, path: str) -> np.ndarray | None:
        """All of a layer's slices side by side (..., D, k); None where there is nothing."""
        bases = [basis for basis in self[path] if basis is not None]
        return np.concatenate(bases, -1) if bases else None

    @property
    def nbytes(self) -> int:
        """Bytes of all bases."""
        return sum(b.nbytes for bases in self.values() for b in bases if b is not None)

    def as_dict(self) -> dict[str, Any]:
        """Nested dicts of the arrays alone, as they are stored: path -> bases and energies by task.

        What is None or empty has no entry: a checkpoint cannot hold it. So `tasks` says how many
        there are.
        """
        stored = {}
        for path, bases in self.items():
            energies = enumerate(self.energies[path])
            stored[path] = {
                "tasks": np.asarray(len(bases)),
                "bases": {str(t): basis for t, basis in enumerate(bases) if basis is not None},
                "energies": {str(t): one for t, one in energies if one.size},
            }
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Slices":
        """The inverse of `as_dict`."""
        bases, energies = {}, {}
        for path, of in stored.items():
            tasks = [str(t) for t in range(int(of["tasks"]))]
            bases[path] = tuple(of["bases"].get(t) for t in tasks)
            energies[path] = tuple(of["energies"].get(t, np.zeros(0, np.float32)) for t in tasks)
        return cls(bases, energies)

    def __repr__(self) -> str:
        rows = [("path", "D", "protected", "free", "by task")]
        for path, bases in self.items():
            counts = [0 if basis is None else basis.shape[-1] for basis in bases]
            sizes = {basis.shape[-2] for basis in bases if basis is not None}
            d = next(iter(sizes), 0)
            free = str(d - sum(counts)) if d else "all"
            rows.append((path, str(d or "-"), str(sum(counts)), free, " ".join(map(str, counts))))
        return table(rows)

    def tree_flatten_with_keys(self):
        children = [(DictKey(path), bases) for path, bases in self.items()]
        return [*children, (GetAttrKey("energies"), dict(self.energies))], tuple(self)

    @classmethod
    def tree_unflatten(cls, paths, children):
        new = object.__new__(cls)
        *bases, energies = children
        object.__setattr__(new, "_layers", dict(zip(paths, bases, strict=True)))
        object.__setattr__(new, "energies", energies)
        return new


# --- new directions ------------------------------------------------------------------------------


def complement(
    gram: npt.ArrayLike, protected: npt.ArrayLike | None, energy: float, *, rule: str = "residual"
) -> np.ndarray:
    """The fewest leading directions of a Gram matrix, orthogonal to a protected basis P.

    They are eigenvectors of the residual (I - P P^T) C (I - P P^T), and as many as reach `energy`

    * "residual": of the residual's own trace: what a new task may use;
    * "total": of the trace of C, with what P explains, tr P^T C P: what a task needs beside P
      (the rule of gradient projection memory, arXiv 2103.09762, equation 9);
    * "authors": of the trace of C too, as LANCE's published code counts: left singular vectors of
      the one-sided (I - P P^T) C with its singular values, one more than stay at or below `energy`.
      It finds more directions than "total" for `protect`, and fewer than "residual" for `allocate`.

    Args:
      gram: C (D, D), symmetric positive semi-definite: the sum of x x^T over the inputs.
      protected: P (D, k) with orthonormal columns; None or k = 0 where nothing is protected.
      energy: the share to reach, in (0, 1].
      rule: "residual", "total" or "authors".

    Returns:
      (D, r) orthonormal columns, orthogonal to P, of `gram`'s floating dtype (at least float32), in
      falling order of energy; r is 0 where nothing is left, or nothing more is needed. What may be
      rounding, by the eigenvalues below zero that rounding has made, counts as nothing. Computed in
      float64 on the host.

    Raises:
      ValueError: for an unknown rule, an `energy` outside (0, 1], and what is no Gram matrix or no
        orthonormal basis.
    """
    hosvd.check_energy(energy)
    check_rule(rule)
    gram = np.asarray(gram)
    hosvd.check_gram(gram)
    if len(gram) == 0:
        raise ValueError("gram is empty; it must have a row for each element of an input")
    dtype = np.promote_types(gram.dtype, np.float32)
    basis = _checked_basis(protected, len(gram))
    return complement_of(np.asarray(gram, np.float64), basis, energy, rule).astype(dtype)


def check_rule(rule: str) -> None:
    """Raise for an unknown rule."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(map(repr, RULES))}")


def _checked_basis(protected: npt.ArrayLike | None, n: int) -> np.ndarray:
    basis = np.zeros((n, 0)) if protected is None else np.asarray(protected, np.float64)
    if basis.ndim != 2 or len(basis) != n or basis.shape[1] > n:
        raise ValueError(
            f"protected has shape {basis.shape}; it must be ({n}, k) with k of {n} or less"
        )
    check_orthonormal(basis, "the columns of protected")
    return basis


def complement_of(sums: np.ndarray, basis: np.ndarray, energy: float, rule: str) -> np.ndarray:
    """`complement` of a Gram matrix or a sketch of one (`hosvd`), in float64.

    ValueError where a sketch has too few directions to reach the energy.
    """
    basis = np.linalg.qr(basis)[0]  # stored in few bits, it is orthonormal only nearly
    values, directions, total, noise = _residual(sums, basis, one_sided=rule == "authors")
    values = np.where(values > max(noise, _NOTHING * total), values, 0.0)
    left = values.sum()
    free = len(basis) - basis.shape[1]
    if left == 0 or free <= 0:
        return np.zeros((len(basis), 0))
    if rule == "residual":
        r = hosvd.rank(values, energy)
    else:
        shares = (total - left + np.cumsum(values)) / total
        enough = shares <= energy if rule == "authors" else shares < energy * (1 - 1e-12)
        r = int(np.sum(enough)) + (rule == "authors" or (total - left) / total < energy)
        r = min(r, int(np.flatnonzero(values)[-1]) + 1)
    r, most = min(r, free), directions.shape[1]
    if r > most:
        held = 1 - values[-1] / (left if rule == "residual" else total)
        raise ValueError(
            f"a share of {energy} was asked for, and the {most} directions that are sought in one "
            f"so wide ({len(basis)}) hold {np.floor(held * 1000) / 1000}; ask for less"
        )
    return _away(directions[:, :r], basis)


def check_orthonormal(basis: np.ndarray, name: str) -> None:
    """ValueError unless the columns (..., D, k) are orthonormal, but for columns of zeros.

    As nearly as bases are which were stored in few bits.
    """
    products = np.swapaxes(basis, -1, -2) @ basis
    used = np.any(basis, axis=-2, keepdims=True) * np.eye(basis.shape[-1])
    error = np.abs(products - used).max(initial=0.0)
    if not error <= _ORTHONORMAL:
        raise ValueError(
            f"{name} are not orthonormal: P^T P differs from the identity by {error:.2g}"
        )


def _residual(
    sums: np.ndarray, basis: np.ndarray, one_sided: bool
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Of what the basis does not explain: values in falling order, and their directions.

    Then the trace of C, and how large an eigenvalue can be that rounding has made: twice what lies
    below zero, where a Gram matrix has none. The last value of a sketch is what its directions
    miss, and `hosvd.nystrom` has left out the rounding.
    """
    if not hosvd.is_gram(sums):
        values, vectors = hosvd.nystrom(sums)
        missed = values[-1]
        parts = _without(vectors * np.sqrt(values[:-1]), basis)
        directions, roots, _ = np.linalg.svd(parts, full_matrices=False)
        return np.append(roots**2, missed), directions, float(values.sum()), 0.0
    total = float(np.trace(sums))
    once = _without(sums, basis)
    values, directions = hosvd.eigh(sums if one_sided else _without(once.T, basis))
    hosvd.check_positive(values, total)
    noise = -2 * min(values[-1], 0.0)
    if one_sided:
        directions, values, _ = np.linalg.svd(once)
    return values, directions, total, noise


def _without(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(I - P P^T) x."""
    return x - basis @ (basis.T @ x)


def _away(directions: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Orthonormal columns of the same span, orthogonal to the basis: projected out twice."""
    return np.linalg.qr(_without(_without(directions, basis), basis))[0]
