"""Exact packed masks: what the relu family's gradient needs of its input, in a bit or so.

A function such as relu, relu6 or leaky relu has two slopes, so that one bit an element says which;
`maximum`, `minimum` and `clip` have a third one at their ties, 0.5, and five elements share a byte.
The backward pass puts a representative input of the same slope in the place of each element and
lets jax differentiate there: the gradient is jax's own, ties included.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from lance_jax import interpreter, jaxprs
from lance_jax.jaxprs import Literal, prims

_SCALAR = {
    lax.max_p: np.maximum,
    lax.min_p: np.minimum,
    lax.mul_p: np.multiply,
    lax.div_p: np.divide,
    lax.add_p: np.add,
    ad.add_jaxvals_p: np.add,
    lax.sub_p: np.subtract,
    lax.neg_p: np.negative,
    lax.gt_p: np.greater,
    lax.ge_p: np.greater_equal,
    lax.lt_p: np.less,
    lax.le_p: np.less_equal,
    lax.eq_p: np.equal,
    lax.ne_p: np.not_equal,
    lax.and_p: np.logical_and,
    lax.or_p: np.logical_or,
    lax.not_p: np.logical_not,
    lax.clamp_p: lambda low, x, high: np.minimum(np.maximum(x, low), high),
    lax.select_n_p: lambda which, *cases: np.choose(np.asarray(which, int), cases),
    lax.convert_element_type_p: lambda x: x,
    lax.broadcast_in_dim_p: lambda x: x,
    lax.copy_p: lambda x: x,
}
_CALLS = {prims.jit_p: "jaxpr", prims.custom_jvp_call_p: "call_jaxpr"}
_LAST = {lax.max_p, lax.min_p, lax.clamp_p, lax.select_n_p, *_CALLS}
_BEFORE = {*_LAST, lax.mul_p, lax.gt_p, lax.ge_p, lax.lt_p, lax.le_p}
_COMPARE = {lax.gt_p, lax.ge_p, lax.lt_p, lax.le_p, lax.and_p, lax.or_p, lax.not_p}
_STEPS = {
    *(lax.max_p, lax.min_p, lax.clamp_p, lax.select_n_p, lax.mul_p),
    *(lax.broadcast_in_dim_p, lax.copy_p),
    *_COMPARE,
}
_LARGEST = 16  # equations of a run, the bodies of calls included
_SHARES = (0.23, 0.5, 0.81)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A run of equations that is piecewise linear in one input, with two or three slopes.

    eqns: their indices, the last one the result's; slopes: in rising order; points: an input that
    has each slope.
    """

    eqns: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    slopes: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    points: tuple[float, ...] = dataclasses.field(metadata={"static": True})


# --- recognising ---------------------------------------------------------------------------------


def match(jaxpr: Any, i: int) -> interpreter.Nodes:
    """The mask that ends at equation i, with a Skip for each earlier equation it takes over."""
    last = jaxpr.eqns[i]
    if last.primitive not in _LAST or len(last.outvars) != 1:
        return {}
    out = last.outvars[0].aval
    if not jnp.issubdtype(out.dtype, jnp.floating) or not out.shape:
        return {}
    found: interpreter.Nodes = {}
    for group in _groups(jaxpr, i):
        eqns = [jaxpr.eqns[j] for j in group]
        inputs = _inputs(eqns)
        if len(inputs) == 1 and _is_like(inputs[0].aval, out):
            slopes = _slopes(eqns)
            if 2 <= len(slopes) <= 3:
                mask = Mask(tuple(group), tuple(slopes), tuple(slopes.values()))
                found = {**dict.fromkeys(group[:-1], interpreter.Skip()), i: mask}
    return found


def _is_like(x: Any, out: Any) -> bool:
    """Whether one has an element for each of the other, and both can have a slope."""
    return x.shape == out.shape and jnp.issubdtype(x.dtype, jnp.floating)


def _groups(jaxpr: Any, i: int) -> Iterator[list[int]]:
    """Equation i alone, then with the equations before it that serve nothing else."""
    producer, uses = _producers_and_uses(jaxpr)
    group = [i]
    while _is_simple([jaxpr.eqns[j] for j in group]):
        yield group
        within = collections.Counter(v for j in group for v in _variables(jaxpr.eqns[j]))
        before = {
            producer[v]
            for v in _inputs([jaxpr.eqns[j] for j in group])
            if v in producer
            and within[v] == uses[v]
            and jaxpr.eqns[producer[v]].primitive in _BEFORE
        }
        if not before:
            return
        group = sorted([*group, *before])


@functools.lru_cache(maxsize=64)
def _producers_and_uses(jaxpr: Any) -> tuple[dict[Any, int], collections.Counter[Any]]:
    producer = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    uses = collections.Counter(v for eqn in jaxpr.eqns for v in _variables(eqn))
    uses.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    return producer, uses


def _is_simple(eqns: Sequence[Any]) -> bool:
    """Whether these equations can only change their slope at a constant, or a ratio of two.

    That is what `_slopes` takes for granted: maxima, minima and selections by comparison with
    constants, and at most one factor. A custom rule may compare and select, nothing else.
    """
    flat = list(_flat(eqns))
    allowed = all(e.primitive in _STEPS or _is_scalar_convert(e) for e in flat[: _LARGEST + 1])
    factors = sum(e.primitive is lax.mul_p for e in flat)
    if len(flat) > _LARGEST or not allowed or factors > 1:
        return False
    return factors == 0 or all(e.primitive is not prims.custom_jvp_call_p for e in eqns)


def _flat(eqns: Sequence[Any]) -> Iterator[Any]:
    """The equations with the bodies of calls in their calls' places."""
    for eqn in eqns:
        if eqn.primitive in _CALLS:
            body = jaxprs.open_jaxpr(eqn.params[_CALLS[eqn.primitive]])[0]
            yield from _flat(body.eqns)
        else:
            yield eqn


def _is_scalar_convert(eqn: Any) -> bool:
    return eqn.primitive is lax.convert_element_type_p and eqn.invars[0].aval.shape == ()


def _slopes(eqns: Sequence[Any]) -> dict[float, float]:
    """slope -> an input that has it, in rising order; empty where it is not piecewise constant.

    The tangent as jax computes it is evaluated on numbers: at every place where the slope can
    change, and at three inputs between each two of them, which must agree.
    """
    x = _inputs(eqns)[0]
    like = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
    fun = _function(eqns)
    tangent = jax.make_jaxpr(lambda x, t: jax.jvp(fun, (x,), (t,))[1])(like, like)
    if any(e.primitive is prims.custom_jvp_call_p for e in eqns):
        of_rule = [e for e in tangent.jaxpr.eqns if e.primitive is not prims.custom_jvp_call_p]
        if not all(e.primitive in _STEPS - {lax.mul_p} for e in _flat(of_rule)):
            return {}
    numbers = {float(c) for c in _constants(tangent.jaxpr)} | {0.0}
    ratios = {a / b for a in numbers for b in numbers if b and math.isfinite(a / b)}
    edges = sorted(numbers | ratios)
    intervals = [(edges[0] - 8.0, edges[0]), *zip(edges, edges[1:], strict=False)]
    intervals.append((edges[-1], edges[-1] + 8.0))
    try:
        slopes = {_scalar(tangent, edge): edge for edge in edges}
        for low, high in intervals:
            between = [low + share * (high - low) for share in _SHARES]
            inside = {_scalar(tangent, point): point for point in between}
            if len(inside) > 1:
                return {}
            slopes.update(inside)
    except KeyError:  # a primitive that is not elementwise
        return {}
    return dict(sorted(slopes.items()))


def _scalar(tangent: Any, x: float) -> float:
    """The slope at one number."""
    return float(_eval(tangent.jaxpr, [np.float64(x), np.float64(1.0)])[0])


def _eval(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        if eqn.primitive in _CALLS:
            outs = _eval(jaxprs.open_jaxpr(eqn.params[_CALLS[eqn.primitive]])[0], values)
        else:
            outs = [_SCALAR[eqn.primitive](*values)]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _constants(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, Literal) and np.ndim(v.val) == 0)
        for body in jaxprs.bodies_in(eqn.params):
            yield from _constants(body)


def _variables(eqn: Any) -> list[Any]:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _inputs(eqns: Sequence[Any]) -> list[Any]:
    """The variables that a run of equations reads and does not make."""
    made = {v for eqn in eqns for v in eqn.outvars}
    return list(dict.fromkeys(v for eqn in eqns for v in _variables(eqn) if v not in made))


def _function(eqns: Sequence[Any]) -> Callable[[jax.Array], jax.Array]:
    ends = _inputs(eqns), [eqns[-1].outvars[0]]
    return lambda x: jaxprs.run_eqns(eqns, *ends, [x])[0]


# --- running -------------------------------------------------------------------------------------


def input_of(jaxpr: Any, mask: Mask) -> Any:
    """The variable that a mask's equations read."""
    return _inputs([jaxpr.eqns[j] for j in mask.eqns])[0]


def apply(jaxpr: Any, mask: Mask, x: jax.Array) -> jax.Array:
    """Run a mask's equations on their input, keeping only the packed slopes of its elements."""
    fun = _function([jaxpr.eqns[j] for j in mask.eqns])
    shape, dtype, count = x.shape, x.dtype, len(mask.slopes)

    @jax.custom_vjp
    def masked(x):
        return fun(x)

    def forward(x):
        y, slope = jax.jvp(fun, (x,), (jnp.ones_like(x),))
        return y, _pack(_index(slope, mask.slopes))

    def backward(packed, dy):
        points = [jnp.full(shape, point, dtype) for point in mask.points]
        return jax.vjp(fun, lax.select_n(_unpack(packed, count, shape), *points))[1](dy)

    masked.defvjp(forward, backward)
    return masked(x)


def _index(slope: jax.Array, slopes: tuple[float, ...]) -> jax.Array:
    """Which slope each element has: bool for two slopes, int32 for three."""
    halfway = [
        jnp.asarray((a + b) / 2, slope.dtype) for a, b in zip(slopes, slopes[1:], strict=False)
    ]
    above = [slope > limit for limit in halfway]
    return above[0] if len(above) == 1 else jnp.sum(jnp.stack(above), axis=0, dtype=jnp.int32)


_THREES = np.array([1, 3, 9, 27, 81], np.uint8)


def _pack(index: jax.Array) -> jax.Array:
    """Eight elements a byte for two slopes, five for three."""
    if index.dtype == bool:
        return jnp.packbits(_rows(index, 8), axis=-1)
    rows = _rows(index.astype(jnp.uint8), 5)
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 5)))
    return jnp.sum(rows.reshape(len(rows), -1, 5) * _THREES, axis=2, dtype=jnp.uint8)


def _unpack(packed: jax.Array, count: int, shape: tuple[int, ...]) -> jax.Array:
    """bool for two slopes, int32 for three, of that shape."""
    size = math.prod(shape) // len(packed)
    if count == 2:
        return jnp.unpackbits(packed, axis=-1, count=size).reshape(shape).astype(bool)
    digits = (packed[:, :, None] // _THREES % np.uint8(3)).reshape(len(packed), -1)
    return digits[:, :size].reshape(shape).astype(jnp.int32)


def _rows(index: jax.Array, per_byte: int) -> jax.Array:
    """As a matrix whose rows are packed: samples, where that is needed or wastes nothing."""
    sharded = any(axis is not None for axis in jax.typeof(index).sharding.spec)
    by_sample = sharded or math.prod(index.shape[1:]) % per_byte == 0
    rows = len(index) if by_sample and index.size else 1
    return index.reshape(rows, index.size // rows)
