"""`value_and_grad` in two jitted phases, so that what is kept between them is real."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from lance_jax import jaxprs, residuals
from lance_jax.paths import leaves_with_path, matching

# What jax reads while it traces, beside the arguments.
_SETTINGS = ("jax_default_matmul_precision", "jax_numpy_dtype_promotion")

Trainable = str | Sequence[str] | Callable[[str], bool] | None


def value_and_grad(
    loss_fn: Callable, *, trainable: Trainable = None, has_aux: bool = False
) -> "ValueAndGrad":
    """Like `jax.value_and_grad`, as two jitted phases whose intermediate lives and dies visibly.

    Args:
      loss_fn: a function of (params, *args, **kwargs) to a scalar, or to (scalar, aux).
      trainable: which parameters to differentiate: a regular expression or several
        (`re.search` over paths joined by `/`), or a function of a path; None: all floating ones.
        The others cost no gradient and no residual.
      has_aux: whether `loss_fn` returns (scalar, aux).

    Returns:
      An object `vg` with

      * `vg(params, *args) -> (value, grads)`, where value is (scalar, aux) with `has_aux`, and
        grads has the structure of params with None for what is not trained;
      * `vg.forward(params, *args) -> (value, saved)` and
        `vg.backward(saved, params, *args) -> grads`: `saved` is a pytree of arrays that holds no
        parameter, no argument and nothing that `loss_fn` closes over;
      * `vg.partition(params) -> (trainable, frozen)` and `vg.merge(trainable, frozen) -> params`,
        both parts with None in the other's places, for optax.

    Raises:
      ValueError: when called, if `trainable` matches no floating parameter or the loss is no
        floating scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> vg = value_and_grad(lambda p, x: jnp.sum(p["w"] * x), trainable="w")
      >>> value, saved = vg.forward({"w": jnp.ones(2), "b": jnp.ones(3)}, jnp.arange(2.0))
      >>> vg.backward(saved, {"w": jnp.ones(2), "b": jnp.ones(3)}, jnp.arange(2.0))
      {'b': None, 'w': Array([0., 1.], dtype=float32)}
    """
    return ValueAndGrad(loss_fn, trainable, has_aux)


class ValueAndGrad:
    """See `value_and_grad`."""

    def __init__(self, loss_fn: Callable, trainable: Trainable, has_aux: bool):
        self._loss_fn = loss_fn
        self._trainable = trainable
        self._has_aux = has_aux
        self._phases: dict[Any, Phases] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, saved = self.forward(params, *args, **kwargs)
        return value, self.backward(saved, params, *args, **kwargs)

    def forward(self, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(value, saved)."""
        phases, arrays = self._traced(params, args, kwargs)
        return phases.forward(arrays)

    def backward(self, saved: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The gradients, from what `forward` saved with the same arguments."""
        phases, arrays = self._traced(params, args, kwargs)
        grads = iter(phases.backward(saved, arrays))
        return _fill(params, [next(grads) if use else None for use in phases.chosen])

    def partition(self, params: Any) -> tuple[Any, Any]:
        """(trainable, frozen), each with None in the other's places."""
        chosen, leaves = choose(params, self._trainable), jax.tree.leaves(params)
        pairs = list(zip(leaves, chosen, strict=True))
        trainable = _fill(params, [leaf if use else None for leaf, use in pairs])
        return trainable, _fill(params, [None if use else leaf for leaf, use in pairs])

    def merge(self, trainable: Any, frozen: Any) -> Any:
        """The parameters again."""

        def pick(a, b):
            return b if a is None else a

        return jax.tree.map(pick, trainable, frozen, is_leaf=lambda leaf: leaf is None)

    def _traced(self, params, args, kwargs) -> "tuple[Phases, list[Any]]":
        arrays, static = jaxprs.split((params, args, kwargs))
        settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
        key = static, tuple(map(_abstract, arrays)), settings
        try:
            phases = self._phases.get(key)
        except TypeError as error:
            raise ValueError(
                f"an argument that is no array must be hashable, since it is static: {error}"
            ) from None
        if phases is None:
            chosen = choose(params, self._trainable)
            phases = trace_phases(self._loss_fn, chosen, self._has_aux, params, args, kwargs)
            if not any(isinstance(const, jax.core.Tracer) for const in phases.consts):
                self._phases[key] = phases
        return phases, arrays


def _abstract(array: Any) -> Any:
    return array.shape, array.dtype, getattr(array, "weak_type", False)


def _fill(params: Any, leaves: Sequence[Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def choose(params: Any, trainable: Trainable) -> list[bool]:
    """For every leaf of params, whether it is trained."""
    leaves = leaves_with_path(params)
    for path, leaf in leaves:
        if isinstance(leaf, float | complex):
            raise ValueError(f"parameter {path!r} is the Python number {leaf}; make it an array")
    floating = [jaxprs.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) for _, x in leaves]
    if trainable is None:
        chosen = floating
    elif callable(trainable):
        pairs = zip(leaves, floating, strict=True)
        chosen = [is_float and bool(trainable(path)) for (path, _), is_float in pairs]
    else:
        hits = matching(trainable, [path for path, _ in leaves], "trainable", "parameter")
        chosen = [hit and is_float for hit, is_float in zip(hits, floating, strict=True)]
    if not any(chosen):
        raise ValueError(f"trainable is {trainable!r}: it selects no floating parameter")
    return chosen


@dataclasses.dataclass(frozen=True)
class Phases:
    """The two phases of one step, traced for one set of shapes.

    forward: arrays -> (value, kept); backward: (kept, arrays) -> the chosen leaves' gradients.
    """

    forward: Callable[[list[Any]], tuple[Any, tuple[Any, ...]]]
    backward: Callable[[tuple[Any, ...], list[Any]], list[Any]]
    kept: residuals.Kept
    consts: list[Any]
    chosen: Sequence[bool]


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
        return jaxprs.run_eqns(ahead.eqns, ahead.invars, outvars, [*consts, *arrays])

    @jax.jit
    def run_backward(saved, consts, back_consts, arrays):
        leaves = kept.restore(saved, [*consts, *arrays], leaves_like)
        return jaxprs.run_eqns(back.eqns, back.invars, back.outvars, [*back_consts, *leaves])

    def forward(arrays):
        outs = run_forward(consts, arrays)
        value, aux = rest.join(outs[:count])
        return ((value, aux) if has_aux else value), tuple(outs[count:])

    def backward(saved, arrays):
        if not isinstance(saved, tuple):
            raise ValueError(f"saved is a {type(saved).__name__}; it must be what forward gave")
        got, want = map(_shapes, (saved, kept.variables))
        if got != want:
            raise ValueError(
                f"saved does not belong to these arguments: it holds {got}, and they need {want}"
            )
        return run_backward(saved, consts, back_consts, arrays)

    return Phases(forward, backward, kept, consts, chosen)


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
