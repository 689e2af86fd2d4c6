"""Walk a traced function: find its equations, rebuild its bodies, follow its parameters.

The only file that knows jaxpr internals and what differs between jax versions.

A function is traced once (`trace`), planned (`plan`: which equations get which node) and
run again (`run`) with the planned equations replaced. A body (jit, scan, remat, cond) without a
node in it is run as it stands, so that shardings, policies and caches survive; one with a node is
rebuilt through jax's public functions, with the nodes as arguments.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jexc
from jax import lax
from jax.extend.core import primitives as prims

from lance_jax.paths import leaves_with_path

Literal = jexc.Literal
Jaxpr = Any  # jax.extend.core.Jaxpr
Eqn = Any  # jax.extend.core.JaxprEqn
Nodes = dict[int, Any]  # equation index -> what replaces it

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


# --- planning ------------------------------------------------------------------------------------

# rule(jaxpr, index, refs of the equation's operands, lengths of the enclosing scans)
# -> {index: node}; an equation without a node has its bodies walked.
Trips = tuple[int, ...]
Rule = Callable[[Jaxpr, int, list[Ref | None], Trips], Nodes]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Body:
    """The nodes of an equation's bodies, one dictionary a body."""

    nodes: tuple[Nodes, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Site:
    """A layer's node, whose arrays are stacked along the scans in which its parameter is.

    weight: which operand of the equation is the parameter.
    """

    value: Any
    scans: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    weight: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:
    """An equation for `apply` that needs nothing beside itself."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skip:
    """An equation that a later node has taken over."""


def plan(jaxpr: Jaxpr, refs: Sequence[Ref | None], rule: Rule) -> Nodes:
    """The nodes that `rule` gives, over all equations and bodies, in order of use."""
    return _plan(jaxpr, refs, rule, ())[0]


def _plan(
    jaxpr: Jaxpr, refs: Sequence[Ref | None], rule: Rule, trips: Trips
) -> tuple[Nodes, list[Ref | None]]:
    env: dict[Any, Ref | None] = dict.fromkeys(jaxpr.constvars, Ref(()))
    env.update(zip(jaxpr.invars, refs, strict=True))

    def read(atom):
        return Ref(()) if isinstance(atom, Literal) else env[atom]

    nodes: Nodes = {}
    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(v) for v in eqn.invars]
        nodes.update(rule(jaxpr, i, operands, trips))
        inner = bodies(eqn)
        if inner and i not in nodes:
            node, outs = _plan_bodies(eqn, inner, operands, rule, trips)
            if any(node.nodes):
                nodes[i] = node
        else:
            outs = [_result(eqn, operands)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return nodes, [read(v) for v in jaxpr.outvars]


def _plan_bodies(eqn, inner, operands, rule, trips):
    if eqn.primitive is prims.scan_p:
        consts, carry = scan_split(eqn)
        operands = (
            [r and dataclasses.replace(r, scans=(*r.scans, False)) for r in operands[:consts]]
            + [None] * carry
            + [
                r and dataclasses.replace(r, scans=(*r.scans, True))
                for r in operands[consts + carry :]
            ]
        )
        nodes, _ = _plan(inner[0], operands, rule, (*trips, eqn.params["length"]))
        return Body((nodes,)), [None] * len(eqn.outvars)
    if eqn.primitive is prims.cond_p:
        plans = [_plan(branch, operands[1:], rule, trips) for branch in inner]
        outs = [_choice(refs) for refs in zip(*(refs for _, refs in plans), strict=True)]
        return Body(tuple(nodes for nodes, _ in plans)), outs
    nodes, outs = _plan(inner[0], operands, rule, trips)
    return Body((nodes,)), outs


def _choice(refs: Sequence[Ref | None]) -> Ref | None:
    """One of several, whatever chooses: computed from parameters if all are."""
    if not all(ref and ref.paths for ref in refs):
        return None
    paths = tuple(dict.fromkeys(path for ref in refs if ref for path in ref.paths))
    return Ref(paths, refs[0].scans if refs[0] else (), view=False)


def _result(eqn: Eqn, operands: list[Ref | None]) -> Ref | None:
    """What an equation's result is made of: data with a parameter is data."""
    if eqn.primitive is lax.select_n_p and operands[0] is None:
        return _choice(operands[1:])
    refs = [ref for ref in operands if ref is not None]
    # A slice of a parameter is one wherever its indices come from.
    sliced = eqn.primitive is lax.dynamic_slice_p and operands[0] is not None
    if len(refs) < len(operands) and not sliced:
        return None
    if is_view(eqn):
        return refs[0]
    paths = tuple(dict.fromkeys(path for ref in refs for path in ref.paths))
    scans = next((ref.scans for ref in refs if ref.paths), ())
    return Ref(paths, scans, view=False)


# --- running -------------------------------------------------------------------------------------

# apply(jaxpr, index, node, the value of a variable) -> results
Apply = Callable[[Jaxpr, int, Any, Callable[[Any], Any]], Sequence[Any]]


def run(
    jaxpr: Jaxpr, consts: Sequence[Any], nodes: Nodes, args: Sequence[Any], apply: Apply
) -> list[Any]:
    """Evaluate a jaxpr with some of its equations replaced by `apply`."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        node = nodes.get(i)
        if isinstance(node, Skip):
            continue
        if node is None:
            outs = bind(eqn, [env[v] for v in _variables(eqn.invars)])
        else:
            with _scope(eqn), eqn.ctx.manager:
                if isinstance(node, Body):
                    values = [read(v) for v in eqn.invars]
                    outs = _REBUILD[eqn.primitive](eqn, node, values, apply)
                else:
                    outs = apply(jaxpr, i, node, read)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _scope(eqn: Eqn) -> contextlib.AbstractContextManager[Any]:
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys(v for v in atoms if not isinstance(v, Literal)))


def bind(eqn: Eqn, values: Sequence[Any]) -> list[Any]:
    """Run one equation as it stands on the values of its distinct variables."""
    return run_eqns([eqn], _variables(eqn.invars), eqn.outvars, values)


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


def _rebuild_jit(eqn, node, values, apply):
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])
    values = [_constrain(v, s) for v, s in zip(values, eqn.params["in_shardings"], strict=True)]
    options = eqn.params["compiler_options_kvs"]
    outs = _jitted(jaxpr, apply, eqn.params["name"], options)(node.nodes[0], consts, *values)
    return [_constrain(v, s) for v, s in zip(outs, eqn.params["out_shardings"], strict=True)]


def _constrain(value, sharding):
    # What is not given is a private marker, not None.
    if isinstance(sharding, jax.sharding.Sharding):
        return lax.with_sharding_constraint(value, sharding)
    return value


@functools.lru_cache(maxsize=1024)
def _jitted(jaxpr, apply, name, options):
    # Cached by the body, so that a block called many times is lowered once for each set of shapes.
    def fun(nodes, consts, *values):
        return run(jaxpr, consts, nodes, values, apply)

    fun.__name__ = name
    return jax.jit(fun, compiler_options=dict(options) or None)


def _rebuild_remat(eqn, node, values, apply):
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])

    def fun(nodes, *values):
        return run(jaxpr, consts, nodes, values, apply)

    prevent_cse, policy = eqn.params["prevent_cse"], eqn.params["policy"]
    return jax.checkpoint(fun, prevent_cse=prevent_cse, policy=policy)(node.nodes[0], *values)


def _rebuild_cond(eqn, node, values, apply):
    def branch(closed, i):
        jaxpr, consts = open_jaxpr(closed)
        return lambda nodes, *values: run(jaxpr, consts, nodes[i], values, apply)

    branches = [branch(closed, i) for i, closed in enumerate(eqn.params["branches"])]
    return lax.switch(values[0], branches, node.nodes, *values[1:])


def _rebuild_scan(eqn, node, values, apply):
    jaxpr, closed_over = open_jaxpr(eqn.params["jaxpr"])
    n, m = scan_split(eqn)
    consts, carry, xs = values[:n], values[n : n + m], values[n + m :]
    sites, tree = jax.tree.flatten(node.nodes[0], is_leaf=lambda x: isinstance(x, Site))
    stacked = [site for site in sites if site.scans[0]]
    fixed = [site for site in sites if not site.scans[0]]

    def body(carry, slices):
        stacked, xs = slices
        stacked, rest = iter(stacked), iter(fixed)
        inner = [next(stacked) if site.scans[0] else next(rest) for site in sites]
        inner = [dataclasses.replace(site, scans=site.scans[1:]) for site in inner]
        nodes = jax.tree.unflatten(tree, inner)
        outs = run(jaxpr, closed_over, nodes, [*consts, *carry, *xs], apply)
        return outs[:m], outs[m:]

    options = {k: eqn.params[k] for k in ("reverse", "length", "unroll")}
    carry, ys = lax.scan(body, list(carry), (stacked, list(xs)), **options)
    return [*carry, *ys]


_REBUILD = {
    prims.jit_p: _rebuild_jit,
    prims.remat_p: _rebuild_remat,
    prims.cond_p: _rebuild_cond,
    prims.scan_p: _rebuild_scan,
}
