"""`lower_for_cpu`: forms of a network's operations that XLA runs faster on a CPU."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lance_jax import jaxprs
from lance_jax.conv import Conv
from lance_jax.modes import accumulator


def lower_for_cpu(apply_fn: Callable) -> Callable:
    """The same function, its depthwise convolutions as sums of shifted products.

    XLA's own depthwise convolution on a CPU is many times slower. The result and the gradients
    are those of `apply_fn` to float rounding. Compress first, lower afterwards:
    `lower_for_cpu(compress(apply_fn, factors))`.

    Args:
      apply_fn: any JAX function of (params, *args, **kwargs).

    Returns:
      A function of `apply_fn`'s signature, for reverse-mode differentiation.
    """

    @functools.wraps(apply_fn)
    def lowered(params, *args, **kwargs):
        traced = jaxprs.trace(apply_fn, params, *args, **kwargs)
        nodes = jaxprs.plan(traced.jaxpr, traced.refs, _rule)
        outs = jaxprs.run(traced.jaxpr, traced.consts, nodes, traced.inputs, _apply)
        return traced.unflatten(outs)

    return lowered


def _rule(jaxpr: Any, i: int, refs: Any, trips: Any) -> jaxprs.Nodes:
    eqn = jaxpr.eqns[i]
    if eqn.primitive is not lax.conv_general_dilated_p or eqn.params["batch_group_count"] > 1:
        return {}
    conv = Conv.of(eqn)
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return (
        {i: jaxprs.Marked()} if conv.depthwise and set(conv.x_dilation) == {1} and floating else {}
    )


def _apply(jaxpr: Any, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    eqn = jaxpr.eqns[i]
    x, w = map(read, eqn.invars)
    conv, dtype = Conv.of(eqn), eqn.outvars[0].aval.dtype

    @jax.custom_vjp
    def depthwise(x, w):
        return _shifted_products(conv, x, w, dtype)

    def forward(x, w):
        return depthwise(x, w), (x, w)

    def backward(saved, dy):
        x, w = saved
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        dx = jax.linear_transpose(lambda x: _shifted_products(conv, x, w, dtype), like)(dy)[0]
        # XLA's own weight gradient is as fast.
        dw = jax.linear_transpose(lambda w: eqn.primitive.bind(x, w, **eqn.params), w)(dy)[0]
        return dx, dw

    depthwise.defvjp(forward, backward)
    return [depthwise(x, w)]


def _shifted_products(conv: Conv, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """sum over the kernel's taps of (x shifted to the tap) * (the tap's weights)."""
    x, w = x.transpose(conv.x_axes), w.transpose(conv.w_axes)
    *kernel, _, out = w.shape
    padding = [(0, 0, 0), *((low, high, 0) for low, high in conv.padding), (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    multiplier = out // x.shape[-1]
    if multiplier > 1:
        x = jnp.repeat(x, multiplier, axis=-1)
    y_sizes = [conv.y_shape[axis] for axis in conv.y_axes][1:-1]
    acc = accumulator(dtype)
    total = None
    for tap in itertools.product(*map(range, kernel)):
        start = [t * d for t, d in zip(tap, conv.w_dilation, strict=True)]
        span = [(n - 1) * s + 1 for n, s in zip(y_sizes, conv.strides, strict=True)]
        limit = [a + n for a, n in zip(start, span, strict=True)]
        part = lax.slice(x, [0, *start, 0], [len(x), *limit, out], [1, *conv.strides, 1])
        term = part.astype(acc) * w[tap][0].astype(acc)
        total = term if total is None else total + term
    assert total is not None
    inverse = sorted(range(len(conv.y_axes)), key=conv.y_axes.__getitem__)
    return total.astype(dtype).transpose(inverse)
