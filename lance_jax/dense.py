"""Dense products: any `dot_general` with a parameter as one operand."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax

from lance_jax import hosvd
from lance_jax.modes import Steps, accumulator, apply_chain, cheapest_chain, mode_product

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dense:
    """One dense product y = dot_general(x, w), its input x and its weight w.

    The rules below see x as (shared..., free..., feature): the batch dimensions that it shares
    with w, its own axes, and the contracted axes flattened into one, in the order of x's axes.
    dy is seen as (shared..., free..., out...), w as (shared..., feature, out...).
    """

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    x_shared: Axes
    x_contract: Axes
    w_shared: Axes
    w_contract: Axes
    x_is_lhs: bool
    precision: Any

    kind = "dense"
    update_mode = "feature"  # the rows of the weight, in which an update is confined
    depthwise = False

    @classmethod
    def of(cls, eqn: Any, x_is_lhs: bool) -> "Dense":
        """From a `dot_general` equation whose weight is the other operand."""
        contract, shared = eqn.params["dimension_numbers"]
        x, w = (0, 1) if x_is_lhs else (1, 0)
        order = np.argsort(contract[x])
        return cls(
            x_shape=eqn.invars[x].aval.shape,
            w_shape=eqn.invars[w].aval.shape,
            x_shared=tuple(shared[x]),
            x_contract=tuple(contract[x][i] for i in order),
            w_shared=tuple(shared[w]),
            w_contract=tuple(contract[w][i] for i in order),
            x_is_lhs=x_is_lhs,
            precision=eqn.params["precision"],
        )

    @property
    def x_free(self) -> Axes:
        return _rest(len(self.x_shape), self.x_shared + self.x_contract)

    @property
    def w_free(self) -> Axes:
        return _rest(len(self.w_shape), self.w_shared + self.w_contract)

    @property
    def batch_axis(self) -> int:
        """The axis of x that holds the samples, if it has a batch mode."""
        return self.x_free[0]

    @property
    def dy_batch_axis(self) -> int:
        """The axis of y that holds the samples."""
        return len(self.x_shared) + (0 if self.x_is_lhs else len(self.w_free))

    @property
    def modes(self) -> dict[str, int]:
        """Mode name -> size: batch, token (token0, ... where several), feature."""
        names = _free_names(len(self.x_free))
        sizes = {name: self.x_shape[axis] for name, axis in zip(names, self.x_free, strict=True)}
        return {**sizes, "feature": self._feature}

    @property
    def default_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if mode != "batch")

    @property
    def paper_modes(self) -> tuple[str, ...]:
        return tuple(self.modes)

    def basis_shape(self, mode: str) -> tuple[int, ...]:
        """The shape that a basis of this mode has, without its rank."""
        return (self.modes[mode],)

    @property
    def macs(self) -> int:
        """MACs of the forward product; dX costs as many."""
        return math.prod(self.x_shape) * self._out

    @property
    def _feature(self) -> int:
        return math.prod(self.x_shape[axis] for axis in self.x_contract)

    @property
    def _out(self) -> int:
        return math.prod(self.w_shape[axis] for axis in self.w_free)

    # --- the core ---

    def canonical(self, x: jax.Array) -> jax.Array:
        """x as (shared..., free..., feature)."""
        x = x.transpose(self.x_shared + self.x_free + self.x_contract)
        return x.reshape(*x.shape[: x.ndim - len(self.x_contract)], self._feature)

    def project(self, x: jax.Array, bases: Mapping[str, jax.Array]) -> jax.Array:
        """The core: (shared..., free..., feature) with each mode that has a basis projected.

        x: canonical.
        """
        steps = tuple((self._axis(m), u.shape[0], u.shape[1]) for m, u in bases.items())
        _, order = cheapest_chain(math.prod(self.x_shape), steps)
        return apply_chain(x, self._matrices(bases), order, self.precision)

    def core_shape(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        shape = [self.x_shape[axis] for axis in self.x_shared + self.x_free] + [self._feature]
        for mode, rank in ranks.items():
            shape[self._axis(mode)] = rank
        return tuple(shape)

    def project_macs(self, ranks: Mapping[str, int]) -> int:
        sizes = self.modes
        steps = tuple((self._axis(m), sizes[m], r) for m, r in ranks.items())
        return cheapest_chain(math.prod(self.x_shape), steps)[0]

    # --- the weight gradient ---

    def weight_gradient(
        self, core: jax.Array, dy: jax.Array, bases: Mapping[str, jax.Array], dtype: Any
    ) -> jax.Array:
        """dW at the projected input, from the core alone, in the cheapest order by MACs."""
        ranks = tuple((mode, u.shape[1]) for mode, u in bases.items())
        _, core_steps, dy_steps = _cheapest(self, ranks)
        matrices = self._matrices(bases)
        dy = apply_chain(self._dy(dy), matrices, dy_steps, self.precision)
        expand = {axis: u.T for axis, u in matrices.items()}
        core = apply_chain(core, expand, core_steps, self.precision)
        summed = core.ndim - 1
        shared = tuple(range(len(self.x_shared)))
        free = tuple(range(len(shared), summed))
        acc = accumulator(dtype)
        dw = lax.dot_general(core, dy, ((free, free), (shared, shared)), self.precision, acc)
        if "feature" in bases:  # dw: (shared..., feature, out...)
            dw = mode_product(dw, bases["feature"].T, len(shared), self.precision)
        return self._w(dw).astype(dtype)

    def weight_gradient_macs(self, ranks: Mapping[str, int]) -> int:
        return _cheapest(self, tuple(ranks.items()))[0]

    def confine(self, dw: jax.Array, u: jax.Array) -> jax.Array:
        """U U^T dW, over the features."""
        acc = accumulator(dw.dtype)
        axis = len(self.x_shared)
        rows = dw.transpose(self._w_order).astype(acc)
        rows = rows.reshape(*rows.shape[:axis], self._feature, -1)
        for matrix in (u, u.T):
            rows = mode_product(rows, matrix.astype(acc), axis, self.precision)
        return self._w(rows).astype(dw.dtype)

    def confine_macs(self, rank: int) -> int:
        return 2 * math.prod(self.w_shape) * rank

    # --- the layer's own tensors ---

    def gram(self, x: jax.Array, mode: str) -> jax.Array:
        """X_(m) X_(m)^T of one mode, (n, n), or its sketch (n, k + 1) where n is wide (`hosvd`)."""
        return gram(self.canonical(x), self._axis(mode))

    def _axis(self, mode: str) -> int:
        if mode == "feature":
            return len(self.x_shared) + len(self.x_free)
        return len(self.x_shared) + _free_names(len(self.x_free)).index(mode)

    def _matrices(self, bases: Mapping[str, jax.Array]) -> dict[int, jax.Array]:
        return {self._axis(mode): u for mode, u in bases.items()}

    def _dy(self, dy: jax.Array) -> jax.Array:
        if self.x_is_lhs:
            return dy
        shared, out = len(self.x_shared), len(self.w_free)
        axes = range(dy.ndim)
        return dy.transpose(*axes[:shared], *axes[shared + out :], *axes[shared : shared + out])

    @property
    def _w_order(self) -> Axes:
        return self.w_shared + self.w_contract + self.w_free

    def _w(self, dw: jax.Array) -> jax.Array:
        dw = dw.reshape(tuple(self.w_shape[axis] for axis in self._w_order))
        return dw.transpose(tuple(np.argsort(self._w_order)))


@functools.lru_cache(maxsize=4096)
def _cheapest(layer: Dense, ranks: tuple[tuple[str, int], ...]) -> tuple[int, Steps, Steps]:
    """(MACs, expansions of the core, projections of dy) of the cheapest weight gradient.

    Each basis of a free axis either expands the core or projects dy; the feature basis comes last.
    Without one, not all may expand the core: that would rebuild the input.
    """
    sizes = layer.modes
    feature = dict(ranks).get("feature")
    free = [(layer._axis(m), sizes[m], r) for m, r in ranks if m != "feature"]
    core_size = math.prod(layer.core_shape(dict(ranks)))
    dy_size = math.prod(layer.x_shape) // layer._feature * layer._out
    options = []
    for choice in itertools.product((False, True), repeat=len(free)):
        if free and all(choice) and feature is None:
            continue
        expand = tuple((a, r, n) for (a, n, r), up in zip(free, choice, strict=True) if up)
        project = tuple(step for step, up in zip(free, choice, strict=True) if not up)
        expand_macs, expand = cheapest_chain(core_size, expand)
        project_macs, project = cheapest_chain(dy_size, project)
        size = core_size
        for _, before, after in expand:
            size = size // before * after
        macs = expand_macs + project_macs + size * layer._out
        if feature is not None:
            shared = math.prod(layer.x_shape[axis] for axis in layer.x_shared)
            macs += shared * layer._feature * feature * layer._out
        options.append((macs, expand, project))
    return min(options)


def gram(x: jax.Array, axis: int) -> jax.Array:
    """The Gram matrix of one axis, summed over all others, or its sketch; in at least float32."""
    x = x.astype(accumulator(x.dtype))
    if x.shape[axis] > hosvd.WIDEST:
        return hosvd.sketch(x, axis, hosvd.COLUMNS)
    return hosvd.gram(x, axis)


def _free_names(count: int) -> list[str]:
    """batch, then token, or token0, token1, ... where there are several."""
    tokens = ["token"] if count == 2 else [f"token{i}" for i in range(count - 1)]
    return ["batch", *tokens][:count]


def _rest(ndim: int, axes: Axes) -> Axes:
    return tuple(axis for axis in range(ndim) if axis not in axes)
