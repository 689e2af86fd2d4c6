"""A traced function: its equations and their bodies, and where its parameters go.

The only file that knows jaxpr internals and what differs between jax versions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as prims

from lance_jax.paths import leaves_with_path

Literal = jexc.Literal
Jaxpr = Any  # jax.extend.core.Jaxpr
Eqn = Any  # jax.extend.core.JaxprEqn

_DEBUG_INFO = jexc.DebugInfo("jit", "lance_jax", None, None)

# One-operand equations that only lay the same numbers out anew.
_VIEWS = {
    lax.reshape_p,
    lax.transpose_p,
    lax.squeeze_p,
    lax.rev_p,
    lax.copy_p,
    lax.convert_element_type_p,
    prims.name_p,
    prims.sharding_constraint_p,
    # the same numbers, and no gradient
    prims.stop_gradient_p,
}


# --- tracing -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced call: its jaxpr, its array inputs, and where each parameter went."""

    jaxpr: Jaxpr
    consts: list[Any]
    inputs: list[Any]
    refs: list["Ref | None"]
    unflatten: Callable[[Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Ref:
    """What a variable that depends on no data is made of (None: it depends on data).

    paths: the parameters it comes from, none for a constant; scans: for each enclosing scan, from
    the outermost in, whether the variable is that scan's slice of them; view: whether it is one
    parameter laid out anew, and nothing else.
    """

    paths: tuple[str, ...]
    scans: tuple[bool, ...] = ()
    view: bool = True


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; Python numbers, strings and flags stay as they are."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


@dataclasses.dataclass(frozen=True)
class Static:
    """What a tree is besides its arrays; two calls of equal `Static` and shapes trace alike."""

    tree: Any
    leaves: tuple[Any, ...]
    types: tuple[type, ...]  # 1, 1.0 and True are equal, but trace differently

    def join(self, arrays: Sequence[Any]) -> Any:
        """The tree with these arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _ARRAY else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.tree, leaves)


_ARRAY = object()


def split(tree: Any) -> tuple[list[Any], Static]:
    """(the arrays of a tree, the rest)."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    others = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
    return arrays, Static(structure, others, tuple(map(type, others)))


def trace(fun: Callable, params: Any, *args: Any, **kwargs: Any) -> Traced:
    """Trace `fun(params, *args, **kwargs)` by the shapes of its arrays."""
    inputs, static = split((params, args, kwargs))
    out: list[Static] = []

    def flat(*arrays):
        params, args, kwargs = static.join(arrays)
        arrays_out, rest = split(fun(params, *args, **kwargs))
        out[:] = [rest]
        return arrays_out

    closed = jax.make_jaxpr(flat)(*inputs)
    paths = [path for path, leaf in leaves_with_path(params) if is_array(leaf)]
    twice = {path for path in paths if paths.count(path) > 1}
    if twice:
        raise ValueError(f"two parameters have the path {min(twice)!r}; rename one")
    refs: list[Ref | None] = [Ref((path,)) for path in paths]
    refs += [None] * (len(inputs) - len(refs))
    return Traced(closed.jaxpr, closed.consts, inputs, refs, out[0].join)


def open_jaxpr(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """A body as (jaxpr, consts), whichever form this jax version keeps it in."""
    if isinstance(jaxpr, jexc.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def bodies(eqn: Eqn) -> list[Jaxpr]:
    """The bodies that this walk can enter: one for jit, scan and remat, several for cond."""
    if eqn.primitive is prims.cond_p:
        return [open_jaxpr(branch)[0] for branch in eqn.params["branches"]]
    if eqn.primitive is prims.jit_p or eqn.primitive is prims.scan_p:
        return [open_jaxpr(eqn.params["jaxpr"])[0]]
    if eqn.primitive is prims.remat_p and not eqn.params["differentiated"]:
        return [open_jaxpr(eqn.params["jaxpr"])[0]]
    return []


def bodies_in(params: Any) -> list[Jaxpr]:
    """All bodies among an equation's parameters, whatever its primitive."""
    return [open_jaxpr(body)[0] for body in jexc.jaxprs_in_params(params)]


def hidden_eqns(eqn: Eqn) -> Iterator[Eqn]:
    """All equations inside of an equation's bodies, at any depth."""
    for body in bodies_in(eqn.params):
        for inner in body.eqns:
            yield inner
            yield from hidden_eqns(inner)


def scan_split(eqn: Eqn) -> tuple[int, int]:
    """(number of constants, number of carries) among a scan's operands."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def is_view(eqn: Eqn) -> bool:
    """Whether an equation lays its operand out anew, without making it larger."""
    if eqn.primitive is lax.broadcast_in_dim_p:
        return len(eqn.invars) == 1 and _size(eqn.invars[0]) == _size(eqn.outvars[0])
    return eqn.primitive in _VIEWS


def _size(atom: Any) -> int:
    return math.prod(atom.aval.shape)


def nbytes(aval: Any) -> int:
    """Bytes of an array of that shape and dtype."""
    is_key = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    dtype = aval.dtype if is_key else jnp.dtype(aval.dtype)
    return math.prod(aval.shape) * dtype.itemsize


# --- running equations as they stand -------------------------------------------------------------


def variables(atoms: Sequence[Any]) -> list[Any]:
    """The distinct variables among operands."""
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, Literal)))


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """Run one equation as it stands on the values of its distinct variables."""
    return run_eqns([eqn], variables(eqn.invars), eqn.outvars, values)


def run_eqns(
    eqns: Sequence[Eqn], invars: Sequence[Any], outvars: Sequence[Any], values: Sequence[Any]
) -> list[Any]:
    """Run equations as they stand; jax itself restores their names and contexts."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    jaxpr = jexc.Jaxpr([], list(invars), list(outvars), list(eqns), effects, _DEBUG_INFO)
    return jexc.jaxpr_as_fun(jexc.ClosedJaxpr(jaxpr, ()))(*values)


def hoist_consts(closed: Any) -> tuple[Jaxpr, list[Any]]:
    """(a jaxpr whose first inputs are what it closed over, those values)."""
    jaxpr = closed.jaxpr
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    hoisted = jexc.Jaxpr([], inputs, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, _DEBUG_INFO)
    return hoisted, list(closed.consts)
