"""Gram matrices of the inputs of layers and blocks, summed over batches, forward only."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lance_jax import hosvd, interpreter, jaxprs
from lance_jax.block_rule import Block
from lance_jax.interpreter import Remat, Site
from lance_jax.layer_rule import Product
from lance_jax.layers import (
    Blocks,
    Found,
    Use,
    find,
    product_of,
    weight_of,
)
from lance_jax.modes import accumulator

# Beside the Gram matrices, for a mean: the sum of the inputs over the batch, and their number.
SUM, COUNT = "sum", "count"


def sum_grams(
    apply_fn: Callable,
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    wanted: dict[str, tuple[str, ...]],
) -> dict[str, dict[str, np.ndarray]]:
    """Sums over all batches, in float64 on the host."""
    compiled: dict[Any, Any] = {}
    total: dict[str, dict[str, np.ndarray]] = {path: {} for path in wanted}
    for batch in batches:
        arrays, static = jaxprs.split((params, batch))
        if static not in compiled:
            compiled[static] = jax.jit(functools.partial(_grams, apply_fn, static, wanted))
        for path, sums in jax.device_get(compiled[static](arrays)).items():
            held = total[path]
            for mode, value in sums.items():
                held[mode] = _add(held.get(mode), np.asarray(value, np.float64), path, mode)
    return total


def _add(total: np.ndarray | None, new: np.ndarray, path: str, mode: str) -> np.ndarray:
    if total is None or total.shape == new.shape:
        return new if total is None else total + new
    if mode == "batch" and new.shape[-2] < total.shape[-2]:  # a short last batch
        if hosvd.is_gram(new) and not hosvd.is_gram(total):
            new = hosvd.sketch_of(new, hosvd.COLUMNS)
        short = [(0, a - b) for a, b in zip(total.shape, new.shape, strict=True)]
        return total + np.pad(new, short)
    raise ValueError(
        f"the {mode} mode of {path!r} has size {new.shape[-2]} in one batch and "
        f"{total.shape[-2]} in the first; it must not grow or change between batches"
    )


def _grams(apply_fn: Callable, static: Any, wanted: Any, arrays: list[Any]) -> Any:
    """The Gram matrices of one batch, by path and mode.

    Each layer's input passes an identity whose cotangent for a probe of zeros is the Gram matrix:
    differentiation carries it out of any scan, branch or remat, and sums over a weight's uses.
    """
    params, batch = static.join(arrays)
    traced = jaxprs.trace(apply_fn, params, *batch)
    found = find(traced)
    _check_same(found, wanted)
    probes = {path: _probes(found.uses[path][0], modes) for path, modes in wanted.items()}

    def run(probes):
        names = Blocks(traced)

        def rule(jaxpr, i, refs, trips):
            eqn = jaxpr.eqns[i]
            block, weight = names.visit(jaxpr, i, refs), weight_of(eqn, refs)
            if block in probes:
                return {i: names.node(eqn, refs, trips, probes[block])}
            if not isinstance(weight, int) or refs[weight].paths[0] not in probes:
                return {}
            return {i: Site(probes[refs[weight].paths[0]], refs[weight].scans, (weight,))}

        nodes = interpreter.plan(traced.jaxpr, traced.refs, rule)
        outs = interpreter.run(traced.jaxpr, traced.consts, nodes, traced.inputs, _tapped)
        return [out for out in outs if jnp.issubdtype(out.dtype, jnp.floating)]

    outs, vjp = jax.vjp(run, probes)
    return vjp([jnp.zeros_like(out) for out in outs])[0]


def _check_same(found: Found, wanted: dict[str, tuple[str, ...]]) -> None:
    """The layers and blocks, and what enters them, are those of the first batch."""
    for path, modes in wanted.items():
        there = found.uses[path][0].product.modes if path in found.uses else {}
        for mode in modes:
            if mode not in (*there, SUM, COUNT):
                raise ValueError(
                    f"in one batch {path!r} has no {mode} mode, as it had in the first; what "
                    "enters a block may depend on the batches' shape: give those of one shape"
                )


def _probes(use: Use, modes: Sequence[str]) -> dict[str, jax.Array]:
    product = use.product
    zeros = {}
    for mode in modes:
        if mode == SUM:
            axis = use.of_product().batch_axis
            shape = (*product.x_shape[:axis], *product.x_shape[axis + 1 :])
        elif mode == COUNT:
            shape = ()
        else:
            shape = (*product.basis_shape(mode), hosvd.columns(product.modes[mode]))
        x = use.x if mode in (SUM, COUNT) else use.x_of(mode)
        zeros[mode] = jnp.zeros((*use.stack, *shape), accumulator(x.dtype))
    return zeros


def _tapped(jaxpr: Any, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    """The layer's or block's equation as it stands, its input tapped."""
    eqn = jaxpr.eqns[i]
    operands = [read(v) for v in eqn.invars]
    if isinstance(node, Remat):
        block = Block.of(eqn, node.site.operands, node.given)
        xs = _tap(block.sums, [operands[j] for j in block.operands], node.site.value)
        for j, x in zip(block.operands, xs, strict=True):
            operands[j] = x
        return interpreter.rebuild(eqn, node.body, operands, _tapped)
    (weight,) = node.operands
    product = product_of(eqn, weight)

    def sums(x, modes):
        return {mode: _sum(product, x, mode) for mode in modes}

    operands[1 - weight] = _tap(sums, operands[1 - weight], node.value)
    return [eqn.primitive.bind(*operands, **eqn.params)]


def _tap(sums: Callable[[Any, Any], Any], x: Any, probes: Any) -> Any:
    """x; the gradient of the probes becomes `sums(x, their names)`."""

    @jax.custom_vjp
    def tap(x, probes):
        return x

    tap.defvjp(lambda x, probes: (x, x), lambda x, dx: (dx, sums(x, tuple(probes))))
    return tap(x, probes)


def _sum(product: Product, x: jax.Array, mode: str) -> jax.Array:
    acc = accumulator(x.dtype)
    if mode == SUM:
        return jnp.sum(x.astype(acc), axis=product.batch_axis)
    if mode == COUNT:
        return jnp.asarray(x.shape[product.batch_axis], acc)
    return product.gram(x, mode)
