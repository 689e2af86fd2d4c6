"""Plan which equations of a traced function are replaced (`plan`), and run it so (`run`).

A body (jit, scan, remat, cond) without a node in it is run as it stands, so that shardings,
policies and caches survive; one with a node is rebuilt through jax's public functions, with the
nodes as arguments.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lance_jax.jaxprs import (
    Eqn,
    Jaxpr,
    Literal,
    Ref,
    bind,
    bodies,
    is_view,
    open_jaxpr,
    prims,
    run_eqns,
    scan_split,
    variables,
)

Nodes = dict[int, Any]  # equation index -> what replaces it


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
    """What belongs to an equation, its arrays stacked along the scans in which its parameter is.

    operands: of a product the operand that is the parameter, of a block those that are kept.
    """

    value: Any
    scans: tuple[bool, ...] = dataclasses.field(metadata={"static": True})
    operands: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Remat:
    """A `jax.checkpoint` with something of its own; `plan` fills in the nodes of its body.

    given: the operands that are arguments, passed again as they are.
    """

    site: Site
    body: Body = Body(({},))
    given: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:
    """An equation for `apply` that needs nothing beside itself."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Run:
    """Equations from here up to number `stop`, to be one `jax.checkpoint` of that name."""

    name: str = dataclasses.field(metadata={"static": True})
    stop: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skip:
    """An equation that another node has taken over."""


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
        node = nodes.get(i)
        if bodies(eqn) and (node is None or isinstance(node, Remat)):
            body, outs = _plan_bodies(eqn, operands, rule, trips)
            if node is not None:
                nodes[i] = dataclasses.replace(node, body=body)
            elif any(body.nodes):
                nodes[i] = body
        else:
            outs = [_result(eqn, operands)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return nodes, [read(v) for v in jaxpr.outvars]


def _plan_bodies(eqn, operands, rule, trips):
    if eqn.primitive is prims.scan_p:
        trips = (*trips, eqn.params["length"])
    inner = zip(bodies(eqn), body_refs(eqn, operands), strict=True)
    plans = [_plan(body, refs, rule, trips) for body, refs in inner]
    node = Body(tuple(nodes for nodes, _ in plans))
    if eqn.primitive is prims.scan_p:
        return node, [None] * len(eqn.outvars)
    if eqn.primitive is prims.cond_p:
        return node, [_choice(refs) for refs in zip(*(refs for _, refs in plans), strict=True)]
    return node, plans[0][1]


def body_refs(eqn: Eqn, operands: Sequence[Ref | None]) -> list[list[Ref | None]]:
    """For each body of an equation, what its inputs are made of."""
    if eqn.primitive is prims.cond_p:
        return [list(operands[1:])] * len(bodies(eqn))
    if eqn.primitive is not prims.scan_p:
        return [list(operands)]
    consts, carry = scan_split(eqn)

    def inside(refs, sliced):
        return [r and dataclasses.replace(r, scans=(*r.scans, sliced)) for r in refs]

    carried: list[Ref | None] = [None] * carry
    return [inside(operands[:consts], False) + carried + inside(operands[consts + carry :], True)]


def operand_refs(jaxpr: Jaxpr, refs: Sequence[Ref | None]) -> list[list[Ref | None]]:
    """What the operands of each equation of a jaxpr are made of, its bodies' left out."""
    found: list[list[Ref | None]] = []

    def rule(inner, i, operands, trips):
        if inner is jaxpr:
            found.append(operands)
        return {}

    plan(jaxpr, refs, rule)
    return found


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
        if isinstance(node, Run):
            env.update(_checkpointed(jaxpr, i, node, env))
            continue
        if node is None:
            outs = bind(eqn, [env[v] for v in variables(eqn.invars)])
        else:
            with _scope(eqn), eqn.ctx.manager:
                if isinstance(node, Body):
                    outs = rebuild(eqn, node, [read(v) for v in eqn.invars], apply)
                else:
                    outs = apply(jaxpr, i, node, read)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def rebuild(eqn: Eqn, body: Body, values: Sequence[Any], apply: Apply) -> list[Any]:
    """An equation again, with the nodes in its bodies."""
    return _REBUILD[eqn.primitive](eqn, body, values, apply)


def _scope(eqn: Eqn) -> contextlib.AbstractContextManager[Any]:
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Named:
    """The policy of a named `jax.checkpoint`: nothing inside of it is saved."""

    name: str

    def __call__(self, *operands: Any, **params: Any) -> bool:
        return False


def _checkpointed(jaxpr: Jaxpr, start: int, node: Run, env: dict[Any, Any]) -> dict[Any, Any]:
    """The values that a run of equations makes for those after it."""
    eqns, rest = jaxpr.eqns[start : node.stop], jaxpr.eqns[node.stop :]
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = {*variables(jaxpr.outvars), *(v for eqn in rest for v in variables(eqn.invars))}
    invars = [v for v in variables([v for eqn in eqns for v in eqn.invars]) if v not in made]
    outvars = [v for eqn in eqns for v in eqn.outvars if v in needed]

    def run_again(*values):
        return run_eqns(eqns, invars, outvars, values)

    again = jax.checkpoint(run_again, policy=Named(node.name))
    return dict(zip(outvars, again(*(env[v] for v in invars)), strict=True))


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
