"""`compress`: any apply_fn with the rules of layers, blocks and masks in the places they fit."""

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lance_jax import block_rule, interpreter, jaxprs, layer_rule, pointwise
from lance_jax.factors import Factors, LayerFactors, Skipped, as_factors
from lance_jax.interpreter import Remat, Site
from lance_jax.jaxprs import prims
from lance_jax.layers import (
    COMPRESSED,
    Blocks,
    Found,
    Use,
    find,
    product_of,
    weight_of,
)

# --- compressing ---------------------------------------------------------------------------------


def compress(
    apply_fn: Callable, factors: Mapping[str, LayerFactors], *, masks: bool = True
) -> Callable:
    """The same function, keeping for its backward pass only each layer's projected core.

    The forward pass is that of `apply_fn`, and so are dX and the bias gradients where layers are
    compressed; a block's gradients are all taken at its expanded core. A layer in `factors` keeps
    its input's core, X x_m U_m^T over its modes m (LANCE, arXiv 2509.21617), and its weight
    gradient is plain backprop's at the projected input, computed from the core. With a feature,
    channel or patch basis alone, not quantised and not centred, that is the orthogonal projection
    U U^T dW of the exact gradient, a descent direction. With a batch, spatial or token basis, a
    mean or a quantised core there is no such guarantee.

    Args:
      apply_fn: any JAX function of (params, *args, **kwargs).
      factors: `Factors`, or a mapping from parameter paths to `LayerFactors`; may be traced.
      masks: whether relu, relu6, leaky relu, `maximum`, `minimum` and `clip` keep packed masks
        (exact: 1 bit an element, 1.6 bits where ties have a slope of their own).

    Returns:
      A function of `apply_fn`'s signature. It supports reverse-mode differentiation only, once.

    Raises:
      ValueError: when called, for a path that is no layer, or a basis that does not fit its input;
        when differentiated twice by a layer's weight or what enters a block.
    """
    factors = as_factors(factors)
    return rewrite(apply_fn, factors, pointwise.match if masks else lambda jaxpr, i: {})


def rewrite(
    apply_fn: Callable,
    factors: Factors,
    match_mask: Callable[[Any, int], interpreter.Nodes],
    inline: bool = False,
) -> Callable:
    """`apply_fn` with the layers and blocks in `factors` and the masks that are found replaced.

    inline: whether every other `jax.checkpoint` is taken away, as if it were not there.
    """

    @functools.wraps(apply_fn)
    def compressed(params, *args, **kwargs):
        traced = jaxprs.trace(apply_fn, params, *args, **kwargs)
        check(factors, find(traced))
        nodes = plan(traced, factors, match_mask, inline)
        outs = interpreter.run(traced.jaxpr, traced.consts, nodes, traced.inputs, _apply)
        return traced.unflatten(outs)

    return compressed


def plan(
    traced: jaxprs.Traced,
    factors: Factors,
    match_mask: Callable[[Any, int], interpreter.Nodes],
    inline: bool = False,
) -> interpreter.Nodes:
    """What `rewrite` puts in the place of which equations."""
    names = Blocks(traced)

    def rule(jaxpr, i, refs, trips):
        eqn = jaxpr.eqns[i]
        block, weight = names.visit(jaxpr, i, refs), weight_of(eqn, refs)
        if block is not None and block in factors:
            return {i: names.node(eqn, refs, trips, factors[block])}
        if inline and eqn.primitive is prims.remat_p and jaxprs.bodies(eqn):
            return {i: Remat(Site(None, (False,) * len(trips), ()))}
        if not isinstance(weight, int):
            return match_mask(jaxpr, i)
        kept = factors.get(refs[weight].paths[0])
        return {i: Site(kept, refs[weight].scans, (weight,))} if kept is not None else {}

    return interpreter.plan(traced.jaxpr, traced.refs, rule)


def _apply(jaxpr: Any, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    if isinstance(node, pointwise.Mask):
        return [pointwise.apply(jaxpr, node, read(pointwise.input_of(jaxpr, node)))]
    eqn = jaxpr.eqns[i]
    if isinstance(node, Remat):
        return _apply_block(eqn, node, [read(v) for v in eqn.invars])
    (weight,) = node.operands
    x, w = read(eqn.invars[1 - weight]), read(eqn.invars[weight])
    return [layer_rule.apply(eqn, weight, product_of(eqn, weight), x, w, node.value)]


def _apply_block(eqn: Any, node: Remat, values: list[Any]) -> list[Any]:
    (nodes,) = node.body.nodes
    run = functools.partial(run_body, eqn)
    if node.site.value is None:
        return run(nodes, values)
    block = block_rule.Block.of(eqn, node.site.operands, node.given)
    return block_rule.apply(block, node.site.value, nodes, values, run)


def run_body(eqn: Any, nodes: interpreter.Nodes, values: Sequence[Any]) -> list[Any]:
    """The results of a `jax.checkpoint`'s body, without it."""
    body, consts = jaxprs.open_jaxpr(eqn.params["jaxpr"])
    return interpreter.run(body, consts, nodes, values, _apply)


# --- checking ------------------------------------------------------------------------------------


def check(factors: Factors, found: Found) -> None:
    """Raise one ValueError that lists all that does not fit."""
    errors = []
    for path, layer in factors.items():
        if path not in found.uses:
            near = difflib.get_close_matches(path, found.uses, n=3, cutoff=0.3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            reason = _reason(path, found.layers.skipped)
            why = f"cannot be compressed: {reason}" if reason else "matches no layer or block"
            if not reason and any(other.startswith(f"{path}/") for other in found.uses):
                hint = "; factors of a block need the function that `blocks` gave"
            errors.append(f"factors[{path!r}] {why}{hint}")
            continue
        for use in found.uses[path]:
            errors += _misfits(path, layer, use)
    if errors:
        raise ValueError("; ".join(dict.fromkeys(errors)))


def _reason(path: str, skipped: Sequence[Skipped]) -> str:
    """Why a layer was skipped; a block that is compressed is known by its layers alone."""
    for place, reason in skipped:
        in_block = reason == COMPRESSED and place.startswith(f"{path}/")
        if in_block or path in place.split(" + "):
            return reason
    return ""


def _misfits(path: str, factors: LayerFactors, use: Use) -> Iterator[str]:
    where = f"factors[{path!r}]"
    yield from _misfitting_bases(where, factors, use)
    if isinstance(use.product, block_rule.Block):
        for name in ("mean", "update", "frozen"):
            if not (getattr(factors, name) is None or getattr(factors, name) is False):
                yield f"{where} has {name}; a block has bases and a core_dtype alone"
    else:
        yield from _misfitting_rest(where, factors, use, use.product)


def _misfitting_bases(where: str, factors: LayerFactors, use: Use) -> Iterator[str]:
    product = use.product
    for mode, u in factors.bases.items():
        if mode not in product.modes:
            known = ", ".join(product.modes) or "none, as only arguments enter it"
            noun = "block" if product.kind == "block" else f"{product.kind} layer"
            yield f"{where} has a basis of mode {mode!r}; this {noun} has {known}"
            continue
        shape = (*use.stack, *product.basis_shape(mode))
        if tuple(u.shape[:-1]) != shape or not 1 <= u.shape[-1] <= product.modes[mode]:
            text = ", ".join(map(str, shape))
            line = f"{where} has a {mode} basis of shape {tuple(u.shape)}; it must be ({text}, r)"
            line += f" with r from 1 to {product.modes[mode]}"
            if mode == "batch":
                line += f" (the batch mode holds for one batch size, and here it is {shape[-1]})"
            yield line
        elif not jnp.issubdtype(u.dtype, jnp.floating):
            yield f"{where} has a {mode} basis of dtype {u.dtype}; it must be floating"


def _misfitting_rest(
    where: str, factors: LayerFactors, use: Use, product: layer_rule.Product
) -> Iterator[str]:
    if factors.update is not None:
        u = factors.update
        shape = (*use.stack, *product.basis_shape(product.update_mode))
        if tuple(u.shape[:-1]) != shape or u.shape[-1] < 1:
            text = ", ".join(map(str, shape))
            yield f"{where} has an update of shape {tuple(u.shape)}; it must be ({text}, r)"
        elif not jnp.issubdtype(u.dtype, jnp.floating):
            yield f"{where} has an update of dtype {u.dtype}; it must be floating"
    clash = [mode for mode in factors.bases if mode not in ("patch", "batch")]
    if "patch" in factors.bases and clash:
        yield f"{where} has modes patch and {', '.join(clash)}; patch goes with batch alone"
    if factors.mean is not None:
        if "batch" not in product.modes:
            yield f"{where} has a mean, but the layer's input has no batch axis"
        else:
            axis = product.batch_axis
            shape = (*use.stack, *product.x_shape[:axis], *product.x_shape[axis + 1 :])
            if tuple(factors.mean.shape) != shape:
                yield f"{where} has a mean of shape {tuple(factors.mean.shape)}; it must be {shape}"
