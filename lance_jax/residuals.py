"""What lives from the forward to the backward phase, once and without what is at hand anyway."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import jaxprs
from lance_jax.jaxprs import Literal, nbytes, prims


@dataclasses.dataclass(frozen=True)
class Origin:
    """A variable as views of another: root, then equations that lay it out anew.

    root: a variable of the outermost jaxpr, or a literal; views: (equation, number of enclosing
    scans it runs in) from the root on; level: how many scans the value is a slice of.
    """

    root: Any
    views: tuple[tuple[Any, int], ...] = ()
    level: int = 0

    def key(self) -> Any:
        """Equal for two origins of the same numbers."""
        root = ("literal", str(self.root)) if isinstance(self.root, Literal) else self.root
        steps = tuple((eqn.primitive, str(eqn.params), depth) for eqn, depth in self.views)
        return root, steps, self.level

    def value(self, root: Any) -> Any:
        """The variable's value, from its root's."""
        for eqn, depth in self.views:

            def view(x, eqn=eqn):
                return jaxprs.bind(eqn, [x] if _is_var(eqn.invars[0]) else [])[0]

            for _ in range(depth):
                view = jax.vmap(view)
            root = view(root)
        return root


def _lays_out(eqn: Any) -> bool:
    """Views, and broadcasts: both are cheaper to do again than to keep."""
    return len(eqn.invars) == 1 and (jaxprs.is_view(eqn) or eqn.primitive is lax.broadcast_in_dim_p)


def origins(jaxpr: Any) -> dict[Any, Origin]:
    """The origin of every variable of a jaxpr, its bodies seen through."""
    return _origins(jaxpr, [Origin(v) for v in jaxpr.invars], 0)


def _origins(jaxpr: Any, inputs: Sequence[Origin], level: int) -> dict[Any, Origin]:
    env = {v: Origin(v) for v in jaxpr.constvars} | dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom):
        return env[atom] if _is_var(atom) else Origin(atom)

    read_by_equations = {v for eqn in jaxpr.eqns for v in eqn.invars if _is_var(v)}
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if _lays_out(eqn):
            source = operands[0]
            views = (*source.views, (eqn, source.level))
            env[eqn.outvars[0]] = dataclasses.replace(source, views=views)
        elif eqn.primitive is prims.jit_p:
            env.update(_through_jit(eqn, operands, level))
        elif eqn.primitive is prims.scan_p:
            env.update(_through_scan(eqn, operands, level))
        elif eqn.primitive is prims.cond_p:
            env.update(_through_cond(eqn, operands, level, read_by_equations))
        else:
            env.update({v: Origin(v, level=level) for v in eqn.outvars})
    return env


def _through_jit(eqn: Any, operands: list[Origin], level: int) -> dict[Any, Origin]:
    body = jaxprs.open_jaxpr(eqn.params["jaxpr"])[0]
    inner = _origins(body, operands, level)
    visible = {origin.root for origin in operands if _is_var(origin.root)}
    first: dict[Any, Origin] = {}
    outs = {}
    for outer, var in zip(eqn.outvars, body.outvars, strict=True):
        origin = inner[var] if _is_var(var) else Origin(var)
        if not _is_var(origin.root) or origin.root in visible:
            outs[outer] = origin
        else:  # made inside: the first result that holds it stands for it
            outs[outer] = first.setdefault(origin.key(), Origin(outer, level=level))
    return outs


def _through_cond(
    eqn: Any, operands: list[Origin], level: int, read_by_equations: set[Any]
) -> dict[Any, Origin]:
    """A result that no equation reads is what one branch keeps for its own backward pass.

    jax gives it no value in the other branches, so that it may be taken as set in all of them.
    """
    visible = {origin.root for origin in operands if _is_var(origin.root)}
    branches = [(b, _origins(b, operands[1:], level)) for b in jaxprs.bodies(eqn)]
    outs = {}
    for i, outer in enumerate(eqn.outvars):
        set_in = []
        for body, inner in branches:
            var = body.outvars[i]
            origin = inner[var] if _is_var(var) else Origin(var)
            if not (_is_var(origin.root) and origin.root in _unset(body)):
                set_in.append(origin)
        only = set_in[0] if len(set_in) == 1 and outer not in read_by_equations else None
        passed = only is not None and _is_var(only.root) and only.root in visible
        outs[outer] = only if passed else Origin(outer, level=level)
    return outs


def _unset(jaxpr: Any) -> set[Any]:
    """The scalars without a value, with which jax fills in for what other branches keep."""
    return {v for eqn in jaxpr.eqns if eqn.primitive in _placeholders() for v in eqn.outvars}


@functools.cache
def _placeholders() -> set[Any]:
    """The primitives that make them, which have no public name: read off a small branch."""

    def small(p, x):
        return jax.vjp(lambda x: lax.cond(p, jnp.sin, lambda x: x, x), x)[1]

    eqns = jax.make_jaxpr(small)(True, 1.0).jaxpr.eqns
    inside = [e for eqn in eqns for body in jaxprs.bodies(eqn) for e in body.eqns]
    return {eqn.primitive for eqn in inside if not eqn.invars}


def _through_scan(eqn: Any, operands: list[Origin], level: int) -> dict[Any, Origin]:
    body = jaxprs.open_jaxpr(eqn.params["jaxpr"])[0]
    consts, carry = jaxprs.scan_split(eqn)
    inputs = [
        dataclasses.replace(o, level=level + 1) if i >= consts + carry else o
        for i, o in enumerate(operands)
    ]
    carried = slice(consts, consts + carry)
    inputs[carried] = [Origin(v, level=level + 1) for v in body.invars[carried]]
    inner = _origins(body, inputs, level + 1)
    xs = [o for o in operands[consts + carry :] if o.level == level and _is_var(o.root)]
    sliced = {origin.root for origin in xs}
    outs = {}
    for i, (outer, var) in enumerate(zip(eqn.outvars, body.outvars, strict=True)):
        origin = inner[var] if _is_var(var) else None
        if origin and i >= carry and origin.level == level + 1 and origin.root in sliced:
            outs[outer] = dataclasses.replace(origin, level=level)
        else:
            outs[outer] = Origin(outer, level=level)
    return outs


def needed(jaxpr: Any, used: Sequence[bool]) -> list[bool]:
    """Which inputs of a jaxpr the used ones of its outputs depend on."""
    live = {v for v, use in zip(jaxpr.outvars, used, strict=True) if use and _is_var(v)}
    for eqn in reversed(jaxpr.eqns):
        outs = [v in live for v in eqn.outvars]
        if any(outs) or eqn.effects:
            ins = _needed_by(eqn, outs)
            live |= {v for v, use in zip(eqn.invars, ins, strict=True) if use and _is_var(v)}
    return [v in live for v in jaxpr.invars]


def _needed_by(eqn: Any, used: list[bool]) -> list[bool]:
    bodies = jaxprs.bodies(eqn)
    if eqn.effects or not bodies:
        return [True] * len(eqn.invars)
    if eqn.primitive is prims.cond_p:
        by_branch = [needed(branch, used) for branch in bodies]
        return [True, *map(any, zip(*by_branch, strict=True))]
    if eqn.primitive is not prims.scan_p:
        return needed(bodies[0], used)
    consts, carry = jaxprs.scan_split(eqn)
    while True:  # a carry is needed where any later step needs it
        ins = needed(bodies[0], used)
        carried = ins[consts : consts + carry]
        grown = [a or b for a, b in zip(used[:carry], carried, strict=True)] + used[carry:]
        if grown == used:
            return ins
        used = grown


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


# --- the two phases ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kept:
    """The residuals of a forward jaxpr: what is kept, and how each is had back from it.

    variables: kept, each once; recipes: for each residual its origin, or None if no gradient needs
    it; again: equations on inputs alone that are done again, and the variables they make.
    """

    variables: tuple[Any, ...]
    recipes: tuple[Origin | None, ...]
    inputs: tuple[Any, ...]
    again: tuple[tuple[Any, ...], tuple[Any, ...]]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(v.aval) for v in self.variables)

    def restore(self, kept: Sequence[Any], inputs: Sequence[Any], like: Sequence[Any]) -> list[Any]:
        """All residuals again; one that no gradient needs is zeros, and falls away in XLA."""
        known = dict(zip(self.inputs, inputs, strict=True))
        known |= dict(zip(self.variables, kept, strict=True))
        eqns, made = self.again
        known |= dict(zip(made, jaxprs.run_eqns(eqns, self.inputs, made, inputs), strict=True))

        def value(recipe, aval):
            if recipe is None:
                return jnp.zeros(aval.shape, aval.dtype)
            return recipe.value(known[recipe.root] if _is_var(recipe.root) else recipe.root.val)

        return [value(*pair) for pair in zip(self.recipes, like, strict=True)]


def keep(jaxpr: Any, residuals: Sequence[Any], wanted: Sequence[bool], free: int) -> Kept:
    """Keep each residual once, and none that can be had from the inputs.

    An input laid out anew is not kept, nor what is computed from the first `free` inputs alone:
    they are parameters and constants, and arithmetic among them counts as a parameter.
    """
    known = origins(jaxpr)
    again = _computed_from(jaxpr, jaxpr.invars[:free])
    at_hand = {*jaxpr.invars, *(v for eqn in again for v in eqn.outvars)}
    kept: dict[Any, None] = {}
    by_key: dict[Any, Any] = {}

    def recipe(var, may_keep_root):
        origin = known[var] if _is_var(var) else Origin(var)
        root = origin.root
        if not _is_var(root) or root in at_hand or root in kept:
            return origin
        if may_keep_root and nbytes(root.aval) <= nbytes(var.aval):
            kept[root] = None
            return origin
        if may_keep_root:
            return None
        var = by_key.setdefault(origin.key(), var)
        kept[var] = None
        return Origin(var)

    # A view larger than its root is had back from it; a smaller one too, if the root is kept.
    first = [recipe(v, True) if use else None for v, use in zip(residuals, wanted, strict=True)]
    recipes = tuple(
        done or (recipe(v, False) if use else None)
        for v, use, done in zip(residuals, wanted, first, strict=True)
    )
    roots = {recipe.root for recipe in recipes if recipe and _is_var(recipe.root)}
    made = tuple(v for eqn in again for v in eqn.outvars if v in roots)
    return Kept(tuple(kept), recipes, tuple(jaxpr.invars), (tuple(again), made))


def _computed_from(jaxpr: Any, inputs: Sequence[Any]) -> list[Any]:
    """The cheap equations that read nothing but these inputs and what they make of them.

    Products and loops are not cheap: where the data is closed over, all the network would be done
    again.
    """
    have, eqns = set(inputs), []
    for eqn in jaxpr.eqns:
        if _is_cheap(eqn) and all(v in have for v in eqn.invars if _is_var(v)):
            have.update(eqn.outvars)
            eqns.append(eqn)
    return eqns


def _is_cheap(eqn: Any) -> bool:
    if eqn.effects or eqn.primitive in (lax.dot_general_p, lax.conv_general_dilated_p):
        return False
    inner = [e for body in jaxprs.bodies_in(eqn.params) for e in body.eqns]
    return not inner or (eqn.primitive is prims.jit_p and all(map(_is_cheap, inner)))
