"""Primitives of our own, through jax's interface for extensions."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def bilinear(
    name: str, like: Any, forward: Callable, lhs_gradient: Callable, rhs_gradient: Callable
) -> Primitive:
    """A primitive with the operands (x, w), parameters and result type of the bilinear `like`.

    `forward(x, w, **params)` computes it on any backend; `lhs_gradient(dy, x_aval, w, **params)`
    and `rhs_gradient(dy, x, w_aval, **params)` are its transposes. It can be differentiated any
    number of times in either mode, batched, and compiled.
    """
    primitive = Primitive(name)

    def lhs_rule(dy: jax.Array, x: Any, w: jax.Array, **params: Any) -> jax.Array:
        return lhs_gradient(dy, x.aval, w, **params)

    def rhs_rule(dy: jax.Array, x: jax.Array, w: Any, **params: Any) -> jax.Array:
        return rhs_gradient(dy, x, w.aval, **params)

    def batched(operands: Any, dims: Any, **params: Any) -> tuple[jax.Array, int]:
        return jax.vmap(lambda x, w: forward(x, w, **params), dims)(*operands), 0

    primitive.def_impl(lambda x, w, **params: jax.jit(lambda x, w: forward(x, w, **params))(x, w))
    primitive.def_abstract_eval(lambda x, w, **params: like.abstract_eval(x, w, **params)[0])
    mlir.register_lowering(primitive, mlir.lower_fun(forward, multiple_results=False))
    ad.defbilinear(primitive, lhs_rule, rhs_rule)
    batching.primitive_batchers[primitive] = batched
    return primitive
