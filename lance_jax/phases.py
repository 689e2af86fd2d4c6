"""A traced step in two jitted phases, so that what is kept between them is real."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lance_jax import jaxprs, residuals


@dataclasses.dataclass(frozen=True)
class Phases:
    """The two phases of one step, traced for one set of shapes.

    run_forward: (consts, arrays) -> (values, kept); run_backward: (kept, consts, arrays) -> the
    gradients of the chosen leaves; consts: what the loss closes over; rest: what the values are
    besides arrays.
    """

    run_forward: Callable[[Any, Any], tuple[list[Any], tuple[Any, ...]]]
    run_backward: Callable[[tuple[Any, ...], Any, Any], list[Any]]
    consts: tuple[list[Any], list[Any]]
    kept: residuals.Kept
    values_like: list[jax.ShapeDtypeStruct]
    rest: jaxprs.Static
    chosen: Sequence[bool]

    def forward(self, arrays: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        """((value, aux), kept)."""
        values, kept = self.run_forward(self.consts, arrays)
        return self.rest.join(values), kept

    def backward(self, kept: Any, arrays: Sequence[Any]) -> list[Any]:
        """The gradients of the chosen leaves."""
        check_saved(kept, self.kept.variables)
        return self.run_backward(kept, self.consts, arrays)


def trace_phases(
    loss_fn: Callable, chosen: Sequence[bool], has_aux: bool, params: Any, args: Any, kwargs: Any
) -> Phases:
    """Trace a step and split it: what the backward phase needs is kept once, inputs excluded."""
    arrays, static = jaxprs.split((params, args, kwargs))
    is_leaf_array = [jaxprs.is_array(leaf) for leaf in jax.tree.leaves(params)]
    used = [use for use, array in zip(chosen, is_leaf_array, strict=True) if array]
    trained = [i for i, use in enumerate(used) if use]
    out: list[Any] = []

    def linearized(*arrays):
        def loss(leaves):
            filled = list(arrays)
            for i, leaf in zip(trained, leaves, strict=True):
                filled[i] = leaf
            params, args, kwargs = static.join(filled)
            return _value_and_aux(loss_fn(params, *args, **kwargs), has_aux)

        value, vjp, aux = jax.vjp(loss, [arrays[i] for i in trained], has_aux=True)
        values, rest = jaxprs.split((value, aux))
        leaves, tree = jax.tree.flatten(vjp)
        out[:] = [len(values), rest, tree]
        return [*values, *leaves]

    closed = jax.make_jaxpr(linearized)(*arrays)
    count, rest, vjp_tree = out
    # What the loss closes over becomes an input: passed again, never kept and never baked in.
    ahead, consts = jaxprs.hoist_consts(closed)
    values, leaves = ahead.outvars[:count], ahead.outvars[count:]
    value_like, leaves_like = _struct(values[0]), [_struct(v) for v in leaves]

    def pulled_back(leaves):
        one = jnp.ones(value_like.shape, value_like.dtype)
        return jax.tree.unflatten(vjp_tree, leaves)(one)[0]

    back, back_consts = jaxprs.hoist_consts(jax.make_jaxpr(pulled_back)(leaves_like))
    wanted = residuals.needed(back, [True] * len(trained))[len(back_consts) :]
    kept = residuals.keep(ahead, leaves, wanted, len(consts) + len(used))

    @jax.jit
    def run_forward(consts, arrays):
        outvars = [*values, *kept.variables]
        outs = jaxprs.run_eqns(ahead.eqns, ahead.invars, outvars, [*consts[0], *arrays])
        return outs[:count], tuple(outs[count:])

    @jax.jit
    def run_backward(saved, consts, arrays):
        leaves = kept.restore(saved, [*consts[0], *arrays], leaves_like)
        return jaxprs.run_eqns(back.eqns, back.invars, back.outvars, [*consts[1], *leaves])

    consts = consts, back_consts
    shapes = [_struct(v) for v in values]
    return Phases(run_forward, run_backward, consts, kept, shapes, rest, chosen)


def check_saved(saved: Any, like: Sequence[Any]) -> None:
    """ValueError unless `saved` is a tuple of arrays like these."""
    if not isinstance(saved, tuple):
        raise ValueError(f"saved is a {type(saved).__name__}; it must be what forward gave")
    got, want = map(_shapes, (saved, like))
    if got != want:
        raise ValueError(
            f"saved does not belong to these arguments: it holds {got}, and they need {want}"
        )


def _shapes(arrays: Sequence[Any]) -> str:
    def described(array):
        aval = getattr(array, "aval", array)
        return f"{aval.dtype}{list(aval.shape)}" if jaxprs.is_array(aval) else repr(aval)

    return ", ".join(map(described, arrays))


def _struct(atom: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype)


def _value_and_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise ValueError("has_aux is True, but the loss returns no pair (scalar, aux)")
    value, aux = result if has_aux else (result, None)
    if not (jaxprs.is_array(value) or isinstance(value, int | float | complex)):
        raise ValueError(
            f"the loss is a {type(value).__name__}; it must be a floating scalar, or a pair "
            "(scalar, aux) with has_aux=True"
        )
    value = jnp.asarray(value)
    if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"the loss is {value.dtype} of shape {value.shape}; it must be a floating scalar"
        )
    return value, aux
