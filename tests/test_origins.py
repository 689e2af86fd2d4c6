"""What depends on parameters, what is an argument, and what is computed from data alone."""

import jax
import jax.numpy as jnp
import pytest
from helpers import equations, random

import lance_jax
from lance_jax import jaxprs
from lance_jax.origins import Origins, as_activation

X, W = random(4, 5), random(5, 5) / 3


def of_sines(apply, *args):
    """Of the operand of each sine, in order: "argument", "data" or "moving"."""
    traced = jaxprs.trace(apply, {"w": W}, *args)
    origins, found = Origins(traced), []
    for eqn in equations(traced.jaxpr):
        if eqn.primitive.name == "sin":
            (v,) = eqn.invars
            is_argument, is_data = origins.is_argument(v), origins.is_data_alone(v)
            assert is_data or not is_argument
            found.append("argument" if is_argument else "data" if is_data else "moving")
    return found


def straight(params, x):
    y = jnp.sin(x) + 1
    return jnp.sin(jnp.sin(y) @ params["w"])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_in_any_body(wrap):
    def apply(params, x):
        return wrap(lambda x: straight(params, x))(x)

    assert of_sines(apply, X) == ["argument", "data", "moving"]


def test_a_branch_is_what_either_of_them_is():
    def apply(params, x, flag):
        y = jax.lax.cond(flag, lambda x: x @ params["w"], lambda x: jnp.sin(x), x)
        z = jax.lax.cond(flag, lambda x: x + 1, lambda x: x, x)
        return jnp.sin(y) + jnp.sin(z)

    assert of_sines(apply, X, True) == ["argument", "moving", "data"]


def test_what_a_loop_carries_is_what_a_later_step_has():
    def apply(params, x, mask):
        def step(carry, x):
            one, two, three = carry
            jnp.sin(mask)
            jnp.sin(x)
            return (jnp.sin(one) + x, jnp.sin(two) + three, three @ params["w"]), two

        return jax.lax.scan(step, (x[0], x[0], x[0]), x)

    # two has what three was a step before
    assert of_sines(apply, X, X) == ["argument", "data", "data", "moving"]


def test_a_body_that_is_used_twice_is_what_either_use_makes_of_it():
    again = jax.jit(lambda x: jnp.sin(x))

    def apply(params, x):
        return again(x) + again(x @ params["w"])

    assert set(of_sines(apply, X)) == {"moving"}


def test_an_activation_that_is_given_is_kept_by_its_core():
    """As in the network that it was cached of; and no block begins before it."""

    def block(params, x):
        return jnp.sin(jnp.tanh(x) @ params["w"])

    def cached(params, x):
        return block(params, as_activation(x))

    given, computed = (lance_jax.blocks(f, "w") for f in (block, cached))
    (alone, _), (one, _) = (lance_jax.layers(f, {"w": W}, X) for f in (given, computed))
    assert (alone.inputs, one.inputs) == ((), ((4, 5),))
    factors = lance_jax.calibrate(computed, {"w": W}, [X], energy=0.5)
    assert set(factors[one.path].bases) == {"feature"}
    assert jnp.array_equal(lance_jax.compress(computed, factors)({"w": W}, X), block({"w": W}, X))
