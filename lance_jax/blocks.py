"""`blocks`: puts the equations that use one block's parameters under one `jax.checkpoint`."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

from lance_jax import jaxprs
from lance_jax.interpreter import (
    Body,
    Marked,
    Nodes,
    Run,
    Skip,
    body_refs,
    operand_refs,
    run,
)
from lance_jax.jaxprs import Eqn, Jaxpr, Ref, bind, bodies, nbytes, prims, variables
from lance_jax.origins import Origins, is_marked

Refs = Sequence[Ref | None]
NameOf = Callable[[str], str | None]  # the block that a parameter's path belongs to
Bytes = tuple[int, int]  # of activations, and of what is computed from arguments alone
Name = tuple[str, bool]  # of a block, or the path of a parameter that belongs to none; which it is


def blocks(apply_fn: Callable, pattern: str) -> Callable:
    """The same function, with each block of a network under a `jax.checkpoint` of its own.

    Blocks are found by the parameters they use, so that no model has to be changed, whatever it is
    written in. The text that `pattern` matches in a parameter's path names the parameter's block:
    r"layers_\\d+" finds `layers_0`, `layers_1` and so on. A block holds all equations from the
    first to the last that uses its parameters, and none that uses a parameter of another name,
    matched or not. Of the equations without parameters before and after, it takes in those with
    which the fewest bytes cross from one block into the next: the sum and the relu at the end of a
    residual block, the mean and variance at the beginning of a normalised one.

    In a `lax.scan` over stacked parameters the block is inside of the loop. What one `jax.jit` or
    branch inside the network has of a block's equations, and what stands outside of it, are blocks
    of their own, the later ones with `:2` and so on after the name. A `jax.checkpoint` of the
    network's own stays as it is, named by the path that its parameters share. `layers` then lists
    the blocks, and `calibrate` and `compress` take them by their names.

    Args:
      apply_fn: any JAX function of (params, *args, **kwargs), a network or its loss. The last
        block of a loss goes on to its end, and keeps nothing of the logits.
      pattern: a regular expression over the paths of parameters (`re.search`).

    Returns:
      A function of `apply_fn`'s signature, with the same values and gradients.

    Raises:
      ValueError: for what is no regular expression; when called, if it matches no parameter, or
        nothing that uses one, or if blocks interleave in one body.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {pattern!r}; it must be a string, a regular expression")
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None

    def name_of(path: str) -> str | None:
        found = regex.search(path)
        return found.group() if found else None

    @functools.wraps(apply_fn)
    def with_blocks(params, *args, **kwargs):
        traced = jaxprs.trace(apply_fn, params, *args, **kwargs)
        paths = [path for ref in traced.refs if ref for path in ref.paths]
        named = [path for path in paths if name_of(path) is not None]
        if not named:
            known = ", ".join(paths) or "none"
            raise ValueError(f"pattern {pattern!r} matches no parameter; there are {known}")
        empty = [path for path in named if not name_of(path)]
        if empty:
            raise ValueError(
                f"pattern {pattern!r} matches an empty text in {empty[0]!r}; a block needs a name"
            )
        nodes = _plan(traced.jaxpr, traced.refs, name_of, Origins(traced))
        if not nodes:
            raise ValueError(
                f"pattern {pattern!r} matches parameters, such as {named[0]!r}, but no block of "
                "equations that use them with data and none of another name"
            )
        outs = run(traced.jaxpr, traced.consts, nodes, traced.inputs, _as_it_is)
        return traced.unflatten(outs)

    return with_blocks


def _as_it_is(jaxpr: Jaxpr, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    eqn = jaxpr.eqns[i]
    return bind(eqn, [read(v) for v in variables(eqn.invars)])


def _plan(jaxpr: Jaxpr, refs: Refs, name_of: NameOf, origins: Origins) -> Nodes:
    operands = operand_refs(jaxpr, refs)
    users = [_users(eqn, of, name_of) for eqn, of in zip(jaxpr.eqns, operands, strict=True)]
    nodes: Nodes = {}
    own: dict[int, str] = {}  # equation -> the one block that it is part of
    for i, (eqn, of) in enumerate(zip(jaxpr.eqns, operands, strict=True)):
        matched = [name for name, is_block in users[i] if is_block]
        if not matched:
            continue
        if bodies(eqn) and (len(users[i]) > 1 or _repeats(eqn, of, name_of)):
            inner = zip(bodies(eqn), body_refs(eqn, of), strict=True)
            body = Body(tuple(_plan(one, refs, name_of, origins) for one, refs in inner))
            if any(body.nodes):
                nodes[i] = body
        elif len(users[i]) == 1:
            own[i] = matched[0]
    return nodes | _runs(jaxpr, users, own, operands, _crossing(jaxpr, operands, origins))


def _users(eqn: Eqn, operands: Refs, name_of: NameOf) -> list[Name]:
    """Of the parameters that an equation uses together with data.

    Arithmetic among parameters counts as a parameter, so that it may stand anywhere. An activation
    that is given uses those of the network before.
    """
    if is_marked(eqn):
        return [("", False)]
    if all(ref is not None for ref in operands):
        return []
    paths = dict.fromkeys(path for ref in operands if ref for path in ref.paths)
    names = ((name_of(path), path) for path in paths)
    return list(dict.fromkeys((name or path, name is not None) for name, path in names))


def _repeats(eqn: Eqn, operands: Refs, name_of: NameOf) -> bool:
    """Whether a scan over a block's stacked parameters is in an equation."""
    for body, refs in zip(bodies(eqn), body_refs(eqn, operands), strict=True):
        if eqn.primitive is prims.scan_p and any(
            ref and ref.scans[-1] and any(map(name_of, ref.paths)) for ref in refs
        ):
            return True
        inner = zip(body.eqns, operand_refs(body, refs), strict=True)
        if any(bodies(one) and _repeats(one, of, name_of) for one, of in inner):
            return True
    return False


def _runs(
    jaxpr: Jaxpr,
    users: Sequence[list[Name]],
    own: dict[int, str],
    operands: Sequence[Refs],
    crossing: Sequence[Bytes],
) -> Nodes:
    """The blocks of equations at this level; `own` are those that belong to one block each."""
    using = [i for i, names in enumerate(users) if names]
    nodes: Nodes = {}
    begun: list[str] = []
    for name, group in itertools.groupby(using, own.get):
        members = list(group)
        if name is None:
            continue
        first, last = members[0], members[-1]
        if name in begun:
            between = next(n for i in reversed(using[: using.index(first)]) for n, _ in users[i])
            raise ValueError(
                f"blocks interleave: {name!r} is used, then {between!r}, then {name!r} again; "
                "the text that is matched is the block's name: choose a pattern that gives both "
                "one name (of the module around them), or matches neither, or put a "
                "jax.checkpoint around each yourself"
            )
        begun.append(name)
        if first == last and jaxpr.eqns[first].primitive is prims.remat_p:
            nodes[first] = Marked()  # a block already
            continue
        before = max((i for i in using if i < first), default=-1) + 1
        after = min((i for i in using if i > last), default=len(jaxpr.eqns))
        start = _back(operands, before, _cut(crossing, before, first))
        stop = _back(operands, last + 1, _cut(crossing, last + 1, after))
        nodes[start] = Run(name, stop)
        nodes |= {i: Skip() for i in range(start + 1, stop)}
    return nodes


def _cut(crossing: Sequence[Bytes], first: int, last: int) -> int:
    """Where the fewest bytes cross; of several such places the last."""
    return min(range(last, first - 1, -1), key=lambda i: crossing[i])


def _back(operands: Sequence[Refs], least: int, i: int) -> int:
    """Before the arithmetic among parameters that ends at i: it goes with what comes after."""
    while i > least and all(ref is not None for ref in operands[i - 1]):
        i -= 1
    return i


def _crossing(jaxpr: Jaxpr, operands: Sequence[Refs], origins: Origins) -> list[Bytes]:
    """Before each equation, and at the end: bytes of what was computed from data and is used yet.

    Those of activations come first. What is computed from arguments alone, such as a mask, need not
    have a batch: by the sum of both, blocks would begin elsewhere in a batch of another size. The
    arguments are at hand, and cost nothing.
    """
    made: dict[Any, int] = {}
    for i, (eqn, refs) in enumerate(zip(jaxpr.eqns, operands, strict=True)):
        if any(ref is None for ref in refs):
            made |= dict.fromkeys(eqn.outvars, i)
    last = dict.fromkeys(made, 0)
    for i, eqn in enumerate(jaxpr.eqns):
        last |= {v: i for v in variables(eqn.invars) if v in made}
    last |= {v: len(jaxpr.eqns) for v in variables(jaxpr.outvars) if v in made}
    changes = [[0] * (len(jaxpr.eqns) + 2) for _ in range(2)]
    for v, i in made.items():
        if last[v] > i:
            change = changes[origins.is_data_alone(v)]
            change[i + 1] += nbytes(v.aval)
            change[last[v] + 1] -= nbytes(v.aval)
    return list(zip(*(itertools.accumulate(change[:-1]) for change in changes), strict=True))
