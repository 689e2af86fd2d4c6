"""`lower_for_cpu`: forms of a network's operations that run faster than XLA's own on a CPU."""

import functools
from collections.abc import Callable
from typing import Any

from lance_jax import cpu_conv, cpu_pool, interpreter, jaxprs


def lower_for_cpu(apply_fn: Callable) -> Callable:
    """The same function, in a form that is many times faster on a CPU and equal to float rounding.

    Depthwise convolutions become sums of shifted products, 1x1 convolutions matrix products. Of
    other ungrouped convolutions the weight gradients become matrix products, one for each place of
    the kernel. A max-pool keeps the place of each maximum (one byte) instead of its input. The
    layers keep their paths, kinds and modes: `layers`, `calibrate`, `compress` and `lower_for_cpu`
    go together in any order. Where `compress` recomputes blocks, `lower_for_cpu` comes before it:
    later it does not reach what the backward pass computes again.

    Args:
      apply_fn: any JAX function of (params, *args, **kwargs).

    Returns:
      A function of `apply_fn`'s signature. Through a max-pool it supports reverse-mode
      differentiation only.
    """

    @functools.wraps(apply_fn)
    def lowered(params, *args, **kwargs):
        traced = jaxprs.trace(apply_fn, params, *args, **kwargs)
        nodes = interpreter.plan(traced.jaxpr, traced.refs, _rule)
        outs = interpreter.run(traced.jaxpr, traced.consts, nodes, traced.inputs, _apply)
        return traced.unflatten(outs)

    return lowered


def _rule(jaxpr: Any, i: int, refs: Any, trips: Any) -> interpreter.Nodes:
    eqn = jaxpr.eqns[i]
    return {i: interpreter.Marked()} if cpu_conv.fits(eqn) or cpu_pool.fits(eqn) else {}


def _apply(jaxpr: Any, i: int, node: Any, read: Callable[[Any], Any]) -> list[Any]:
    eqn = jaxpr.eqns[i]
    operands = [read(v) for v in eqn.invars]
    if cpu_pool.fits(eqn):
        return [cpu_pool.max_pool(operands[0], eqn.params)]
    return [cpu_conv.conv_p.bind(*operands, **eqn.params)]
