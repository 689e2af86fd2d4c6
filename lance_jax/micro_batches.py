"""Gradients summed over micro-batches, in one loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import jaxprs
from lance_jax.modes import accumulator
from lance_jax.paths import leaves_with_path
from lance_jax.phases import Phases, check_saved, trace_phases


@dataclasses.dataclass(frozen=True)
class Accumulated:
    """A step over micro-batches, with the interface of `Phases`: what is kept are the gradients."""

    run: Callable[[Any, Any], tuple[list[Any], list[Any]]]
    consts: Any
    rest: jaxprs.Static
    like: Sequence[Any]
    chosen: Sequence[bool]

    def forward(self, arrays: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
        values, grads = self.run(self.consts, arrays)
        return self.rest.join(values), tuple(grads)

    def backward(self, kept: Any, arrays: Sequence[Any]) -> list[Any]:
        check_saved(kept, self.like)
        return list(kept)


def trace_accumulated(
    size: int,
    loss_fn: Callable,
    chosen: Sequence[bool],
    has_aux: bool,
    params: Any,
    args: Any,
    kwargs: Any,
) -> Accumulated | Phases:
    """A step of micro-batches of `size` samples, the last one perhaps shorter."""
    batch = _batch_size(args)
    whole, short = divmod(batch, size)
    if whole == 0 or (whole == 1 and not short):
        return trace_phases(loss_fn, chosen, has_aux, params, args, kwargs)

    def trace(n: int) -> Phases:
        def cut(leaf: Any) -> Any:
            if not _is_divided(leaf):
                return leaf
            return jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype)

        return trace_phases(loss_fn, chosen, has_aux, params, jax.tree.map(cut, args), kwargs)

    parts = [trace(size), *([trace(short)] if short else [])]
    if has_aux:
        other = parts[-1] if short else trace(size + 1)
        _check_aux(parts[0].values_like[1:], other.values_like[1:])
        if parts[0].rest != other.rest:
            raise ValueError(
                "an auxiliary output that is no array depends on the number of samples; with "
                "micro_batch it must not"
            )
    before = len(jaxprs.split(params)[0])
    places = [before + i for i, a in enumerate(jaxprs.split(args)[0]) if _is_divided(a)]
    # Shapes alone: what is cached must not hold the parameters of the first step.
    like = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for leaf, use in zip(jax.tree.leaves(params), chosen, strict=True)
        if use
    ]
    run = _loop(parts, places, [*parts[0].values_like, *like], size, batch)
    return Accumulated(run, [part.consts for part in parts], parts[0].rest, like, chosen)


def _loop(
    parts: Sequence[Phases], places: Sequence[int], outs: Sequence[Any], size: int, batch: int
) -> Callable[[Any, Any], tuple[list[Any], list[Any]]]:
    """(consts, arrays) -> the means of values and gradients over all micro-batches.

    parts: the step of a whole micro-batch, and that of a short last one if there is one; places:
    which arrays are divided; outs: the shapes of values and gradients.
    """

    @jax.jit
    def run(consts: Any, arrays: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        def add(total: list[Any], i: int, divided: Sequence[Any]) -> list[Any]:
            """Adds the values and gradients of one micro-batch, as often as it has samples."""
            given = list(arrays)
            for place, array in zip(places, divided, strict=True):
                given[place] = array
            values, kept = parts[i].run_forward(consts[i], given)
            new = [*values, *parts[i].run_backward(kept, consts[i], given)]
            n = len(divided[0])
            return [a + b.astype(a.dtype) * n for a, b in zip(total, new, strict=True)]

        total = [jnp.zeros(out.shape, accumulator(out.dtype)) for out in outs]
        cut = batch - batch % size
        stacked = [arrays[p][:cut].reshape(-1, size, *arrays[p].shape[1:]) for p in places]
        total, _ = lax.scan(lambda total, xs: (add(total, 0, xs), None), total, stacked)
        if cut < batch:
            total = add(total, 1, [arrays[p][cut:] for p in places])
        means = [(a / batch).astype(out.dtype) for a, out in zip(total, outs, strict=True)]
        count = len(parts[0].values_like)
        return means[:count], means[count:]

    return run


def _is_divided(leaf: Any) -> bool:
    return jaxprs.is_array(leaf) and len(leaf.shape) > 0


def _batch_size(args: Any) -> int:
    sizes = {path: leaf.shape[0] for path, leaf in leaves_with_path(args) if _is_divided(leaf)}
    if not sizes:
        raise ValueError(
            "micro_batch divides the positional arguments, and none of them is a batch"
        )
    first, size = next(iter(sizes.items()))
    for path, other in sizes.items():
        if other != size:
            raise ValueError(
                f"micro_batch divides the positional arguments along their first axis, but that of "
                f"argument {path} has {other} elements and that of {first} has {size}; give by "
                "keyword what is to be passed whole"
            )
    return size


def _check_aux(aux: Sequence[Any], of_another_size: Sequence[Any]) -> None:
    for one, other in zip(aux, of_another_size, strict=True):
        if one.shape != other.shape or not jnp.issubdtype(one.dtype, jnp.floating):
            raise ValueError(
                f"an auxiliary output is {one.dtype} of shape {one.shape}; with micro_batch they "
                "are averaged, and must be floating and of a shape without the batch"
            )
