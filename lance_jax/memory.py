"""`report`: bytes kept for the backward pass and multiply-accumulates, by shapes alone."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lance_jax import block_rule, interpreter, jaxprs, layer_rule, pointwise
from lance_jax.block_rule import Block
from lance_jax.factors import Factors, LayerFactors, as_factors, table
from lance_jax.layers import COMPRESSED, Found, Use, find
from lance_jax.paths import leaves_with_path
from lance_jax.phases import trace_phases
from lance_jax.step import Trainable, choose
from lance_jax.transform import check, rewrite
from lance_jax.transient import transient


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
    """One trained layer or block: what it keeps, beside plain backprop, and its MACs.

    A block keeps what it is recomputed from, and the layers inside of it nothing.

    Attributes:
      path: the parameter's key path, joined by `/`, or the block's name.
      kind: "conv", "dense" or "block".
      ranks: mode name -> rank; empty where no basis is used.
      core_dtype: how the core is stored; None: as the input.
      update: the rank that the weight gradient is confined to; None: unconfined, 0: frozen.
      recomputed: whether it stands in a block, and keeps nothing.
      bytes: kept of the layer's input, all uses and scan steps together.
      bytes_backprop: the same of plain backprop.
      macs_forward: of the forward product, and of the projection to the core; of a block, of the
        projection alone, since the layers inside have lines of their own.
      macs_dx: of the input's gradient; of a block, of expanding the cores.
      macs_dw: of the weight's gradient.
      macs_dw_backprop: the same of plain backprop.
    """

    path: str
    kind: str
    ranks: Mapping[str, int]
    core_dtype: str | None
    update: int | None
    recomputed: bool
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
      transient: bytes that the backward pass holds beside the saved ones while it is in the block
        where they are most: the activations that enter, expanded, and what its recomputed forward
        pass keeps. 0 without blocks.
      macs_recomputed: of the products in blocks that a gradient passes, which the backward pass
        does again.
      layers: one entry for each trained layer, in order of use.
    """

    saved_bytes: SavedBytes
    saved_bytes_backprop: SavedBytes
    factor_bytes: int
    transient: int
    macs_recomputed: int
    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        confined = any(x.update is not None for x in self.layers)
        rows: list[tuple[str, ...]] = [
            ("layer", "kept", "ranks", *(["update"] if confined else []), "bytes", "backprop")
            + ("fwd MACs", "dX", "dW", "backprop")
        ]
        for x in self.layers:
            ranks = ", ".join(f"{mode} {r}" for mode, r in x.ranks.items()) or "-"
            kept = "recomputed" if x.recomputed else x.core_dtype or "as input"
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
                *self._recomputed_lines(),
            ]
        )

    def _recomputed_lines(self) -> list[str]:
        if not self.macs_recomputed and not self.transient:
            return []
        return [f"recomputed   {self.macs_recomputed:,} MACs, {self.transient:,} bytes at a time"]


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
    the fair one: duplicates and constants dropped, every mask of the relu family at 1 bit, and
    without any `jax.checkpoint` that the loss may have.

    Args:
      loss_fn: a function of (params, *args) to a scalar, or to (scalar, aux).
      factors: what `compress` would be given; None: masks alone.
      trainable: as for `value_and_grad`.

    Returns:
      A `Report` with `.saved_bytes` and `.saved_bytes_backprop`, each with `.layer_inputs` and
      `.total`, `.factor_bytes`, `.transient`, `.macs_recomputed`, and `.layers`: for each trained
      layer its ranks, bytes, and the MACs of forward (projection included), dX and dW.

    Raises:
      ValueError: as `compress` and `value_and_grad` do, and for a loss that is compressed already.
    """
    factors = as_factors({} if factors is None else factors)
    chosen = choose(params, trainable)
    paths = [path for path, _ in leaves_with_path(params)]
    trained = {path for path, use in zip(paths, chosen, strict=True) if use}
    traced = jaxprs.trace(loss_fn, params, *args)
    found = find(traced)
    check(factors, found)
    if not factors and any(skip.reason == COMPRESSED for skip in found.layers.skipped):
        raise ValueError(
            "loss_fn is compressed already; report takes the plain loss, and as factors= what "
            "compress was given"
        )
    has_aux = isinstance(traced.unflatten(traced.jaxpr.outvars), tuple)
    rows = tuple(_rows(found, factors, trained))

    def total(factors, match, inline):
        # Factors are an argument, so that they too may be shapes.
        def fast(params, *args, factors):
            return rewrite(loss_fn, factors, match, inline)(params, *args)

        kwargs = {"factors": factors}
        return trace_phases(fast, chosen, has_aux, params, args, kwargs).kept.nbytes

    return Report(
        SavedBytes(sum(row.bytes for row in rows), total(factors, pointwise.match, False)),
        SavedBytes(sum(row.bytes_backprop for row in rows), total(Factors(), _one_bit, True)),
        factors.nbytes,
        transient(traced, factors, trained),
        _macs_recomputed(found, {row.path for row in rows if row.kind == "block"}),
        rows,
    )


def _macs_recomputed(found: Found, blocks: set[str]) -> int:
    """Of these blocks, and once more of every block in one of them."""
    macs, inside = 0, set(blocks)
    for path, uses in found.uses.items():
        if isinstance(uses[0].product, Block) and (path in inside or uses[0].block in inside):
            inside.add(path)
            macs += sum(use.product.macs * use.runs for use in uses)
    return macs


def _one_bit(jaxpr: Any, i: int) -> interpreter.Nodes:
    """Masks of one bit an element for every mask, counted and never run."""
    nodes = pointwise.match(jaxpr, i)
    for j, node in nodes.items():
        if isinstance(node, pointwise.Mask):
            ends = node.slopes[0], node.slopes[-1]
            nodes[j] = dataclasses.replace(
                node, slopes=ends, points=(node.points[0], node.points[-1])
            )
    return nodes


def _rows(found: Found, factors: Factors, trained: set[str]) -> Iterator[LayerReport]:
    """Of the layers whose weight is trained, and of the blocks that a gradient passes."""
    moving = False
    for path, uses in found.uses.items():
        own = not trained.isdisjoint(uses[0].params)
        moving = moving or own
        if isinstance(uses[0].product, Block):
            if moving and uses[0].block is None:
                yield _block_row(path, uses, factors.get(path, LayerFactors({})))
        elif own:
            yield _row(path, uses, factors.get(path))


def _row(path: str, uses: list[Use], factors: LayerFactors | None) -> LayerReport:
    plain = sum(jaxprs.nbytes(use.x) * use.runs for use in uses)
    products = [(use.of_product(), use.runs) for use in uses]
    product = products[0][0]
    ranks = layer_rule.core_ranks(product, factors) if factors is not None else {}
    forward = sum(product.macs * runs for product, runs in products)
    if factors is None:
        kept, project, dw = plain, 0, forward
    else:
        kept = kept_bytes(uses, factors)
        project = sum(product.project_macs(ranks) * runs for product, runs in products)
        dw = sum(layer_rule.weight_gradient_macs(one, factors) * runs for one, runs in products)
    return LayerReport(
        path=path,
        kind=product.kind,
        ranks=ranks,
        core_dtype=factors.core_dtype if factors is not None else None,
        update=_update_rank(factors),
        recomputed=uses[0].block is not None,
        bytes=kept if uses[0].block is None else 0,
        bytes_backprop=plain,
        macs_forward=forward + project,
        macs_dx=forward,
        macs_dw=dw,
        macs_dw_backprop=forward,
    )


def _block_row(path: str, uses: list[Use], factors: LayerFactors) -> LayerReport:
    project = sum(use.product.project_macs(factors.ranks) * use.runs for use in uses)
    return LayerReport(
        path=path,
        kind="block",
        ranks=factors.ranks,
        core_dtype=factors.core_dtype,
        update=None,
        recomputed=False,
        bytes=kept_bytes(uses, factors),
        bytes_backprop=0,
        macs_forward=project,
        macs_dx=project,
        macs_dw=0,
        macs_dw_backprop=0,
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

        def keep(x, factors, product=use.product):
            if isinstance(product, Block):
                return block_rule.keep(product, x, factors)
            return layer_rule.keep(product, x, factors)

        stored = jax.tree.leaves(jax.eval_shape(keep, use.x, one))
        total += sum(map(jaxprs.nbytes, stored)) * use.runs
    return total
