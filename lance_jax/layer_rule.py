"""One layer under `compress`: what it keeps of its input, and the weight gradient from that."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax.conv import Conv
from lance_jax.dense import Dense
from lance_jax.factors import LayerFactors
from lance_jax.modes import wider
from lance_jax.quantize import Stored, load, store

Product = Conv | Dense
SCOPE = "lance_jax.compressed"  # the name that a compressed layer's equations carry


def apply(
    eqn: Any, weight: int, layer: Product, x: jax.Array, w: jax.Array, factors: LayerFactors
) -> jax.Array:
    """The product, differentiated by x alone, with a rule for dW that saves nothing but the core.

    The product's equation stays visible, so that a walk over the result can lower it.
    """
    x_aval, w_aval = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w))

    def product(x, w):
        operands = (x, w) if weight == 1 else (w, x)
        return eqn.primitive.bind(*operands, **eqn.params)

    @jax.custom_vjp
    def attach(y, x, w, factors):
        return y

    def forward(y, x, w, factors):
        no_second_derivative(w)
        return y, (keep(layer, x, factors), factors)

    def backward(saved, dy):
        stored, factors = saved
        dtype = wider(x_aval.dtype, dy.dtype)
        ranks = core_ranks(layer, factors)
        core = load(stored, factors.core_dtype, layer.core_shape(ranks), dtype)
        dw = _weight_gradient(layer, core, dy.astype(dtype), factors, w_aval.dtype)
        if factors.mean is not None:
            mean = factors.mean.astype(x_aval.dtype)
            of_mean = _mean_gradient(product, layer, mean, w_aval, dy)
            if factors.update is not None:
                of_mean = exact(layer).confine(of_mean, factors.update)
            dw = dw + of_mean
        return dy, None, dw, None

    attach.defvjp(forward, backward)
    with jax.named_scope(SCOPE):
        y = product(x, lax.stop_gradient(w))
        return y if factors.frozen else attach(y, x, w, factors)


@jax.custom_jvp
def no_second_derivative(x: jax.Array) -> jax.Array:
    """x; ValueError where the forward rule that it stands in is itself differentiated by it.

    The rules give their results without a derivative, which second ones would silently miss.
    """
    return x


@no_second_derivative.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "a compressed function has first derivatives alone; take second ones of the plain function"
    )


def keep(layer: Product, x: jax.Array, factors: LayerFactors) -> Stored:
    """What a layer that is not frozen keeps of its input: the core, stored."""
    if factors.mean is not None:
        x = x - jnp.expand_dims(factors.mean.astype(x.dtype), layer.batch_axis)
    core = layer.project(layer.canonical(x), _core_bases(layer, factors))
    return store(core, factors.core_dtype)


def core_ranks(layer: Product, factors: LayerFactors) -> dict[str, int]:
    """Mode name -> rank of the core that is kept."""
    return {mode: u.shape[-1] for mode, u in _core_bases(layer, factors).items()}


def _core_bases(layer: Product, factors: LayerFactors) -> Mapping[str, Any]:
    return {layer.update_mode: factors.update} if factors.update_core else factors.bases


def weight_gradient_macs(layer: Product, factors: LayerFactors) -> int:
    """MACs of the weight gradient, confined where the factors say so."""
    if factors.frozen:
        return 0
    macs = layer.weight_gradient_macs(core_ranks(layer, factors))
    if factors.update is None or factors.update_core:
        return macs
    rank = factors.update.shape[-1]
    confined = macs + layer.confine_macs(rank)
    return confined if factors.bases else min(confined, _projected_macs(layer, rank))


def _projected_macs(layer: Product, rank: int) -> int:
    ranks = {layer.update_mode: rank}
    return layer.project_macs(ranks) + layer.weight_gradient_macs(ranks)


def _weight_gradient(
    layer: Product, core: jax.Array, dy: jax.Array, factors: LayerFactors, dtype: Any
) -> jax.Array:
    """dW from the core; U U^T dW where there is an update U, in the cheaper order by MACs."""
    bases, update = _core_bases(layer, factors), factors.update
    if update is None:
        return layer.weight_gradient(core, dy, bases, dtype)
    sure = exact(layer)
    if factors.update_core:
        return sure.weight_gradient(core, dy, bases, dtype)
    rank = update.shape[-1]
    plain = layer.weight_gradient_macs(core_ranks(layer, factors)) + layer.confine_macs(rank)
    if not bases and _projected_macs(layer, rank) < plain:
        # a whole input is projected itself: its plain gradient is never there
        bases = {layer.update_mode: update}
        return sure.weight_gradient(layer.project(core, bases), dy, bases, dtype)
    return sure.confine(layer.weight_gradient(core, dy, bases, dtype), update)


def exact(layer: Product) -> Product:
    """The layer in exact products: what leaks out of the span of U is what old tasks forget."""
    return dataclasses.replace(layer, precision=lax.Precision.HIGHEST)


def _mean_gradient(
    product: Callable, layer: Product, mean: jax.Array, w: Any, dy: jax.Array
) -> jax.Array:
    """The mean's share of dW: the gradient of a batch of one, at the sum of dy over the batch."""
    one = jnp.expand_dims(mean, layer.batch_axis)
    dy = jnp.sum(dy, axis=layer.dy_batch_axis, keepdims=True)
    return jax.linear_transpose(lambda w: product(one, w), w)(dy)[0]
