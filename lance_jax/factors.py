"""Factors: for each layer, what of its input is kept for the backward pass."""

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys_class

CORE_DTYPES = (None, "bfloat16", "int8", "int4", "int8_stochastic", "int4_stochastic")

_ORTHONORMAL = 0.05  # bases in bfloat16 are welcome

Array = Any  # jax.Array, numpy.ndarray, or the shape of one


class Skipped(NamedTuple):
    """What looks like a layer but is not compressed, and why.

    Attributes:
      path: the parameter's key path, joined by `/`.
      reason: a sentence's end, as in "skipped PATH: REASON".
    """

    path: str
    reason: str


class Frozen:
    """A pytree node whose attributes cannot be set."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name!r}")

    def __reduce__(self: Any) -> tuple[Any, ...]:
        # a mapping proxy can be neither copied nor pickled
        children, static = self.tree_flatten_with_keys()
        return type(self).tree_unflatten, (static, [child for _, child in children])


@register_pytree_with_keys_class
class LayerFactors(Frozen):
    """What one layer keeps of its input, and what its weight gradient is confined to.

    Args:
      bases: mode name -> (n, r) array with orthonormal columns, n the size of that mode of the
        layer's input and r its rank; (groups, n, r) for the patch mode of a grouped convolution;
        with a leading axis of length L for a layer scanned over L steps. No basis at all keeps
        the whole input, in `core_dtype`.
      mean: the calibration mean of the input, of the input's shape without its batch axis; its
        share of the weight gradient is exact, and only the rest is projected. None: not centred.
      core_dtype: None (the input's), "bfloat16", "int8", "int4", or one of the latter two rounded
        stochastically: "int8_stochastic", "int4_stochastic". Those round right on average over
        cores that differ; the same core is rounded the same way each time.
      update: U (D, r), with the leading axes of a basis, in the patch mode of a convolution or the
        feature mode of a dense layer: the weight gradient becomes U U^T dW, for continual learning
        (`lance_jax.continual`). Its columns are orthonormal, or shorter, or zeros. None:
        unconfined.
      update_core: whether the core by `update` is what is kept; there are no `bases` then.
      frozen: whether the weight gradient is zero; nothing is kept then.

    Raises:
      ValueError: for an unknown `core_dtype`, for what is no array, for bases whose values are
        known (not traced) and are not finite with orthonormal columns, and for settings that
        exclude each other.
    """

    __slots__ = ("bases", "core_dtype", "frozen", "mean", "update", "update_core")

    bases: Mapping[str, Array]
    mean: Array | None
    core_dtype: str | None
    update: Array | None
    update_core: bool
    frozen: bool

    def __init__(
        self,
        bases: Mapping[str, Array],
        mean: Array | None = None,
        core_dtype: str | None = None,
        *,
        update: Array | None = None,
        update_core: bool = False,
        frozen: bool = False,
    ):
        check_core_dtype(core_dtype)
        if not isinstance(bases, Mapping):
            raise ValueError(f"bases is a {type(bases).__name__}; it must map mode names to arrays")
        for mode, basis in bases.items():
            _check_basis(mode, basis)
        if mean is not None and not hasattr(mean, "shape"):
            raise ValueError(f"mean is a {type(mean).__name__}; it must be an array")
        if update is not None:
            _check_update(update)
        if update_core and (update is None or bases or mean is not None):
            raise ValueError("update_core needs an update, and goes with no bases and no mean")
        if frozen and (bases or mean is not None or update is not None):
            raise ValueError("a frozen layer keeps nothing: it has no bases, no mean and no update")
        self._set(
            types.MappingProxyType(dict(bases)), mean, update, core_dtype, update_core, frozen
        )

    def __repr__(self) -> str:
        bases = ", ".join(f"{mode}: {_shape(u)}" for mode, u in self.bases.items())
        mean = "" if self.mean is None else f", mean {_shape(self.mean)}"
        update = "" if self.update is None else f", update {_shape(self.update)}"
        flags = "".join(f", {name}" for name in ("update_core", "frozen") if getattr(self, name))
        return f"LayerFactors({{{bases}}}{mean}, core_dtype={self.core_dtype!r}{update}{flags})"

    @property
    def ranks(self) -> dict[str, int]:
        """Mode name -> rank."""
        return {mode: u.shape[-1] for mode, u in self.bases.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the bases, the mean and the update."""
        return sum(_nbytes(leaf) for leaf in jax.tree.leaves(self))

    def tree_flatten_with_keys(self):
        children = {"bases": dict(self.bases), "mean": self.mean, "update": self.update}
        keyed = tuple((GetAttrKey(name), child) for name, child in children.items())
        return keyed, (self.core_dtype, self.update_core, self.frozen)

    @classmethod
    def tree_unflatten(cls, static, children):
        # Past __init__: a tree may hold any leaves, and jax forbids checks here.
        new = object.__new__(cls)
        bases, mean, update = children
        if isinstance(bases, dict):
            bases = types.MappingProxyType(bases)
        new._set(bases, mean, update, *static)
        return new

    def _set(
        self, bases: Any, mean: Any, update: Any, core_dtype: Any, update_core: Any, frozen: Any
    ) -> None:
        object.__setattr__(self, "bases", bases)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "update", update)
        object.__setattr__(self, "core_dtype", core_dtype)
        object.__setattr__(self, "update_core", update_core)
        object.__setattr__(self, "frozen", frozen)


def _check_basis(mode: str, basis: Any) -> None:
    if not (hasattr(basis, "shape") and hasattr(basis, "dtype")):
        raise ValueError(f"the {mode!r} basis is a {type(basis).__name__}; it must be an array")
    # What does not fit the layer is told by `compress`, which knows the layer.
    fits = basis.ndim >= 2 and basis.shape[-1] <= basis.shape[-2]
    if not (_is_known(basis) and fits):
        return
    u = np.asarray(basis, np.float32)
    if not np.isfinite(u).all():
        raise ValueError(f"the {mode!r} basis holds NaN or Inf")
    error = np.abs(np.swapaxes(u, -1, -2) @ u - np.eye(u.shape[-1])).max(initial=0.0)
    if error > _ORTHONORMAL:
        raise ValueError(
            f"the columns of the {mode!r} basis are not orthonormal: U^T U differs from the "
            f"identity by {error:.2g}"
        )


def _check_update(update: Any) -> None:
    if not (hasattr(update, "shape") and hasattr(update, "dtype")):
        raise ValueError(f"update is a {type(update).__name__}; it must be an array")
    if not (_is_known(update) and update.ndim >= 2):
        return
    u = np.asarray(update, np.float32)
    if not np.isfinite(u).all():
        raise ValueError("update holds NaN or Inf")
    products = np.swapaxes(u, -1, -2) @ u
    error = np.abs(products - np.eye(u.shape[-1]) * np.minimum(products, 1)).max(initial=0.0)
    if error > _ORTHONORMAL:
        raise ValueError(
            "the columns of update must be orthogonal and of length 1 or less: U^T U is off by "
            f"{error:.2g}"
        )


def _is_known(array: Any) -> bool:
    """Whether an array's values can be looked at, and are floating."""
    known = isinstance(array, np.ndarray) or (
        isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.is_fully_addressable
    )
    return known and jnp.issubdtype(array.dtype, jnp.floating)


class FrozenMapping(Frozen, Mapping):
    """A mapping from layers' paths that cannot be changed, and equals only itself."""

    __slots__ = ("_layers",)

    def __getitem__(self, path: str) -> Any:
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        return self is other  # arrays have no truth value to compare by

    def __hash__(self) -> int:
        return id(self)


@register_pytree_with_keys_class
class Factors(FrozenMapping, Mapping[str, LayerFactors]):
    """A frozen mapping from a layer's path to its `LayerFactors`, and a pytree.

    Calibration makes one (`lance_jax.calibrate`); it can also be built by hand:
    `Factors({"dense/kernel": LayerFactors({"feature": u})})`.

    Attributes:
      skipped: the selected layers that calibration gave no factors.
    """

    __slots__ = ("skipped",)

    skipped: tuple[Skipped, ...]

    def __init__(
        self,
        layers: Mapping[str, LayerFactors] = types.MappingProxyType({}),
        skipped: tuple[Skipped, ...] = (),
    ):
        for path, layer in layers.items():
            if not isinstance(layer, LayerFactors):
                kind = type(layer).__name__
                raise ValueError(f"factors[{path!r}] is a {kind}; it must be a LayerFactors")
        object.__setattr__(self, "_layers", dict(layers))
        object.__setattr__(self, "skipped", tuple(skipped))

    @property
    def nbytes(self) -> int:
        """Bytes of all bases, means and updates."""
        return sum(layer.nbytes for layer in self.values())

    def __repr__(self) -> str:
        rows = [("path", "ranks", "core dtype", "bytes")]
        for path, layer in self.items():
            dtype = layer.core_dtype or "as input"
            rows.append((path, _kept(layer), "-" if layer.frozen else dtype, f"{layer.nbytes:,}"))
        rows.append((f"{len(self)} layers", "", "", f"{self.nbytes:,}"))
        return table(rows)

    def tree_flatten_with_keys(self):
        children = [(jax.tree_util.DictKey(path), layer) for path, layer in self.items()]
        return children, (tuple(self), self.skipped)

    @classmethod
    def tree_unflatten(cls, static, layers):
        new = object.__new__(cls)
        paths, skipped = static
        object.__setattr__(new, "_layers", dict(zip(paths, layers, strict=True)))
        object.__setattr__(new, "skipped", skipped)
        return new


def _kept(layer: LayerFactors) -> str:
    """What is kept of an input, and what the gradient is confined to."""
    if layer.frozen:
        return "frozen"
    kept = ", ".join(f"{m} {u.shape[-1]}/{u.shape[-2]}" for m, u in layer.bases.items())
    kept = kept or ("core of the update" if layer.update_core else "whole input")
    kept += "" if layer.mean is None else ", centred"
    if layer.update is not None:
        kept += f", update {layer.update.shape[-1]}/{layer.update.shape[-2]}"
    return kept


def check_core_dtype(core_dtype: Any) -> None:
    """Raise for what is no core dtype; a numpy dtype equals its name, but is none."""
    if not isinstance(core_dtype, str | None) or core_dtype not in CORE_DTYPES:
        known = ", ".join(map(repr, CORE_DTYPES))
        raise ValueError(f"core_dtype is {core_dtype!r}; it must be one of {known}")


def as_factors(factors: Any) -> Factors:
    """`Factors` from a mapping of them; ValueError for anything else."""
    if isinstance(factors, Factors):
        return factors
    if not isinstance(factors, Mapping):
        raise ValueError(
            f"factors is a {type(factors).__name__}; it must be Factors, or a mapping from "
            "parameter paths to LayerFactors"
        )
    return Factors(factors)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as aligned columns, the first row as a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if hasattr(leaf, "shape") else leaf


def _nbytes(leaf: Any) -> int:
    return jnp.dtype(leaf.dtype).itemsize * leaf.size if hasattr(leaf, "dtype") else 0
