"""Exact packed masks: bit-equal gradients, and how little is kept for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lance_jax

# name -> (function, elements that share one byte of the residual)
FORMS = {
    "relu": (jax.nn.relu, 8),
    "relu6": (jax.nn.relu6, 8),
    "leaky_relu": (jax.nn.leaky_relu, 8),
    "leaky_relu(0.25)": (lambda x: jax.nn.leaky_relu(x, 0.25), 8),
    "clamp(0, x, 6)": (lambda x: lax.clamp(0.0, x, 6.0), 8),
    "where(x > 0, x, 0.1 x)": (lambda x: jnp.where(x > 0, x, 0.1 * x), 8),
    "where(x > 0, x, 0)": (lambda x: jnp.where(x > 0, x, 0), 8),
    "maximum(x, 0)": (lambda x: jnp.maximum(x, 0), 5),
    "maximum(0, x)": (lambda x: jnp.maximum(0, x), 5),
    "maximum(x, 0.01 x)": (lambda x: jnp.maximum(x, 0.01 * x), 5),
    "clip(x, 0, 6)": (lambda x: jnp.clip(x, 0, 6), 5),
    "minimum(maximum(x, 0), 6)": (lambda x: jnp.minimum(jnp.maximum(x, 0), 6), 5),
}
form = pytest.mark.parametrize("name", FORMS)

# Every kind of point at which two implementations of a slope could disagree.
EDGES = [-np.inf, -7, -1, -1e-30, -0.0, 0.0, 1e-30, 1, 5.9999995, 6, 6.0000005, 7, np.inf, np.nan]


def fast_and_plain(function, **options):
    """`function` as a network of no layers, compressed and as it is."""

    def plain(params, x):
        return function(params["scale"] * x)

    return lance_jax.compress(plain, lance_jax.Factors({}), **options), plain


def pullback(apply_fn, params, x, cotangent):
    """Value and gradients of one jitted forward and backward pass."""

    def run(params, x, cotangent):
        value, vjp = jax.vjp(apply_fn, params, x)
        return value, vjp(cotangent)

    return jax.jit(run)(params, x, cotangent)


def inputs(shape, dtype=jnp.float32):
    """Random values with all the edge values among them, and a cotangent."""
    generator = np.random.default_rng(0)
    x = generator.normal(0, 4, shape).ravel()
    places = generator.permutation(x.size)[: min(len(EDGES), x.size)]
    x[places] = EDGES[: len(places)]
    cotangent = generator.normal(0, 1, shape)
    return jnp.asarray(x.reshape(shape), dtype), jnp.asarray(cotangent, dtype)


def assert_same_bits(got, want):
    """Equal to the last bit, signs of zeros included; a nan equals any nan."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    np.testing.assert_array_equal(got, want)
    zeros = want == 0
    np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(want[zeros]))


def kept_bytes(apply_fn, params, x):
    """Bytes of what the backward pass of `apply_fn` is given, arguments apart."""
    residuals = jax.eval_shape(lambda x: jax.vjp(lambda x: apply_fn(params, x), x)[1], x)
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(residuals))


ONE = {"scale": np.float32(1)}


@form
def test_gradient_is_bit_equal(name):
    fast, plain = fast_and_plain(FORMS[name][0])
    x, cotangent = inputs((6, 8))
    if name == "maximum(x, 0.01 x)":
        x = jnp.where(jnp.isnan(x), 1, x)  # the slope at nan, 0, would be its fourth
    (got, (_, got_dx)), (want, (_, want_dx)) = (
        pullback(f, ONE, x, cotangent) for f in (fast, plain)
    )
    assert_same_bits(got, want)
    assert_same_bits(got_dx, want_dx)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "maximum(x, 0)", "clip(x, 0, 6)"])
def test_gradient_is_bit_equal_in_half_precision(name, dtype):
    fast, plain = fast_and_plain(FORMS[name][0])
    params = {"scale": np.ones((), dtype)}
    x, cotangent = inputs((3, 10), dtype)
    (got, (_, got_dx)), (want, (_, want_dx)) = (
        pullback(f, params, x, cotangent) for f in (fast, plain)
    )
    assert_same_bits(got, want)
    assert_same_bits(got_dx, want_dx)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 11), (0, 4)])
@pytest.mark.parametrize("name", ["relu", "maximum(x, 0)"])
def test_odd_sizes(name, shape):
    fast, plain = fast_and_plain(FORMS[name][0])
    x, cotangent = inputs(shape)
    (_, (_, got)), (_, (_, want)) = (pullback(f, ONE, x, cotangent) for f in (fast, plain))
    assert_same_bits(got, want)


@form
@pytest.mark.parametrize("shape", [(40, 40), (3, 7, 5)], ids=str)
def test_bytes_kept(name, shape):
    """One bit an element, or five elements a byte where a tie has a slope of its own."""
    function, per_byte = FORMS[name]
    fast, plain = fast_and_plain(function)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    smallest = math.ceil(math.prod(shape) / per_byte)
    # Eight bytes of slack: a closed-over scalar or two, such as `scale`.
    assert smallest <= kept_bytes(fast, ONE, x) <= smallest + 8
    assert kept_bytes(plain, ONE, x) >= math.prod(shape)


def test_masks_can_be_left_alone():
    fast, plain = fast_and_plain(jax.nn.relu, masks=False)
    x = jax.ShapeDtypeStruct((40, 40), jnp.float32)
    assert kept_bytes(fast, ONE, x) == kept_bytes(plain, ONE, x)


def test_mask_of_a_layer_without_factors():
    def plain(params, x):
        return jax.nn.relu(x @ params["used"]) @ params["head"]

    params = {"used": jnp.ones((4, 16)), "head": jnp.ones((16, 3))}
    fast = lance_jax.compress(plain, lance_jax.Factors({}))
    x = jnp.ones((8, 4))
    kept = [kept_bytes(f, params, x) for f in (plain, fast)]
    weights = 4 * (4 * 16 + 16 * 3)  # the products keep their weights for dX either way
    assert kept[0] >= weights + 8 * 16
    assert kept[1] <= weights + 8 * 16 // 8 + 8


@jax.custom_jvp
def straight_through_relu(x):
    return jnp.maximum(x, 0)


@straight_through_relu.defjvp
def _(primals, tangents):
    return straight_through_relu(*primals), tangents[0]


@jax.custom_jvp
def relu(x):  # the name of jax.nn.relu, its body, and another derivative
    return jnp.maximum(x, 0)


@relu.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu(x), dx * jax.nn.sigmoid(4 * x)


@jax.custom_jvp
def half_at_the_tie(x):
    return jnp.maximum(x, 0)


@half_at_the_tie.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return half_at_the_tie(x), jnp.where(x > 0, dx, jnp.where(x == 0, dx / 2, 0))


@jax.custom_vjp
def straight_through_vjp(x):
    return jnp.clip(x, 0, 6)


straight_through_vjp.defvjp(lambda x: (straight_through_vjp(x), None), lambda _, ct: (ct,))


@pytest.mark.parametrize(
    "function",
    [
        straight_through_relu,
        relu,
        half_at_the_tie,
        straight_through_vjp,
        jax.jit(straight_through_relu),
        jax.checkpoint(relu),
    ],
    ids=["straight-through", "relu", "half at the tie", "custom_vjp", "in jit", "in remat"],
)
def test_the_users_own_derivative_is_left_alone(function):
    fast, plain = fast_and_plain(function)
    x, cotangent = inputs((4, 8))
    x = jnp.nan_to_num(x)
    (_, (_, got)), (_, (_, want)) = (pullback(f, ONE, x, cotangent) for f in (fast, plain))
    assert_same_bits(got, want)


# Looks like a member of the family and is none: other edges, other operands, other users.
LOOKALIKES = {
    "maximum(x, 1)": lambda p, x: jnp.maximum(x, 1),
    "minimum(x, 0)": lambda p, x: jnp.minimum(x, 0),
    "minimum(x, 0.1 x)": lambda p, x: jnp.minimum(x, 0.1 * x),
    "maximum(x, 2 x)": lambda p, x: jnp.maximum(x, 2 * x),
    "maximum(x, -x)": lambda p, x: jnp.maximum(x, -x),
    "maximum(x, 0 x)": lambda p, x: jnp.maximum(x, 0.0 * x),
    "maximum(x, parameter)": lambda p, x: jnp.maximum(x, p["a"]),
    "maximum(x, zeros of a parameter)": lambda p, x: jnp.maximum(x, p["zeros"]),
    "clip between parameters": lambda p, x: jnp.clip(x, p["zeros"], p["six"]),
    "clip(x, -1, 1)": lambda p, x: jnp.clip(x, -1, 1),
    "clip(x, 6, 0)": lambda p, x: jnp.clip(x, 6, 0),
    "maximum(minimum(x, 6), 0)": lambda p, x: jnp.maximum(jnp.minimum(x, 6), 0),
    "prelu": lambda p, x: jnp.where(x > 0, x, p["a"] * x),
    "prelu, maximum": lambda p, x: jnp.maximum(x, p["a"] * x),
    "leaky_relu of a parameter": lambda p, x: jax.nn.leaky_relu(x, p["a"]),
    "where(x > 1, x, 0.1 x)": lambda p, x: jnp.where(x > 1, x, 0.1 * x),
    "where(x >= 0, x, 0.1 x)": lambda p, x: jnp.where(x >= 0, x, 0.1 * x),
    "where(x < 0, x, 0.1 x)": lambda p, x: jnp.where(x < 0, x, 0.1 * x),
    "where(x < 0, 0.1 x, x)": lambda p, x: jnp.where(x < 0, 0.1 * x, x),
    "where(0 < x, x, 0.1 x)": lambda p, x: jnp.where(jnp.less(0, x), x, 0.1 * x),
    "where(x > 0, x, elu)": lambda p, x: jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 1))),
    "where(y > 0, x, 0.1 x)": lambda p, x: jnp.where(x[::-1] > 0, x, 0.1 * x),
    "where(x > 0, y, 0.1 x)": lambda p, x: jnp.where(x > 0, x[::-1], 0.1 * x),
    "where(x > 0, x, 0.1 y)": lambda p, x: jnp.where(x > 0, x, 0.1 * x[::-1]),
    "the product is used again": lambda p, x: (lambda ax: jnp.where(x > 0, x, ax) + ax)(0.1 * x),
    "the maximum is used again": lambda p, x: (lambda m: jnp.minimum(m, 6) * m)(jnp.maximum(x, 0)),
    "the condition is used again": lambda p, x: (
        lambda c: jnp.where(c, x, 0.1 * x) + jnp.where(c, 1, p["a"])
    )(x > 0),
    "row-wise ceiling": lambda p, x: jnp.minimum(jnp.maximum(x, 0), jnp.arange(8.0)),
    "clamp to rows": lambda p, x: lax.clamp(jnp.zeros_like(x), x, p["six"] * jnp.ones_like(x)),
    "outer maximum": lambda p, x: jnp.maximum(x[:, :, None], jnp.zeros((1, 1, 3))),
    "relu of relu": lambda p, x: jax.nn.relu(jax.nn.relu(x) - 1),
    "integer maximum": lambda p, x: x * jnp.maximum(jnp.arange(-4, 4), 0).astype(x.dtype),
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_keep_their_gradients(name):
    plain = LOOKALIKES[name]
    fast = lance_jax.compress(plain, lance_jax.Factors({}))
    params = {"a": jnp.float32(0.3), "zeros": jnp.zeros(8), "six": jnp.float32(6)}
    x, _ = inputs((4, 8))
    x = jnp.nan_to_num(x, posinf=9, neginf=-9)
    cotangent = jnp.asarray(
        np.random.default_rng(1).normal(size=jax.eval_shape(plain, params, x).shape), x.dtype
    )
    (got, got_grads), (want, want_grads) = (
        pullback(f, params, x, cotangent) for f in (fast, plain)
    )
    assert_same_bits(got, want)
    # Sums over elements may round in another order, hence not bits for the parameters' gradients.
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got_grads, want_grads
    )
    np.testing.assert_array_equal(got_grads[1], want_grads[1])


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "clip(x, 0, 6)"])
@pytest.mark.parametrize("where", ["vmap", "scan", "remat", "cond", "inner vmap"])
def test_inside_transformations(name, where):
    function = FORMS[name][0]
    wrapped = {
        "vmap": lambda x: jax.vmap(function)(x),
        "inner vmap": lambda x: jax.vmap(jax.vmap(function, 1, 1))(x),
        "scan": lambda x: lax.scan(lambda c, row: (c + 1, function(row)), jnp.float32(0), x)[1],
        "remat": jax.checkpoint(function),
        "cond": lambda x: lax.cond(jnp.isnan(x).any(), function, lambda x: x, x),
    }[where]
    fast, plain = fast_and_plain(wrapped)
    x, cotangent = inputs((5, 3, 8))
    (_, (_, got)), (_, (_, want)) = (pullback(f, ONE, x, cotangent) for f in (fast, plain))
    assert_same_bits(got, want)


def test_outside_vmap():
    fast, plain = fast_and_plain(jax.nn.relu)
    x, _ = inputs((5, 3, 7))
    got, want = (
        jax.jit(jax.vmap(jax.grad(lambda x, f=f: (f(ONE, x) ** 2).sum())))(x) for f in (fast, plain)
    )
    assert_same_bits(got, want)


FAR = {
    "several factors": lambda x: jnp.minimum(jax.nn.leaky_relu(x, 0.1) * 0.1 * 0.1, 5.0),
    "a sum of two": jax.jit(lambda x: jnp.maximum(x, 0) + 0.5 * jnp.maximum(x + 100, 0)),
    "an offset": jax.jit(lambda x: jnp.clip(x + 9, 0, 200)),
    "a scaled clip": lambda x: jnp.clip(x * 0.2, -1, 1),
}


@pytest.mark.parametrize("fun", FAR.values(), ids=FAR)
def test_slopes_far_from_the_constants(fun):
    """What changes its slope where no constant stands is left alone, or exact there too."""
    x = jnp.concatenate([jnp.linspace(-1e3, 1e3, 4001), jnp.array([-100.0, -9.0, 191.0, 600.0])])
    fast = lance_jax.compress(lambda params, x: fun(x), {})
    got = jax.vjp(lambda x: fast({}, x), x)[1](jnp.ones_like(x))[0]
    assert (got == jax.vjp(fun, x)[1](jnp.ones_like(x))[0]).all()


def test_a_choice_of_constants_has_no_slope():
    """Such as a mask that is added to attention's logits: its one input is of booleans."""

    def apply(params, x):
        return jnp.where(x > 0, 0.0, -1e9) * params["scale"]

    x, params = jnp.array([1.0, -1.0]), {"scale": jnp.array(2.0)}
    fast = lance_jax.compress(apply, {})
    np.testing.assert_array_equal(fast(params, x), apply(params, x))
    assert jax.grad(lambda p: fast(p, x).sum())(params)["scale"] == -1e9
