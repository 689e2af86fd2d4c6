"""Factors: for each layer, what of its input is kept for the backward pass."""

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, register_pytree_with_keys_class

CORE_DTYPES = (None, "bfloat16", "int8", "int4")

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


@register_pytree_with_keys_class
class LayerFactors:
    """One layer's orthonormal bases, by mode, and how its core is stored.

    Args:
      bases: mode name -> (n, r) array with orthonormal columns, n the size of that mode of the
        layer's input and r its rank; (groups, n, r) for the patch mode of a grouped convolution;
        with a leading axis of length L for a layer scanned over L steps. No basis at all keeps
        the whole input, in `core_dtype`.
      mean: the calibration mean of the input, of the input's shape without its batch axis; its
        share of the weight gradient is exact, and only the rest is projected. None: not centred.
      core_dtype: None (the input's), "bfloat16", "int8" or "int4".

    Raises:
      ValueError: for an unknown `core_dtype`, for what is no array, and for bases whose values are
        known (not traced) and are not finite with orthonormal columns.
    """

    __slots__ = ("bases", "core_dtype", "mean")

    bases: Mapping[str, Array]
    mean: Array | None
    core_dtype: str | None

    def __init__(
        self, bases: Mapping[str, Array], mean: Array | None = None, core_dtype: str | None = None
    ):
        check_core_dtype(core_dtype)
        if not isinstance(bases, Mapping):
            raise ValueError(f"bases is a {type(bases).__name__}; it must map mode names to arrays")
        for mode, basis in bases.items():
            _check_basis(mode, basis)
        if mean is not None and not hasattr(mean, "shape"):
            raise ValueError(f"mean is a {type(mean).__name__}; it must be an array")
        _set(self, types.MappingProxyType(dict(bases)), mean, core_dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"LayerFactors is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"LayerFactors is frozen: cannot delete {name!r}")

    def __repr__(self) -> str:
        bases = ", ".join(f"{mode}: {_shape(u)}" for mode, u in self.bases.items())
        mean = "" if self.mean is None else f", mean {_shape(self.mean)}"
        return f"LayerFactors({{{bases}}}{mean}, core_dtype={self.core_dtype!r})"

    @property
    def ranks(self) -> dict[str, int]:
        """Mode name -> rank."""
        return {mode: u.shape[-1] for mode, u in self.bases.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the bases and the mean."""
        return sum(_nbytes(leaf) for leaf in jax.tree.leaves(self))

    def tree_flatten_with_keys(self):
        children = ((GetAttrKey("bases"), dict(self.bases)), (GetAttrKey("mean"), self.mean))
        return children, self.core_dtype

    @classmethod
    def tree_unflatten(cls, core_dtype, children):
        # Past __init__: a tree may hold any leaves, and jax forbids checks here.
        new = object.__new__(cls)
        bases, mean = children
        _set(
            new,
            types.MappingProxyType(bases) if isinstance(bases, dict) else bases,
            mean,
            core_dtype,
        )
        return new


def _check_basis(mode: str, basis: Any) -> None:
    if not (hasattr(basis, "shape") and hasattr(basis, "dtype")):
        raise ValueError(f"the {mode!r} basis is a {type(basis).__name__}; it must be an array")
    known = isinstance(basis, np.ndarray) or (
        isinstance(basis, jax.Array)
        and not isinstance(basis, jax.core.Tracer)
        and basis.is_fully_addressable
    )
    # What does not fit the layer is told by `compress`, which knows the layer.
    fits = basis.ndim >= 2 and basis.shape[-1] <= basis.shape[-2]
    if not (known and fits and jnp.issubdtype(basis.dtype, jnp.floating)):
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


def _set(new: LayerFactors, bases: Any, mean: Any, core_dtype: Any) -> None:
    object.__setattr__(new, "bases", bases)
    object.__setattr__(new, "mean", mean)
    object.__setattr__(new, "core_dtype", core_dtype)


@register_pytree_with_keys_class
class Factors(Mapping[str, LayerFactors]):
    """A frozen mapping from a layer's path to its `LayerFactors`, and a pytree.

    Calibration makes one (`lance_jax.calibrate`); it can also be built by hand:
    `Factors({"dense/kernel": LayerFactors({"feature": u})})`.

    Attributes:
      skipped: the selected layers that calibration gave no factors.
    """

    __slots__ = ("_layers", "skipped")

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

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Factors is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Factors is frozen: cannot delete {name!r}")

    def __getitem__(self, path: str) -> LayerFactors:
        return self._layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        return self is other  # arrays have no truth value to compare by

    def __hash__(self) -> int:
        return id(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all bases and means."""
        return sum(layer.nbytes for layer in self.values())

    def __repr__(self) -> str:
        rows = [("path", "ranks", "core dtype", "bytes")]
        for path, layer in self.items():
            ranks = ", ".join(f"{m} {u.shape[-1]}/{u.shape[-2]}" for m, u in layer.bases.items())
            mean = "" if layer.mean is None else ", centred"
            dtype = layer.core_dtype or "as input"
            rows.append((path, (ranks or "whole input") + mean, dtype, f"{layer.nbytes:,}"))
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
