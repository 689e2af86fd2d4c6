"""`report`: bytes kept for the backward pass and multiply-accumulates, by shapes alone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lance_jax import jaxprs, layer_rule, pointwise, residuals
from lance_jax.factors import Factors, LayerFactors, as_factors, table
from lance_jax.paths import leaves_with_path
from lance_jax.phases import trace_phases
from lance_jax.step import Trainable, choose
from lance_jax.transform import Use, check, find, rewrite


@dataclasses.dataclass(frozen=True)
class SavedBytes:
    """Bytes kept from the forward to the backward pass.

    Attributes:
      layer_inputs: of the trained layers' inputs or cores, layer by layer (the paper's count).
      total: of all that lives between the phases, each array once; parameters, arguments and
        factors excluded.
    """

    layer_inputs: int
    total: int


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One trained layer: what it keeps, beside plain backprop, and its multiply-accumulates.

    Attributes:
      path: the parameter's key path, joined by `/`.
      kind: "conv" or "dense".
      ranks: mode name -> rank; empty where no basis is used.
      core_dtype: how the core is stored; None: as the input.
      update: the rank that the weight gradient is confined to; None: unconfined, 0: frozen.
      bytes: kept of the layer's input, all uses and scan steps together.
      bytes_backprop: the same of plain backprop.
      macs_forward: of the forward product, and of the projection to the core.
      macs_dx: of the input's gradient.
      macs_dw: of the weight's gradient.
      macs_dw_backprop: the same of plain backprop.
    """

    path: str
    kind: str
    ranks: Mapping[str, int]
    core_dtype: str | None
    update: int | None
    bytes: int
    bytes_backprop: int
    macs_forward: int
    macs_dx: int
    macs_dw: int
    macs_dw_backprop: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` counts; printing it gives a table.

    Attributes:
      saved_bytes: what a step keeps once compressed.
      saved_bytes_backprop: what a step of plain backprop keeps.
      factor_bytes: of all bases and means, which are kept as long as the training runs.
      layers: one entry for each trained layer, in order of use.
    """

    saved_bytes: SavedBytes
    saved_bytes_backprop: SavedBytes
    factor_bytes: int
    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        confined = any(x.update is not None for x in self.layers)
        rows: list[tuple[str, ...]] = [
            ("layer", "kept", "ranks", *(["update"] if confined else []), "bytes", "backprop")
            + ("fwd MACs", "dX", "dW", "backprop")
        ]
        for x in self.layers:
            ranks = ", ".join(f"{mode} {r}" for mode, r in x.ranks.items()) or "-"
            kept = x.core_dtype or "as input"
            macs = (x.macs_forward, x.macs_dx, x.macs_dw, x.macs_dw_backprop)
            sizes = (x.bytes, x.bytes_backprop, *macs)
            update = ["-" if x.update is None else str(x.update or "frozen")] if confined else []
            rows.append((x.path, kept, ranks, *update, *map("{:,}".format, sizes)))
        saved, plain = self.saved_bytes, self.saved_bytes_backprop
        return "\n".join(
            [
                table(rows),
                f"layer inputs {saved.layer_inputs:,} bytes, backprop {plain.layer_inputs:,}"
                f" ({_ratio(plain.layer_inputs, saved.layer_inputs)})",
                f"total kept   {saved.total:,} bytes, backprop {plain.total:,}"
                f" ({_ratio(plain.total, saved.total)})",
                f"factors      {self.factor_bytes:,} bytes",
            ]
        )


def _ratio(a: int, b: int) -> str:
    return f"{a / b:.1f}x" if b else "all"


def report(
    loss_fn: Callable,
    params: Any,
    *args: Any,
    factors: Mapping[str, LayerFactors] | None = None,
    trainable: Trainable = None,
) -> Report:
    """What a training step of a plain `loss_fn` keeps once compressed, beside plain backprop.

    Nothing is executed; any argument may be a `jax.ShapeDtypeStruct`. Plain backprop's figure is
    the fair one: duplicates and constants dropped, every mask of the relu family at 1 bit.

    Args:
      loss_fn: a function of (params, *args) to a scalar, or to (scalar, aux).
      factors: what `compress` would be given; None: masks alone.
      trainable: as for `value_and_grad`.

    Returns:
      A `Report` with `.saved_bytes` and `.saved_bytes_backprop`, each with `.layer_inputs` and
      `.total`, `.factor_bytes`, and `.layers`: for each trained layer its ranks, bytes, and the
      MACs of forward (projection included), dX and dW.

    Raises:
      ValueError: as `compress` and `value_and_grad` do.
    """
    factors = as_factors({} if factors is None else factors)
    chosen = choose(params, trainable)
    paths = [path for path, _ in leaves_with_path(params)]
    trained = {path for path, use in zip(paths, chosen, strict=True) if use}
    traced = jaxprs.trace(loss_fn, params, *args)
    found = find(traced)
    check(factors, found)
    has_aux = isinstance(traced.unflatten(traced.jaxpr.outvars), tuple)
    rows = tuple(
        _row(path, uses, factors.get(path)) for path, uses in found.uses.items() if path in trained
    )

    def total(factors, match):
        # Factors are an argument, so that they too may be shapes.
        def fast(params, *args, factors):
            return rewrite(loss_fn, factors, match)(params, *args)

        kwargs = {"factors": factors}
        return trace_phases(fast, chosen, has_aux, params, args, kwargs).kept.nbytes

    return Report(
        SavedBytes(sum(row.bytes for row in rows), total(factors, pointwise.match)),
        SavedBytes(sum(row.bytes_backprop for row in rows), total(Factors(), _one_bit)),
        factors.nbytes,
        rows,
    )


def _one_bit(jaxpr: Any, i: int) -> jaxprs.Nodes:
    """Masks of one bit an element for every mask, counted and never run."""
    nodes = pointwise.match(jaxpr, i)
    for j, node in nodes.items():
        if isinstance(node, pointwise.Mask):
            ends = node.slopes[0], node.slopes[-1]
            nodes[j] = dataclasses.replace(
                node, slopes=ends, points=(node.points[0], node.points[-1])
            )
    return nodes


def _row(path: str, uses: list[Use], factors: LayerFactors | None) -> LayerReport:
    plain = sum(residuals.nbytes(use.x) * use.runs for use in uses)
    product = uses[0].product
    ranks = layer_rule.core_ranks(product, factors) if factors is not None else {}
    forward = sum(use.product.macs * use.runs for use in uses)
    if factors is None:
        kept, project, dw = plain, 0, forward
    else:
        kept = kept_bytes(uses, factors)
        project = sum(use.product.project_macs(ranks) * use.runs for use in uses)
        dw = sum(layer_rule.weight_gradient_macs(use.product, factors) * use.runs for use in uses)
    return LayerReport(
        path=path,
        kind=product.kind,
        ranks=ranks,
        core_dtype=factors.core_dtype if factors is not None else None,
        update=_update_rank(factors),
        bytes=kept,
        bytes_backprop=plain,
        macs_forward=forward + project,
        macs_dx=forward,
        macs_dw=dw,
        macs_dw_backprop=forward,
    )


def _update_rank(factors: LayerFactors | None) -> int | None:
    if factors is None or (factors.update is None and not factors.frozen):
        return None
    return 0 if factors.update is None else factors.update.shape[-1]


def kept_bytes(uses: list[Use], factors: LayerFactors) -> int:
    """Bytes that one call keeps of a layer's input, over all its uses."""
    if factors.frozen:
        return 0
    total = 0
    for use in uses:
        one = jax.tree.map(
            lambda u, use=use: jax.ShapeDtypeStruct(u.shape[len(use.stack) :], u.dtype), factors
        )

        def keep(x, factors, use=use):
            return layer_rule.keep(use.product, x, factors)

        stored = jax.tree.leaves(jax.eval_shape(keep, use.x, one))
        total += sum(map(residuals.nbytes, stored)) * use.runs
    return total
