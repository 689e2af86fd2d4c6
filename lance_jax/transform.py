"""`layers` and `compress`: the walk over any apply_fn with the layer and mask rules."""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import jaxprs, layer_rule, pointwise
from lance_jax.conv import Conv
from lance_jax.cpu_conv import conv_p
from lance_jax.dense import Dense
from lance_jax.factors import Factors, LayerFactors, Skipped, as_factors, table
from lance_jax.jaxprs import Ref, Site
from lance_jax.layer_rule import Product

_CONVOLUTIONS = (lax.conv_general_dilated_p, conv_p)
_PRODUCTS = (lax.dot_general_p, *_CONVOLUTIONS)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense product that uses a parameter.

    Attributes:
      path: the parameter's key path, joined by `/`.
      kind: "conv" or "dense".
      input_shape: as the product sees it, a scanned layer's without its scan axis.
      weight_shape: likewise.
      modes: mode name -> its size; of a weight used several times, the modes that all uses share.
      macs: multiply-accumulates of the forward product, all uses and scan steps together.
      uses: how often one call applies the weight.
      depthwise: whether it is a depthwise convolution.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    modes: Mapping[str, int]
    macs: int
    uses: int
    depthwise: bool = False


class Layers(Sequence[Layer]):
    """The layers of an apply_fn in order of use; printing it gives a table.

    Attributes:
      skipped: what looks like a layer but cannot be compressed.
    """

    def __init__(self, layers: Sequence[Layer], skipped: Sequence[Skipped]):
        self._layers = tuple(layers)
        self.skipped = tuple(skipped)

    def __getitem__(self, index):
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        rows = [("path", "kind", "input", "weight", "modes", "MACs", "uses")]
        for x in self:
            modes = ", ".join(f"{mode} {size}" for mode, size in x.modes.items())
            shapes = _times(x.input_shape), _times(x.weight_shape)
            rows.append((x.path, x.kind, *shapes, modes, f"{x.macs:,}", str(x.uses)))
        lines = [table(rows)]
        lines += [f"skipped {skip.path}: {skip.reason}" for skip in self.skipped]
        return "\n".join(lines)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def layers(apply_fn: Callable, params: Any, *args: Any, **kwargs: Any) -> Layers:
    """The layers that `apply_fn(params, *args, **kwargs)` uses, in order of use.

    Nothing is executed; any argument may be a `jax.ShapeDtypeStruct`.

    Args:
      apply_fn: any JAX function of (params, *args, **kwargs).
      params: a pytree of parameters.

    Returns:
      A sequence of `Layer`, with what cannot be compressed in `.skipped`.
    """
    return find(jaxprs.trace(apply_fn, params, *args, **kwargs)).layers


# --- finding -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a layer: the product, and what its equation stands in."""

    path: str
    product: Product
    scans: tuple[bool, ...]
    trips: tuple[int, ...]
    x: Any  # shape and dtype of the input
    y: Any
    w: Any

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of this use's factors: the scans in which its parameter is sliced."""
        return tuple(n for n, sliced in zip(self.trips, self.scans, strict=True) if sliced)

    @property
    def runs(self) -> int:
        """How often the equation runs in one call."""
        return math.prod(self.trips)


@dataclasses.dataclass(frozen=True)
class Found:
    """Every use of every layer, in order."""

    uses: dict[str, list[Use]]
    layers: Layers


def find(traced: jaxprs.Traced) -> Found:
    """All layers of a traced call."""
    uses: dict[str, list[Use]] = {}
    skipped: list[Skipped] = []

    def rule(jaxpr, i, refs, trips):
        eqn = jaxpr.eqns[i]
        found = weight_of(eqn, refs)
        if isinstance(found, int):
            ref = refs[found]
            path = ref.paths[0]
            use = Use(path, product_of(eqn, found), ref.scans, trips, *_avals(eqn, found))
            uses.setdefault(path, []).append(use)
        elif found:
            skipped.append(found)
        return {}

    jaxprs.plan(traced.jaxpr, traced.refs, rule)
    return Found(
        uses,
        Layers([_layer(path, group) for path, group in uses.items()], [*dict.fromkeys(skipped)]),
    )


def _layer(path: str, uses: list[Use]) -> Layer:
    first = uses[0].product
    modes = {
        mode: size
        for mode, size in first.modes.items()
        if all(use.product.modes.get(mode) == size for use in uses)
    }
    return Layer(
        path=path,
        kind=first.kind,
        input_shape=first.x_shape,
        weight_shape=first.w_shape,
        modes=modes,
        macs=sum(use.product.macs * use.runs for use in uses),
        uses=sum(use.runs // math.prod(use.stack) for use in uses),
        depthwise=first.depthwise,
    )


def _avals(eqn: Any, weight: int) -> Iterator[jax.ShapeDtypeStruct]:
    for var in (eqn.invars[1 - weight], eqn.outvars[0], eqn.invars[weight]):
        yield jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


def product_of(eqn: Any, weight: int) -> Product:
    """The layer rule of a convolution or dense product."""
    if eqn.primitive in _CONVOLUTIONS:
        return Conv.of(eqn)
    return Dense.of(eqn, x_is_lhs=weight == 1)


def weight_of(eqn: Any, refs: list[Ref | None]) -> int | Skipped | None:
    """Which operand of a layer's equation is its weight; why it is none; None if it is no layer."""
    if eqn.primitive not in _PRODUCTS:
        return _hidden(eqn, refs)
    made_of = {i: ref for i, ref in enumerate(refs) if ref and ref.paths}
    views = [i for i, ref in made_of.items() if ref.view]
    if not made_of:
        return None
    path = " + ".join(dict.fromkeys(p for i in views or made_of for p in made_of[i].paths))
    if len(views) == 2:
        return Skipped(path, "both operands are parameters")
    if layer_rule.SCOPE in str(eqn.source_info.name_stack):
        return Skipped(path, "it is compressed already")
    if not views:
        if len(made_of) == 2:
            return None  # arithmetic among parameters
        return Skipped(path, "the weight is computed from parameters, it is not one laid out anew")
    if not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in (*eqn.invars, *eqn.outvars)):
        return Skipped(
            path, f"operands of {eqn.invars[0].aval.dtype} and {eqn.invars[1].aval.dtype}"
        )
    if eqn.primitive in _CONVOLUTIONS:
        if views == [0]:
            return Skipped(path, "the parameter is the convolution's input, not its kernel")
        if eqn.params["batch_group_count"] > 1:
            return Skipped(path, f"batch_group_count is {eqn.params['batch_group_count']}")
        if len(eqn.params["window_strides"]) > 3:
            return Skipped(path, "more than three spatial dimensions")
    return views[0]


def _hidden(eqn: Any, refs: list[Ref | None]) -> Skipped | None:
    """A product inside of a body that the walk does not enter."""
    if jaxprs.bodies(eqn):
        return None
    paths = [
        path
        for ref, var in zip(refs, eqn.invars, strict=True)
        if ref and len(var.aval.shape) >= 2
        for path in ref.paths
    ]
    if not paths or not any(inner.primitive in _PRODUCTS for inner in jaxprs.hidden_eqns(eqn)):
        return None
    why = "has no reverse-mode derivative" if eqn.primitive.name == "while" else "is kept as it is"
    return Skipped(" + ".join(dict.fromkeys(paths)), f"inside {eqn.primitive.name}, which {why}")


# --- compressing ---------------------------------------------------------------------------------


def compress(
    apply_fn: Callable, factors: Mapping[str, LayerFactors], *, masks: bool = True
) -> Callable:
    """The same function, keeping for its backward pass only each layer's projected core.

    The forward pass, dX and the bias gradients are those of `apply_fn`. A layer in `factors` keeps
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
      A function of `apply_fn`'s signature. It supports reverse-mode differentiation only.

    Raises:
      ValueError: when called, for a path that is no layer, or a basis that does not fit its input.
    """
    factors = as_factors(factors)
    return rewrite(apply_fn, factors, pointwise.match if masks else lambda jaxpr, i: {})


def rewrite(
    apply_fn: Callable, factors: Factors, match_mask: Callable[[Any, int], jaxprs.Nodes]
) -> Callable:
    """`apply_fn` with the layers in `factors` and the masks that are found replaced."""

    @functools.wraps(apply_fn)
    def compressed(params, *args, **kwargs):
        traced = jaxprs.trace(apply_fn, params, *args, **kwargs)
        check(factors, find(traced))

        def rule(jaxpr, i, refs, trips):
            weight = weight_of(jaxpr.eqns[i], refs)
            if not isinstance(weight, int):
                return match_mask(jaxpr, i)
            kept = factors.get(refs[weight].paths[0])
            return {i: Site(kept, refs[weight].scans, weight)} if kept is not None else {}

        nodes = jaxprs.plan(traced.jaxpr, traced.refs, rule)
        outs = jaxprs.run(traced.jaxpr, traced.consts, nodes, traced.inputs, _apply)
        return traced.unflatten(outs)

    return compressed


def _apply(jaxpr: Any, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    if isinstance(node, pointwise.Mask):
        return [pointwise.apply(jaxpr, node, read(pointwise.input_of(jaxpr, node)))]
    eqn = jaxpr.eqns[i]
    x, w = read(eqn.invars[1 - node.weight]), read(eqn.invars[node.weight])
    product = product_of(eqn, node.weight)
    return [layer_rule.apply(eqn, node.weight, product, x, w, node.value)]


# --- checking ------------------------------------------------------------------------------------


def check(factors: Factors, found: Found) -> None:
    """Raise one ValueError that lists all that does not fit."""
    errors = []
    for path, layer in factors.items():
        if path not in found.uses:
            near = difflib.get_close_matches(path, found.uses, n=3, cutoff=0.3)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            reason = next(
                (s.reason for s in found.layers.skipped if path in s.path.split(" + ")), ""
            )
            why = f"cannot be compressed: {reason}" if reason else "matches no layer"
            errors.append(f"factors[{path!r}] {why}{hint}")
            continue
        for use in found.uses[path]:
            errors += _misfits(path, layer, use)
    if errors:
        raise ValueError("; ".join(dict.fromkeys(errors)))


def _misfits(path: str, factors: LayerFactors, use: Use) -> Iterator[str]:
    product, where = use.product, f"factors[{path!r}]"
    for mode, u in factors.bases.items():
        if mode not in product.modes:
            known = ", ".join(product.modes)
            yield f"{where} has a basis of mode {mode!r}; this {product.kind} layer has {known}"
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
