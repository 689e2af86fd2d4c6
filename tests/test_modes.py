"""Mode products: the same on every axis and in every form, and the cheapest order of a chain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lance_jax.modes import apply_chain, chain_macs, cheapest_chain, mode_product
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("exact_products")

SHAPE, RANKS = (3, 4, 5, 9), (2, 4, 1, 3)  # more and fewer than 40 elements behind an axis


def drawn(dtype="float32", shape=SHAPE):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    return x, [jnp.asarray(rng.normal(size=s), dtype) for s in zip(shape, RANKS, strict=False)]


def reference(x, matrix, axis):
    x, matrix = (np.asarray(a, np.float64) for a in (x, matrix))
    return np.moveaxis(np.tensordot(x, matrix, (axis, 0)), -1, axis)


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mode_product_is_a_contraction_in_place(axis, dtype):
    x, matrices = drawn(dtype)
    expected = reference(x, matrices[axis], axis)
    for product in (mode_product, jax.jit(mode_product, static_argnums=2)):
        found = product(x, matrices[axis], axis)
        assert found.dtype == x.dtype
        assert_close(found, expected, dtype)


@pytest.mark.parametrize("axis", range(4))
def test_a_mode_product_goes_through_transformations(axis):
    x, matrices = drawn(shape=(2, *SHAPE))
    matrix = drawn()[1][axis]
    product = jax.vmap(lambda x: mode_product(x, matrix, axis))
    expected = reference(x, matrix, axis + 1)
    assert_close(product(x), expected)
    _, scanned = jax.lax.scan(lambda c, x: (c, mode_product(x, matrix, axis)), 0, x)
    assert_close(scanned, expected)
    dx = jax.grad(lambda x: jnp.sum(jax.checkpoint(product)(x) ** 2))(x)
    assert_close(dx, 2 * reference(expected, matrix.T, axis + 1))


def test_a_mode_of_no_elements():
    x = jnp.zeros((0, 4, 5))
    assert mode_product(x, jnp.ones((4, 2)), 1).shape == (0, 2, 5)


def test_a_chain_gives_the_same_in_every_order_and_the_cheapest_is_none_dearer():
    x, matrices = drawn()
    steps = tuple((axis, SHAPE[axis], RANKS[axis]) for axis in range(4))
    macs, order = cheapest_chain(x.size, steps)
    expected = np.asarray(x, np.float64)
    for axis, matrix in enumerate(matrices):
        expected = reference(expected, matrix, axis)
    for other in itertools.permutations(steps):
        assert chain_macs(x.size, other) >= macs
    for one in (order, order[::-1]):
        assert_close(apply_chain(x, dict(enumerate(matrices)), one, None), expected)
