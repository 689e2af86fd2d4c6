"""One block under `compress`: what it keeps of the activations that enter it, and its gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import jaxprs
from lance_jax.conv import Conv
from lance_jax.cpu_conv import conv_p
from lance_jax.dense import Dense, gram
from lance_jax.factors import LayerFactors
from lance_jax.layer_rule import SCOPE, no_second_derivative
from lance_jax.modes import Steps, apply_chain, cheapest_chain
from lance_jax.quantize import Stored, load, store

_PRECISION = lax.Precision.HIGHEST  # a full basis gives back what was projected
# The names of the axes, by their number: the first is the batch, the last the features.
_AXES: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("feature",),  # or, beside larger ones, a number for each sample
    2: ("batch", "feature"),
    3: ("batch", "token", "feature"),
    4: ("batch", "height", "width", "channel"),
    5: ("batch", "depth", "height", "width", "channel"),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """The body of a `jax.checkpoint`, and the floating activations that enter it.

    operands: the places of those activations among the equation's operands; given: the places of
    floating arguments of the whole function, which are held anyway, and passed again as they are;
    macs: of all products inside; whole: the numbers of those activations that depend on no
    parameter, such as masks and positions: where a mask is zero or not is gone once it is
    projected, so calibration gives them no basis.
    """

    x_shapes: tuple[tuple[int, ...], ...]
    operands: tuple[int, ...]
    given: tuple[int, ...]
    macs: int
    whole: tuple[int, ...] = ()

    kind = "block"
    depthwise = False

    @classmethod
    def of(
        cls, eqn: Any, operands: Sequence[int], given: Sequence[int], whole: Sequence[int] = ()
    ) -> "Block":
        """From a `jax.checkpoint`'s equation, and the places of activations and arguments."""
        shapes = tuple(eqn.invars[i].aval.shape for i in operands)
        macs = sum(map(_macs, jaxprs.bodies(eqn)))
        return cls(shapes, tuple(operands), tuple(given), macs, tuple(whole))

    @property
    def x_shape(self) -> tuple[int, ...]:
        """The shape of the first activation that enters."""
        return self.x_shapes[0] if self.x_shapes else ()

    @property
    def w_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def modes(self) -> dict[str, int]:
        """Mode name -> size; where several activations enter, the names begin with their number."""
        return {mode: self.x_shapes[i][axis] for mode, (i, axis) in self._places.items()}

    @property
    def default_modes(self) -> tuple[str, ...]:
        return tuple(mode for mode in self.modes if axis_of(mode) != "batch")

    @property
    def paper_modes(self) -> tuple[str, ...]:
        return tuple(self.modes)

    def basis_shape(self, mode: str) -> tuple[int, ...]:
        """The shape that a basis of this mode has, without its rank."""
        return (self.modes[mode],)

    @property
    def _places(self) -> dict[str, tuple[int, int]]:
        """Mode name -> (which activation, which of its axes)."""
        places = {}
        most = max(map(len, self.x_shapes), default=0)
        for i, shape in enumerate(self.x_shapes):
            number = f"{i}." if len(self.x_shapes) > 1 else ""
            for axis, name in enumerate(_axis_names(len(shape), most)):
                places[f"{number}{name}"] = i, axis
        return places

    def place(self, mode: str) -> tuple[int, int]:
        """(which activation, which of its axes)."""
        return self._places[mode]

    # --- the cores ---

    def project(self, xs: Sequence[jax.Array], bases: Mapping[str, jax.Array]) -> list[jax.Array]:
        """The core of each activation: x x_m U_m^T over its modes m."""
        cores = []
        for i, x in enumerate(xs):
            matrices, steps = self._matrices(i, bases), self._steps(i, _ranks(bases))
            _, order = cheapest_chain(x.size, steps)
            cores.append(apply_chain(x, matrices, order, _PRECISION))
        return cores

    def expand(self, cores: Sequence[jax.Array], bases: Mapping[str, jax.Array]) -> list[jax.Array]:
        """X^ = core x_m U_m, which the backward pass has in the place of X."""
        xs = []
        for i, core in enumerate(cores):
            steps = tuple((axis, r, n) for axis, n, r in self._steps(i, _ranks(bases)))
            matrices = {axis: u.T for axis, u in self._matrices(i, bases).items()}
            _, order = cheapest_chain(core.size, steps)
            xs.append(apply_chain(core, matrices, order, _PRECISION))
        return xs

    def core_shapes(self, ranks: Mapping[str, int]) -> list[tuple[int, ...]]:
        shapes = [list(shape) for shape in self.x_shapes]
        for mode, rank in ranks.items():
            i, axis = self.place(mode)
            shapes[i][axis] = rank
        return [tuple(shape) for shape in shapes]

    def project_macs(self, ranks: Mapping[str, int]) -> int:
        """MACs of projecting to the cores; expanding them again costs as many."""
        sizes = map(math.prod, self.x_shapes)
        return sum(cheapest_chain(n, self._steps(i, ranks))[0] for i, n in enumerate(sizes))

    def sums(self, xs: Sequence[jax.Array], modes: Sequence[str]) -> dict[str, jax.Array]:
        """Mode name -> Gram matrix (n, n) of that axis, or its sketch (`hosvd`)."""
        places = {mode: self.place(mode) for mode in modes}
        return {mode: gram(xs[i], axis) for mode, (i, axis) in places.items()}

    def _matrices(self, i: int, bases: Mapping[str, jax.Array]) -> dict[int, jax.Array]:
        places = {mode: self.place(mode) for mode in bases}
        return {axis: bases[mode] for mode, (j, axis) in places.items() if j == i}

    def _steps(self, i: int, ranks: Mapping[str, int]) -> Steps:
        places = {mode: self.place(mode) for mode in ranks}
        sizes = self.modes
        return tuple(
            (axis, sizes[mode], ranks[mode]) for mode, (j, axis) in places.items() if j == i
        )


def _ranks(bases: Mapping[str, jax.Array]) -> dict[str, int]:
    return {mode: u.shape[-1] for mode, u in bases.items()}


def _axis_names(ndim: int, most: int) -> tuple[str, ...]:
    """Of an activation, beside others of at most that many axes."""
    if ndim == 1 < most:
        return ("batch",)
    if ndim in _AXES:
        return _AXES[ndim]
    return ("batch", *(f"token{i}" for i in range(ndim - 2)), "feature")


def axis_of(mode: str) -> str:
    """The name of a mode without the number of its activation."""
    return mode.split(".")[-1]


def keep(block: Block, xs: Sequence[jax.Array], factors: LayerFactors) -> list[Stored]:
    """What a block keeps: the core of each activation that enters, stored."""
    return [store(core, factors.core_dtype) for core in block.project(xs, factors.bases)]


def apply(
    block: Block,
    factors: LayerFactors,
    nodes: Any,
    values: Sequence[Any],
    run: Callable[[Any, Sequence[Any]], list[Any]],
) -> list[Any]:
    """The block's results, with a rule that recomputes it from the cores for its gradients.

    values: of all operands; run: (nodes, values) -> results, `nodes` those of the layers and masks
    inside, which hold in the recomputed block alone, so that it keeps little for its own backward
    pass. The forward equations stay visible, so that a walk over the result can lower them.
    """
    dtypes = [values[i].dtype for i in block.operands]

    @jax.custom_vjp
    def attach(ys, values, factors, nodes):
        return ys

    def forward(ys, values, factors, nodes):
        for value in filter(_has_gradient, values):
            no_second_derivative(value)
        stored = keep(block, [values[i] for i in block.operands], factors)
        rest = [None if i in block.operands else value for i, value in enumerate(values)]
        return ys, (stored, rest, factors, nodes)

    def backward(saved, dys):
        stored, values, factors, nodes = saved
        shapes = block.core_shapes(factors.ranks)
        cores = [
            load(one, factors.core_dtype, shape, dtype)
            for one, shape, dtype in zip(stored, shapes, dtypes, strict=True)
        ]
        values = list(values)
        for i, x in zip(block.operands, block.expand(cores, factors.bases), strict=True):
            values[i] = x
        moving = [i for i, value in enumerate(values) if _has_gradient(value)]
        for i in (*block.operands, *block.given) or moving:
            values[i] = _after(dys, values[i])
        vjp = vjp_at(moving, functools.partial(run, nodes), values)
        grads: list[Any] = [None] * len(values)
        for i, grad in zip(moving, vjp(list(dys))[0], strict=True):
            grads[i] = grad
        return None, grads, None, None

    attach.defvjp(forward, backward)
    with jax.named_scope(SCOPE):
        ys = run({}, [lax.stop_gradient(v) if _has_gradient(v) else v for v in values])
    return attach(ys, list(values), factors, nodes)


def vjp_at(
    places: Sequence[int], run: Callable[[Sequence[Any]], list[Any]], values: Sequence[Any]
) -> Callable:
    """The vjp of run(values) by the values at these places."""

    def of_parts(parts: Sequence[Any]) -> list[Any]:
        given = list(values)
        for i, part in zip(places, parts, strict=True):
            given[i] = part
        return run(given)

    return jax.vjp(of_parts, [values[i] for i in places])[1]


def _has_gradient(value: Any) -> bool:
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.inexact)


def _after(dys: Sequence[Any], x: jax.Array) -> jax.Array:
    """x bit for bit, but not before the cotangents are there.

    Without it the compiler merges the recomputed block with the first one, or begins early and
    holds several at once; `lax.optimization_barrier` is gone by then on a CPU. Of every cotangent,
    since some are zeros that the compiler knows, such as those of updated statistics. The lesser of
    zero and an absolute value is not simplified.
    """
    zero = jnp.zeros((), jnp.float32)
    for dy in dys:
        if _has_gradient(dy) and dy.size:
            one = jnp.abs(dy[(0,) * dy.ndim]).astype(jnp.float32)
            zero = zero + jnp.minimum(jnp.where(jnp.isnan(one), 0, one), 0)
    return x - zero.astype(x.dtype)  # x - 0 is x for -0, too


def _macs(jaxpr: Any) -> int:
    """Of all products of a body, in scans as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive in (lax.conv_general_dilated_p, conv_p):
            total += Conv.of(eqn).macs
        elif eqn.primitive is lax.dot_general_p:
            total += Dense.of(eqn, x_is_lhs=True).macs
        else:
            inner = sum(map(_macs, jaxprs.bodies_in(eqn.params)))
            total += inner * (eqn.params["length"] if eqn.primitive is jaxprs.prims.scan_p else 1)
    return total
