"""Continual learning: each task trains in directions orthogonal to what earlier tasks need.

The input of a layer is seen as vectors of D elements: the patches under a convolution's kernel
(rows kernel height, kernel width, channel), or a dense layer's features. After a task `protect`
adds a slice, an orthonormal basis of the directions that it needs, orthogonal to the slices of the
tasks before. Before the next task `allocate` finds directions orthogonal to all slices that hold
the new task's input, and confines each layer's weight gradient to them. A training step has these
alone: no slice and no projection matrix (LANCE, arXiv 2509.21617, section 4; gradient projection
memory, Saha et al. 2021, arXiv 2103.09762).
"""

import itertools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lance_jax import hosvd, jaxprs, layer_rule
from lance_jax.calibrate import Select, first_batch, selected
from lance_jax.factors import Factors, LayerFactors, as_factors, check_core_dtype
from lance_jax.grams import sum_grams
from lance_jax.layers import Layers, Use, find
from lance_jax.memory import kept_bytes
from lance_jax.modes import accumulator
from lance_jax.slices import Slices as Slices
from lance_jax.slices import check_orthonormal, check_rule, complement_of
from lance_jax.slices import complement as complement
from lance_jax.transform import check


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
    hosvd.check_energy(threshold, "threshold")
    slices = _slices_or_none_yet(slices)
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
      core_dtype: how inputs and cores are stored, as in `LayerFactors`.

    Returns:
      `Factors` with an `update` for each layer, or `frozen`.

    Raises:
      ValueError: for bad arguments, or inputs that are not finite.
    """
    hosvd.check_energy(energy)
    check_core_dtype(core_dtype)
    _check_scale(scale)
    slices = _slices_or_none_yet(slices)
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


def _slices_or_none_yet(slices: Slices | None) -> Slices:
    if not isinstance(slices, Slices | None):
        raise ValueError(f"slices is a {type(slices).__name__}; it must be a Slices or None")
    return Slices() if slices is None else slices


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, numbers.Real) and 0 < scale < math.inf):
        raise ValueError(f"scale is {scale!r}; it must be None or a positive number")


def _layer_grams(
    apply_fn: Callable, params: Any, batches: Iterable[Any], select: Select
) -> dict[str, tuple[list[Use], np.ndarray]]:
    """path -> (uses, Gram matrices (..., D, D) of the input over all batches, or sketches)."""
    first, rest = first_batch(batches)
    found = find(jaxprs.trace(apply_fn, params, *first))
    wanted = {}
    products = [layer for layer in found.layers if layer.kind != "block"]
    for layer in selected(select, Layers(products, found.layers.skipped)):
        mode = found.uses[layer.path][0].of_product().update_mode
        if mode not in layer.modes:
            raise ValueError(
                f"the uses of {layer.path!r} differ in the size of their {mode} mode; leave it out"
            )
        wanted[layer.path] = (mode,)
    total = sum_grams(apply_fn, params, itertools.chain([first], rest), wanted)
    grams = {}
    for path, sums in total.items():
        (one,) = sums.values()
        if not np.isfinite(one).all():
            raise ValueError(
                f"the input of {path!r} holds NaN or Inf, or values whose squares are Inf, in "
                "these batches"
            )
        grams[path] = found.uses[path], one
    if not any(one.any() for _, one in grams.values()):
        raise ValueError("the inputs of all layers are zero in these batches, or hold no sample")
    return grams


def _directions(
    path: str, sums: np.ndarray, protected: np.ndarray | None, energy: float, rule: str
) -> np.ndarray:
    """`complement` of each of stacked sums: (..., D, r), with columns of zeros at the end."""
    check_rule(rule)
    d = sums.shape[-2]
    stack = sums.reshape(-1, *sums.shape[-2:])
    before = np.zeros((*sums.shape[:-1], 0)) if protected is None else protected
    _check_slices(path, before, sums.shape[:-1])
    before = before.reshape(len(stack), d, before.shape[-1]).astype(np.float64)
    try:
        found = [
            complement_of(one, basis[:, basis.any(0)], energy, rule)
            for one, basis in zip(stack, before, strict=True)
        ]
    except ValueError as error:
        raise ValueError(f"the input of {path!r}: {error}") from None
    r = max(u.shape[1] for u in found)
    padded = np.stack([np.pad(u, ((0, 0), (0, r - u.shape[1]))) for u in found])
    return padded.reshape(*sums.shape[:-1], r)


def _check_slices(path: str, protected: np.ndarray, shape: tuple[int, ...]) -> None:
    """They are (..., D, k) of a layer whose bases are (..., D), and orthonormal."""
    if protected.shape[:-1] != shape:
        told = f"the slices of {path!r} have shape {protected.shape}; its input has D = {shape[-1]}"
        raise ValueError(f"{told}, in {shape[:-1]} groups or steps" if shape[:-1] else told)
    check_orthonormal(protected, f"the slices of {path!r}")


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
    total = np.zeros((*energies[-1].shape[:-1], k))
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


# --- updates ------------------------------------------------------------------------------------


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

    Raises:
      ValueError: for factors that are not of these layers; by its `init` and `update`, where the
        optimiser's tree has none of these layers' paths.
    """
    factors = as_factors(factors)
    found = find(jaxprs.trace(apply_fn, params, *args))
    check(factors, found)
    bases = {path: layer.update for path, layer in factors.items() if layer.update is not None}
    frozen = {path for path, layer in factors.items() if layer.frozen}

    def project(path: str, update: jax.Array, basis: jax.Array | None) -> jax.Array:
        if basis is not None:
            return _confine(found.uses[path][0], update, basis)
        return jnp.zeros_like(update) if path in frozen else update

    return _by_layer(project, bases, {*bases, *frozen})


def project_out(
    slices: Slices | None, apply_fn: Callable, params: Any, *args: Any, scale: float | None = None
) -> optax.GradientTransformation:
    """An optax transformation that takes what is protected out of gradients: dW - P (P^T dW).

    Gradient projection memory (arXiv 2103.09762) in its lean form, without a (D, D) matrix; P is
    held while training. For comparison: `allocate` needs no P in training.

    Args:
      slices: those of the earlier tasks; None before the first.
      apply_fn, params, *args: a call whose layers they are; any argument may be a
        `jax.ShapeDtypeStruct`.
      scale: alpha of scaled gradient projection, dW - P diag(importance) P^T dW, as for `allocate`.

    Raises:
      ValueError: for a bad scale, and slices that are not of these layers; by its `init` and
        `update`, where the optimiser's tree has none of these layers' paths.
    """
    _check_scale(scale)
    slices = _slices_or_none_yet(slices)
    found = find(jaxprs.trace(apply_fn, params, *args))
    bases = {}
    for path in slices:
        protected = slices.protected(path)
        if path not in found.uses:
            raise ValueError(f"slices have a layer {path!r}; there are {', '.join(found.uses)}")
        if protected is None:
            continue
        use = found.uses[path][0]
        shape = (*use.stack, *use.product.basis_shape(use.of_product().update_mode))
        _check_slices(path, protected, shape)
        if scale is not None:
            importance = _importance(slices.energies[path], protected.shape[-1], scale)
            protected = protected * np.sqrt(importance)[..., None, :]
        bases[path] = jnp.asarray(protected, accumulator(use.x.dtype))

    def project(path: str, update: jax.Array, basis: jax.Array | None) -> jax.Array:
        if basis is None:
            return update
        return update - _confine(found.uses[path][0], update, basis)

    return _by_layer(project, bases, set(bases))


def _confine(use: Use, update: jax.Array, basis: jax.Array) -> jax.Array:
    """U U^T of an update of the layer's weight."""
    confine = layer_rule.exact(use.of_product()).confine
    for _ in use.stack:
        confine = jax.vmap(confine)
    return confine(update, basis)


def _by_layer(
    project: Callable, bases: dict[str, jax.Array], layers: set[str]
) -> optax.GradientTransformation:
    """project(path, update, basis or None) of every update; the bases are its state."""

    def check_tree(tree: Any) -> None:
        # what does not train is None or masked there
        leaves = jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda leaf: leaf is None or isinstance(leaf, optax.MaskedNode)
        )
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        if missing := sorted(layers - set(paths)):
            raise ValueError(
                f"the optimiser's parameters have no {missing[0]!r}, which apply_fn has: it needs "
                f"the tree that apply_fn takes, and they have {', '.join(paths)}"
            )

    def init(params: Any) -> dict[str, jax.Array]:
        check_tree(params)
        return bases

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        check_tree(updates)

        def one(path: Any, update: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return project(name, update, state.get(name))

        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(init, update)
