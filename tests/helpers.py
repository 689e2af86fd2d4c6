"""What the tests of layers, compress and value_and_grad share."""

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax.sharding import AxisType

import lance_jax
from lance_jax import Factors, LayerFactors

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def assert_close(got, want, **tolerance):
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_close(got, want, **(TOLERANCE | tolerance))


def assert_equal(got, want):
    """Bit for bit."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_equal(got, want)


def random(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def orthonormal(n, r, seed=0):
    return networks.orthonormal(np.random.default_rng(seed), n, r)


def feature(path_to_basis):
    """Factors of dense layers in their feature mode."""
    return Factors({path: LayerFactors({"feature": u}) for path, u in path_to_basis.items()})


def gradients(apply_fn, loss=lambda y: (y * jnp.cos(y)).sum(), argnums=(0, 1)):
    """Jitted gradients for parameters and input of a loss with a curvature."""
    return jax.jit(jax.grad(lambda p, *args: loss(apply_fn(p, *args)), argnums))


def equations(jaxpr):
    """All equations of a jaxpr, those of the bodies in it included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                body = getattr(body, "jaxpr", body)
                if hasattr(body, "eqns"):
                    yield from equations(body)


def two_devices():
    """A mesh of two devices, or a skipped test."""
    if len(jax.devices()) < 2:
        pytest.skip("an accelerator of one device; the tests ask a CPU for two")
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


def saved_of(loss, params, *batch, **options):
    _, saved = lance_jax.value_and_grad(loss, **options).forward(params, *batch)
    return [leaf for leaf in jax.tree.leaves(saved) if hasattr(leaf, "size")]


def nbytes(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


# --- functions that several tests apply


def attention(params, x):
    """(N, T, 6) -> (N, T, 6) with 3-D kernels, (6, heads, depth) and (heads, depth, 6)."""
    q, k, v = (jnp.einsum("ntc,chd->nthd", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k))
    mixed = jnp.einsum("nhts,nshd->nthd", weights, v)
    return x + jnp.einsum("nthd,hdc->ntc", mixed, params["out"])


ATTENTION = {name: random(6, 2, 5, seed=i) / 3 for i, name in enumerate("qkv")} | {
    "out": random(2, 5, 6, seed=4) / 3
}


@jax.custom_vjp
def own_product(x, w):
    return x @ w


own_product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda kept, ct: (2 * ct @ kept[1].T, 3 * kept[0].T @ ct),
)


@jax.custom_jvp
def own_product_jvp(x, w):
    return x @ w


@own_product_jvp.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return own_product_jvp(x, w), 2 * dx @ w + 3 * x @ dw
