"""Continual learning: each task trains in directions orthogonal to what earlier tasks need.

The input of a layer is seen as vectors of D elements: the patches under a convolution's kernel
(rows kernel height, kernel width, channel), or a dense layer's features. After a task `protect`
adds a slice, an orthonormal basis of the directions that it needs, orthogonal to the slices of the
tasks before. Before the next task `allocate` finds directions orthogonal to all slices that hold
the new task's input, and confines each layer's weight gradient to them. A training step has these
alone: no slice and no projection matrix (LANCE, arXiv 2509.21617, section 4; gradient projection
memory, Saha et al. 2021, arXiv 2103.09762).
"""

import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax.tree_util import DictKey, GetAttrKey, register_pytree_with_keys_class

from lance_jax import hosvd, jaxprs
from lance_jax.calibrate import Select, first_batch, selected, sum_grams
from lance_jax.factors import Factors, FrozenMapping, LayerFactors, check_core_dtype, table
from lance_jax.memory import kept_bytes
from lance_jax.modes import accumulator
from lance_jax.transform import Use, check, find

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
      falling order of energy; r is 0 where nothing is left, or nothing more is needed. Computed in
      float64 on the host.

    Raises:
      ValueError: for an unknown rule, an `energy` outside (0, 1], and what is no Gram matrix or no
        orthonormal basis.
    """
    hosvd.check_energy(energy)
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(map(repr, RULES))}")
    gram = np.asarray(gram)
    hosvd.check_gram(gram)
    if len(gram) == 0:
        raise ValueError("gram is empty; it must have a row for each element of an input")
    dtype = np.promote_types(gram.dtype, np.float32)
    basis = _checked_basis(protected, len(gram))
    return _complement(np.asarray(gram, np.float64), basis, energy, rule).astype(dtype)


def _checked_basis(protected: npt.ArrayLike | None, n: int) -> np.ndarray:
    basis = np.zeros((n, 0)) if protected is None else np.asarray(protected, np.float64)
    if basis.ndim != 2 or len(basis) != n or basis.shape[1] > n:
        raise ValueError(
            f"protected has shape {basis.shape}; it must be ({n}, k) with k of {n} or less"
        )
    error = np.abs(basis.T @ basis - np.eye(basis.shape[1])).max(initial=0.0)
    if not error <= _ORTHONORMAL:
        raise ValueError(
            f"the columns of protected are not orthonormal: P^T P differs from the identity by "
            f"{error:.2g}"
        )
    return basis


def _complement(sums: np.ndarray, basis: np.ndarray, energy: float, rule: str) -> np.ndarray:
    """`complement` of a Gram matrix or a sketch of one (`hosvd`), in float64."""
    values, directions, total = _residual(sums, basis, one_sided=rule == "authors")
    left = values.sum()
    free = min(len(basis) - basis.shape[1], directions.shape[1])
    if left <= _NOTHING * total or free <= 0:
        return np.zeros((len(basis), 0))
    if rule == "residual":
        r = hosvd.rank(values, energy)
    else:
        shares = (total - left + np.cumsum(values)) / total
        enough = shares <= energy if rule == "authors" else shares < energy * (1 - 1e-12)
        r = int(np.sum(enough)) + (rule == "authors" or (total - left) / total < energy)
    return _away(directions[:, : min(r, free)], basis)


def _residual(
    sums: np.ndarray, basis: np.ndarray, one_sided: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """(Values in falling order, their directions, trace of C) of what the basis does not explain.

    The last value of a sketch is what its directions miss.
    """
    if not hosvd.is_gram(sums):
        values, vectors = hosvd.nystrom(sums)
        missed = values[-1]
        parts = _without(vectors * np.sqrt(values[:-1]), basis)
        directions, roots, _ = np.linalg.svd(parts, full_matrices=False)
        return np.append(roots**2, missed), directions, float(values.sum())
    total = float(np.trace(sums))
    once = _without(sums, basis)
    if one_sided:
        directions, values, _ = np.linalg.svd(once)
        return values, directions, total
    values, directions = hosvd.eigh(_without(once.T, basis))
    hosvd.check_positive(values, total)
    return np.maximum(values, 0.0), directions, total


def _without(x: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(I - P P^T) x."""
    return x - basis @ (basis.T @ x)


def _away(directions: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Orthonormal columns of the same span, orthogonal to the basis: projected out twice."""
    return np.linalg.qr(_without(_without(directions, basis), basis))[0]


# --- tasks ---------------------------------------------------------------------------------------


def protect(
    slices: Slices | None,
    apply_fn: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    select: Select = None,
    threshold: float,
    rule: str = "total",
) -> Slices:
    """The slices after a task: one more for each layer, of the directions that the task needs.

    Those are the fewest which, with what the slices before explain, hold `threshold` of the energy
    of the layer's input over the batches (`complement`). How many pictures enter matters more than
    the rule.

    Args:
      slices: those of the earlier tasks; None after the first.
      apply_fn: any JAX function of (params, *args); what it computes in evaluation.
      params: its parameters after the task.
      batches: the task's data, as for `calibrate`.
      select: which layers, as for `calibrate`; the same for all tasks.
      threshold: the share of energy to keep, in (0, 1].
      rule: that of `complement`: "total" or "authors".

    Returns:
      `Slices` of float32 (float64 for float64 inputs) arrays on the host.

    Raises:
      ValueError: for bad arguments, layers that are not those of the earlier tasks, or inputs that
        are not finite.
    """
    hosvd.check_energy(threshold)
    slices = Slices() if slices is None else slices
    grams = _layer_grams(apply_fn, params, batches, select)
    if slices and set(slices) != set(grams):
        only = ", ".join(sorted(set(slices) ^ set(grams)))
        raise ValueError(f"select must choose the same layers after every task; {only} differs")
    bases, energies = {}, {}
    for path, (uses, sums) in grams.items():
        before = slices.protected(path) if path in slices else None
        new = _directions(path, sums, before, threshold, rule)
        dtype = np.dtype(accumulator(uses[0].x.dtype))
        basis = new.astype(dtype) if new.shape[-1] else None
        bases[path] = (*slices.get(path, ()), basis)
        parts = [part for part in (before, new) if part is not None]
        along = _energies(sums, np.concatenate(parts, -1)).astype(dtype)
        energies[path] = (*slices.energies.get(path, ()), along)
    return Slices(bases, energies)


def allocate(
    slices: Slices | None,
    apply_fn: Callable,
    params: Any,
    batches: Iterable[Any],
    *,
    select: Select = None,
    energy: float = 0.98,
    scale: float | None = None,
    rule: str = "residual",
    core_dtype: str | None = "int4",
) -> Factors:
    """Factors for `compress` that confine a new task to directions orthogonal to all slices.

    `U` of each layer holds `energy` of what the slices leave of the new task's input
    (`complement`), and dW becomes U U^T dW. What is kept of the input is independent of it: the
    cheaper of the input itself and its core by U, in `core_dtype`. Where nothing is left, the layer
    is frozen.

    Args:
      slices: those of the earlier tasks; None before the first.
      apply_fn, params, batches, select: as for `calibrate`, of the new task.
      energy: the share of the residual's energy to reach, in (0, 1].
      scale: alpha of scaled gradient projection (Saha and Roy 2023, arXiv 2302.01386): protected
        directions come back with the weight sqrt(1 - importance), where a task's importance of a
        direction is (alpha + 1) s / (alpha s + 1), s its singular value relative to the largest,
        and those of all tasks are added up to 1. Gives up exact orthogonality. None: not at all.
      rule: that of `complement`: "residual" or "authors".
      core_dtype: how inputs and cores are stored; None, "bfloat16", "int8" or "int4".

    Returns:
      `Factors` with an `update` for each layer, or `frozen`.

    Raises:
      ValueError: for bad arguments, or inputs that are not finite.
    """
    hosvd.check_energy(energy)
    check_core_dtype(core_dtype)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale!r}; it must be None or positive")
    slices = Slices() if slices is None else slices
    layers = {}
    for path, (uses, sums) in _layer_grams(apply_fn, params, batches, select).items():
        if slices and path not in slices:
            raise ValueError(f"slices have no layer {path!r}; they have {', '.join(slices)}")
        protected = slices.protected(path) if slices else None
        u = _directions(path, sums, protected, energy, rule)
        if protected is not None and scale is not None:
            weights = np.sqrt(1 - _importance(slices.energies[path], protected.shape[-1], scale))
            u = np.concatenate([u, protected * weights[..., None, :]], -1)
        u = u[..., u.any(tuple(range(u.ndim - 1)))]
        update = jnp.asarray(u, accumulator(uses[0].x.dtype)) if u.shape[-1] else None
        layers[path] = _cheapest(uses, update, core_dtype)
    return Factors(layers)


def _layer_grams(
    apply_fn: Callable, params: Any, batches: Iterable[Any], select: Select
) -> dict[str, tuple[list[Use], np.ndarray]]:
    """path -> (uses, Gram matrices (..., D, D) of the input over all batches, or sketches)."""
    first, rest = first_batch(batches)
    found = find(jaxprs.trace(apply_fn, params, *first))
    wanted = {}
    for layer in selected(select, found.layers):
        mode = found.uses[layer.path][0].product.update_mode
        if mode not in layer.modes:
            raise ValueError(
                f"the uses of {layer.path!r} differ in the size of their {mode} mode; leave it out"
            )
        wanted[layer.path] = (mode,)
    total = sum_grams(apply_fn, params, [first, *rest], wanted)
    grams = {}
    for path, sums in total.items():
        (one,) = sums.values()
        if not np.isfinite(one).all():
            raise ValueError(f"the input of {path!r} holds NaN or Inf in these batches")
        grams[path] = found.uses[path], one
    return grams


def _directions(
    path: str, sums: np.ndarray, protected: np.ndarray | None, energy: float, rule: str
) -> np.ndarray:
    """`_complement` of each of stacked sums: (..., D, r), with columns of zeros at the end."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; it must be one of {', '.join(map(repr, RULES))}")
    d = sums.shape[-2]
    stack = sums.reshape(-1, *sums.shape[-2:])
    before = np.zeros((len(stack), d, 0)) if protected is None else protected
    if before.shape[-2] != d or before.size // (d * max(before.shape[-1], 1)) != len(stack) * bool(
        before.shape[-1]
    ):
        raise ValueError(f"the slices of {path!r} have shape {before.shape}; its input has D = {d}")
    before = before.reshape(len(stack), d, -1).astype(np.float64)
    found = [
        _complement(one, basis[:, basis.any(0)], energy, rule)
        for one, basis in zip(stack, before, strict=True)
    ]
    r = max(u.shape[1] for u in found)
    padded = np.stack([np.pad(u, ((0, 0), (0, r - u.shape[1]))) for u in found])
    return padded.reshape(*sums.shape[:-1], r)


def _energies(sums: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Energy along each direction (..., k), relative to the largest."""
    stack = sums.reshape(-1, *sums.shape[-2:])
    along = []
    for one, u in zip(stack, basis.reshape(len(stack), basis.shape[-2], -1), strict=True):
        if hosvd.is_gram(one):
            along.append(np.sum(u * (one @ u), 0))
        else:
            values, vectors = hosvd.nystrom(one)
            along.append(values[:-1] @ (vectors.T @ u) ** 2)
    energies = np.maximum(np.stack(along), 0.0)
    largest = energies.max(-1, keepdims=True, initial=0.0)
    energies = energies / np.where(largest > 0, largest, 1.0)
    return energies.reshape(*basis.shape[:-2], basis.shape[-1])


def _importance(energies: tuple[np.ndarray, ...], k: int, scale: float) -> np.ndarray:
    """(..., k) in [0, 1]: of the directions of all tasks, the sum of their importance for each."""
    total = np.zeros((*energies[0].shape[:-1], k))
    for one in energies:
        s = np.sqrt(np.asarray(one, np.float64))
        total[..., : s.shape[-1]] += (scale + 1) * s / (scale * s + 1)
    return np.minimum(total, 1.0)


def _cheapest(uses: list[Use], update: Any, core_dtype: str | None) -> LayerFactors:
    """Confined to `update`, keeping what is smaller: the input, or its core by it."""
    if update is None:
        return LayerFactors({}, core_dtype=core_dtype, frozen=True)
    forms = [
        LayerFactors({}, core_dtype=core_dtype, update=update, update_core=by_update)
        for by_update in (False, True)
    ]
    return min(forms, key=lambda factors: kept_bytes(uses, factors))


# --- other optimisers ----------------------------------------------------------------------------


def project_updates(
    factors: Factors, apply_fn: Callable, params: Any, *args: Any
) -> optax.GradientTransformation:
    """An optax transformation that confines an optimiser's updates, to be the last of a chain.

    SGD with momentum needs none: its updates are sums of confined gradients. The scaling of Adam
    and weight decay leave the span of the factors' `update`, and here each update is projected onto
    it, and that of a frozen layer is zero.

    Args:
      factors: those of the current task, from `allocate`.
      apply_fn, params, *args: a call whose layers they are; any argument may be a
        `jax.ShapeDtypeStruct`.
    """
    found = find(jaxprs.trace(apply_fn, params, *args))
    check(factors, found)

    def confine(path: Any, update: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if update is None or name not in factors:
            return update
        layer = factors[name]
        if layer.frozen:
            return jnp.zeros_like(update)
        if layer.update is None:
            return update
        use = found.uses[name][0]
        confined = use.product.confine
        for _ in use.stack:
            confined = jax.vmap(confined)
        return confined(update, layer.update)

    def project(updates: Any, params: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(confine, updates, is_leaf=lambda x: x is None)

    return optax.stateless(project)
