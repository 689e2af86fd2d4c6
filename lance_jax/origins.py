"""Which variables of a traced call depend on parameters, and which are arguments of it."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lance_jax import jaxprs
from lance_jax.jaxprs import Literal, Traced, prims

_SCOPE = "lance_jax_activation"

Origin = tuple[bool, bool]  # whether it depends on a parameter; whether it was computed at all


class Origins:
    """What the variables of a traced call come from, at any depth.

    A body that is used several times has the union of what it was used with.
    """

    def __init__(self, traced: Traced):
        self._moving: set[Any] = set()
        self._computed: set[Any] = set()
        given = [(ref is not None, False) for ref in traced.refs]
        self._walk(traced.jaxpr, given)

    def is_argument(self, v: Any) -> bool:
        """Whether it is an argument (or a constant) as it was given, which is held anyway."""
        return v not in self._computed and v not in self._moving

    def is_data_alone(self, v: Any) -> bool:
        """Whether it does not depend on any parameter, such as a mask or a position."""
        return v not in self._moving

    def _walk(self, jaxpr: Any, inputs: Sequence[Origin]) -> list[Origin]:
        env: dict[Any, Origin] = dict.fromkeys(jaxpr.constvars, (False, False))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Origin:
            return (False, False) if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self._results(eqn, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        for v, (moving, computed) in env.items():
            if moving:
                self._moving.add(v)
            if computed:
                self._computed.add(v)
        return [read(v) for v in jaxpr.outvars]

    def _results(self, eqn: Any, operands: list[Origin]) -> list[Origin]:
        bodies = jaxprs.bodies(eqn)
        if bodies and eqn.primitive is prims.scan_p:
            return self._scanned(eqn, bodies[0], operands)
        if bodies and eqn.primitive is prims.cond_p:
            chosen = [self._walk(body, operands[1:]) for body in bodies]
            return [
                (operands[0][0] or any(moving for moving, _ in outs), True)
                for outs in zip(*chosen, strict=True)
            ]
        if bodies:
            return self._walk(bodies[0], operands)
        moving = any(moving for moving, _ in operands)
        return [(moving or is_marked(eqn), True)] * len(eqn.outvars)

    def _scanned(self, eqn: Any, body: Any, operands: list[Origin]) -> list[Origin]:
        n, m = jaxprs.scan_split(eqn)
        carry = [(moving, True) for moving, _ in operands[n : n + m]]
        slices = [(moving, True) for moving, _ in operands[n + m :]]
        while True:  # what a step makes of its carry is the next one's
            outs = self._walk(body, [*operands[:n], *carry, *slices])
            after = [(a or b, True) for (a, _), (b, _) in zip(carry, outs[:m], strict=True)]
            if after == carry:
                return [(moving, True) for moving, _ in outs]
            carry = after


# --- activations that are given ------------------------------------------------------------------


def as_activation(x: jax.Array) -> jax.Array:
    """x, which counts as computed from parameters, by a part of the network that comes before.

    No block begins before it, and what enters a block is kept by its core as in the whole network.
    """
    with jax.named_scope(_SCOPE):
        return lax.optimization_barrier(x)


def is_marked(eqn: Any) -> bool:
    """Whether it is an equation of `as_activation`."""
    return _SCOPE in str(eqn.source_info.name_stack)
