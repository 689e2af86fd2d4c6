"""`layers`: the products of an apply_fn that use a parameter, and the blocks it is made of."""

import dataclasses
import itertools
import math
import os.path
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import interpreter, jaxprs, layer_rule
from lance_jax.block_rule import Block
from lance_jax.conv import Conv
from lance_jax.cpu_conv import conv_p
from lance_jax.dense import Dense
from lance_jax.factors import Skipped, table
from lance_jax.interpreter import Named, Remat, Site, Trips
from lance_jax.jaxprs import Ref, prims
from lance_jax.layer_rule import Product
from lance_jax.origins import Origins

COMPRESSED = "it is compressed already"
_CONVOLUTIONS = (lax.conv_general_dilated_p, conv_p)
_PRODUCTS = (lax.dot_general_p, *_CONVOLUTIONS)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or dense product that uses a parameter, or a block: a `jax.checkpoint`.

    Attributes:
      path: the parameter's key path, joined by `/`; of a block its name (`lance_jax.blocks`), or
        what the paths of its parameters begin with.
      kind: "conv", "dense" or "block".
      input_shape: as the product sees it, a scanned layer's without its scan axis; of a block that
        of the first floating activation that enters.
      weight_shape: likewise; () for a block.
      modes: mode name -> its size; of a weight used several times, the modes that all uses share.
        Those of a block that several activations enter begin with their number, as in "1.channel".
      macs: multiply-accumulates of the forward product, all uses and scan steps together; of a
        block, those of all products inside, which its backward pass does again.
      uses: how often one call applies the weight.
      depthwise: whether it is a depthwise convolution.
      inputs: of a block, the shapes of all floating activations that enter.
      block: the innermost block that it stands in; None: in none.
    """

    path: str
    kind: str
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    modes: Mapping[str, int]
    macs: int
    uses: int
    depthwise: bool = False
    inputs: tuple[tuple[int, ...], ...] = ()
    block: str | None = None


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
            shapes = ", ".join(map(_times, x.inputs or [x.input_shape])), _times(x.weight_shape)
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
      A sequence of `Layer`, with what cannot be compressed in `.skipped`. A block comes before the
      layers inside of it.
    """
    return find(jaxprs.trace(apply_fn, params, *args, **kwargs)).layers


# --- finding -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a layer: the product or the block, and what its equation stands in."""

    path: str
    product: Product | Block
    scans: tuple[bool, ...]
    trips: Trips
    x: Any  # shape and dtype of the input; of a block a tuple of them
    block: str | None  # that it stands in
    params: tuple[str, ...]  # the paths of all parameters that enter

    def x_of(self, mode: str) -> jax.ShapeDtypeStruct:
        """The input that a mode is of."""
        return self.x[self.product.place(mode)[0]] if isinstance(self.product, Block) else self.x

    def of_product(self) -> Product:
        """The product of a layer that is no block."""
        assert not isinstance(self.product, Block), self.path
        return self.product

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

    names = Blocks(traced)

    def rule(jaxpr, i, refs, trips):
        eqn = jaxpr.eqns[i]
        around, block = names.around(jaxpr), names.visit(jaxpr, i, refs)
        found = None if block else weight_of(eqn, refs)
        if block:
            one = names.block_of(eqn, refs)
            x = tuple(_struct(eqn.invars[j]) for j in one.operands)
            params = tuple(dict.fromkeys(path for ref in refs if ref for path in ref.paths))
            use = Use(block, one, block_scans(refs, trips), trips, x, around, params)
            uses.setdefault(block, []).append(use)
        elif isinstance(found, int):
            ref, x = refs[found], _struct(eqn.invars[1 - found])
            path = ref.paths[0]
            use = Use(path, product_of(eqn, found), ref.scans, trips, x, around, (path,))
            uses.setdefault(path, []).append(use)
        elif found:
            skipped.append(found)
        return {}

    interpreter.plan(traced.jaxpr, traced.refs, rule)
    return Found(
        uses,
        Layers(
            [_layer(path, group) for path, group in uses.items()],
            [*dict.fromkeys([*names.refused, *skipped])],
        ),
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
        inputs=first.x_shapes if isinstance(first, Block) else (),
        block=uses[0].block,
    )


def _struct(var: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)


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
        return Skipped(path, COMPRESSED)
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


# --- blocks --------------------------------------------------------------------------------------


class Blocks:
    """The blocks of one walk, named in its order; no two alike, nor like a parameter's path."""

    def __init__(self, traced: jaxprs.Traced):
        self._origins = Origins(traced)
        self._taken = {path for ref in traced.refs if ref for path in ref.paths}
        self._around: dict[int, str | None] = {}  # a body's identity -> the block that it is in
        self.refused: list[Skipped] = []

    def visit(self, jaxpr: Any, i: int, refs: Sequence[Ref | None]) -> str | None:
        """The name of an equation that is a block, else None; before the walk enters its bodies."""
        eqn = jaxpr.eqns[i]
        inner = jaxprs.bodies(eqn)
        name = self._name(eqn, refs) if inner and eqn.primitive is prims.remat_p else None
        if name and (why := _kept_by_policy(eqn.params["policy"], self.around(jaxpr))):
            self.refused.append(Skipped(name, why))
            name = None
        for body in inner:
            self._around[id(body)] = name or self.around(jaxpr)
        return name

    def around(self, jaxpr: Any) -> str | None:
        """The block that a body stands in."""
        return self._around.get(id(jaxpr))

    def block_of(self, eqn: Any, refs: Sequence[Ref | None]) -> Block:
        """A block and the floating activations that enter it: what was computed from data.

        An argument of the whole function is held anyway, and is passed again as it is.
        """
        data = {
            i: v
            for i, (v, ref) in enumerate(zip(eqn.invars, refs, strict=True))
            if ref is None and jnp.issubdtype(v.aval.dtype, jnp.floating)
        }
        given = [i for i, v in data.items() if self._origins.is_argument(v)]
        kept = [i for i in data if i not in given]
        whole = [n for n, i in enumerate(kept) if self._origins.is_data_alone(data[i])]
        return Block.of(eqn, kept, given, whole)

    def node(self, eqn: Any, refs: Sequence[Ref | None], trips: Trips, value: Any) -> Remat:
        """What a walk has in the place of a block, for the `value` that belongs to it."""
        block = self.block_of(eqn, refs)
        site = Site(value, block_scans(refs, trips), block.operands)
        return Remat(site, given=block.given)

    def _name(self, eqn: Any, refs: Sequence[Ref | None]) -> str | None:
        paths = [path.split("/")[:-1] for ref in refs if ref for path in ref.paths]
        if not paths:
            return None
        policy = eqn.params["policy"]
        if isinstance(policy, Named):
            first = policy.name
        else:
            first = "/".join(os.path.commonprefix(paths)) or "block"
        numbered = (first if n == 1 else f"{first}:{n}" for n in itertools.count(1))
        name = next(name for name in numbered if name not in self._taken)
        self._taken.add(name)
        return name


def block_scans(refs: Sequence[Ref | None], trips: Trips) -> tuple[bool, ...]:
    """In which of the enclosing scans a block's parameters are sliced."""
    made_of = [ref.scans for ref in refs if ref and ref.paths]
    return tuple(any(scans[k] for scans in made_of) for k in range(len(trips)))


def _kept_by_policy(policy: Any, around: str | None) -> str:
    """Why a block, in the block `around`, cannot be recomputed from its inputs alone."""
    nothing = (None, jax.checkpoint_policies.nothing_saveable)
    if isinstance(policy, Named) or policy in nothing:
        return ""
    name = getattr(policy, "__name__", type(policy).__name__)
    why = f"its jax.checkpoint has a policy of its own, {name}, and saves what that says"
    return f"{why}, while {around} is recomputed" if around else why
