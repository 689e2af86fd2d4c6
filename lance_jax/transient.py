"""What a recomputed block holds while the backward pass is in it, by shapes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lance_jax import interpreter, jaxprs, pointwise, residuals
from lance_jax.block_rule import vjp_at
from lance_jax.factors import Factors
from lance_jax.interpreter import Body, Nodes, Remat, Site
from lance_jax.jaxprs import Eqn, Jaxpr, Ref
from lance_jax.transform import plan, run_body


def transient(traced: jaxprs.Traced, factors: Factors, trained: set[str]) -> int:
    """Bytes of the block that needs most: its expanded inputs, and what it keeps for itself.

    trained: paths of the parameters whose gradients are wanted; what only others need does not
    count.
    """
    nodes = plan(traced, factors, pointwise.match)
    found = _transients(traced.jaxpr, traced.refs, nodes, trained, 0, False)
    return max(found, default=0)


def _transients(
    jaxpr: Jaxpr,
    refs: Sequence[Ref | None],
    nodes: Nodes,
    trained: set[str],
    depth: int,
    moving: bool,
) -> Iterator[int]:
    """Of every `jax.checkpoint` that a gradient passes.

    depth: the number of scans around; moving: whether what was computed so far needs a gradient.
    """
    operands = interpreter.operand_refs(jaxpr, refs)
    for i, (eqn, made_of) in enumerate(zip(jaxpr.eqns, operands, strict=True)):
        own = [ref is not None and not trained.isdisjoint(ref.paths) for ref in made_of]
        bodies, node = jaxprs.bodies(eqn), nodes.get(i)
        body = node.body if isinstance(node, Remat) else node
        inside = body.nodes if isinstance(body, Body) else ({},) * len(bodies)
        if bodies and eqn.primitive is jaxprs.prims.remat_p:
            wanted = [
                mine or (ref is None and moving) for mine, ref in zip(own, made_of, strict=True)
            ]
            if any(wanted):
                expanded = node.site.operands if isinstance(node, Remat) else ()
                entering = sum(jaxprs.nbytes(eqn.invars[j].aval) for j in expanded)
                yield entering + _recomputed(eqn, inside[0], depth, wanted)
        is_scan = eqn.primitive is jaxprs.prims.scan_p
        within = moving or (is_scan and any(own))  # an earlier step's result needs a gradient
        of_bodies = interpreter.body_refs(eqn, made_of) if bodies else []
        for one, nodes_of, refs_of in zip(bodies, inside, of_bodies, strict=True):
            yield from _transients(one, refs_of, nodes_of, trained, depth + is_scan, within)
        moving = moving or any(own)


def _recomputed(eqn: Eqn, nodes: Nodes, depth: int, wanted: Sequence[bool]) -> int:
    """Bytes that a recomputed body keeps for the gradients of these operands."""

    def like(site: Any) -> Any:
        """Inside of that many scans."""
        if not isinstance(site, Site):
            return site
        stacked = sum(site.scans[:depth])
        value = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[stacked:], a.dtype), site.value)
        return dataclasses.replace(site, value=value, scans=site.scans[depth:])

    nodes = jax.tree.map(like, nodes, is_leaf=lambda leaf: isinstance(leaf, Site))
    values = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    moving = [
        i
        for i, (v, want) in enumerate(zip(values, wanted, strict=True))
        if want and jnp.issubdtype(v.dtype, jnp.inexact)
    ]

    def kept(nodes: Nodes, values: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(vjp_at(moving, functools.partial(run_body, eqn, nodes), values))

    jaxpr, _ = jaxprs.hoist_consts(jax.make_jaxpr(kept)(nodes, values))
    return residuals.keep(jaxpr, jaxpr.outvars, [True] * len(jaxpr.outvars), 0).nbytes
