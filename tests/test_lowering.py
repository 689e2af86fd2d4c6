"""`lower_for_cpu` over whole networks: values, gradients, and what it goes together with."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors, calibrate, compress, lower_for_cpu
from tests.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("exact_products")


class Net(nn.Module):
    """A stem, a pool, an inverted residual block and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        y = nn.relu6(nn.Conv(16, (1, 1), name="expand")(x))
        y = nn.relu6(nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y))
        x = x + nn.Conv(8, (1, 1), name="project")(y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


NET = Net()
X = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
PARAMS = NET.init(jax.random.key(1), X)
PATHS = [f"params/{name}/kernel" for name in ("stem", "expand", "depthwise", "project", "head")]


def plain(params, x):
    return NET.apply(params, x)


def loss(apply_fn):
    return lambda params, x: jnp.sum(jnp.sin(apply_fn(params, x)))


def gradients(apply_fn):
    return jax.jit(jax.value_and_grad(loss(apply_fn), (0, 1)))(PARAMS, X)


@functools.cache
def plain_gradients():
    return gradients(plain)


def assert_same(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert_close(a, b)


def test_values_and_gradients():
    assert_same(gradients(lower_for_cpu(plain)), plain_gradients())


def test_the_layers_stay_what_they_are():
    found = lance_jax.layers(lower_for_cpu(plain), PARAMS, X)
    assert [layer.path for layer in found] == PATHS
    assert list(found) == list(lance_jax.layers(plain, PARAMS, X))


@pytest.fixture(scope="module")
def factors():
    return calibrate(plain, PARAMS, [X], energy=0.9, core_dtype="int8")


def test_calibration_gives_the_same_factors(factors):
    found = calibrate(lower_for_cpu(plain), PARAMS, [X], energy=0.9, core_dtype="int8")
    assert found.keys() == factors.keys()
    for path, layer in factors.items():
        assert found[path].ranks == layer.ranks
        for mode, basis in layer.bases.items():
            assert_close(found[path].bases[mode] @ found[path].bases[mode].T, basis @ basis.T)


@pytest.mark.parametrize("order", ["compressed first", "lowered first"])
def test_compressed_in_either_order(factors, order):
    expected = gradients(compress(plain, factors))
    if order == "compressed first":
        both = lower_for_cpu(compress(plain, factors))
    else:
        both = compress(lower_for_cpu(plain), factors)
    assert_same(gradients(both), expected)
    text = str(jax.make_jaxpr(both)(PARAMS, X))
    assert text.count("cpu_conv") == 4 and "conv_general_dilated" not in text


@pytest.mark.parametrize("order", ["compressed first", "lowered first"])
def test_what_is_kept(factors, order):
    """The same cores and masks, and the pool's places instead of its input."""

    def kept(apply_fn):
        step = lance_jax.value_and_grad(loss(apply_fn))
        return sorted(leaf.nbytes for leaf in step.forward(PARAMS, X)[1])

    if order == "compressed first":
        both = lower_for_cpu(compress(plain, factors))
    else:
        both = compress(lower_for_cpu(plain), factors)
    alone = kept(compress(plain, factors))
    pool_input, places = 2 * 4 * 4 * 8 * 4, 2 * 2 * 2 * 8
    alone.remove(pool_input)
    alone.append(places)
    assert kept(both) == sorted(alone)


NESTINGS = {
    "jit": lambda apply: jax.jit(apply),
    "remat": lambda apply: jax.checkpoint(apply),
    "vmap": lambda apply: lambda p, x: jax.vmap(apply, (None, 0))(p, x[:, None])[:, 0],
    "scan": lambda apply: lambda p, x: lax.scan(lambda c, x: (c, apply(p, x[None])[0]), 0, x)[1],
    "cond": lambda apply: (
        lambda p, x: lax.cond(x.sum() < 1e9, apply, lambda p, x: jnp.zeros((2, 3)), p, x)
    ),
}


@pytest.mark.parametrize("inside", [False, True], ids=["lowered outside", "lowered inside"])
@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_nesting(nest, inside):
    nested = nest(lower_for_cpu(plain)) if inside else lower_for_cpu(nest(plain))
    assert_same(gradients(nested), plain_gradients())
    assert "conv_general_dilated" not in str(jax.make_jaxpr(nested)(PARAMS, X))


def test_a_scanned_layer_compressed_and_lowered():
    def apply(params, x):
        def layer(x, w):
            conv = lax.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jnp.tanh(conv), None

        return lax.scan(layer, x, params["w"])[0]

    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((3, 1, 1, 6, 6)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 6)), jnp.float32)
    factors = calibrate(apply, params, [x], modes=("channel",), energy=0.8)
    both = [lower_for_cpu(compress(apply, factors)), compress(lower_for_cpu(apply), factors)]
    expected = jax.grad(loss(compress(apply, factors)))(params, x)
    for one in both:
        assert_same(jax.jit(jax.grad(loss(one)))(params, x), expected)
        assert "cpu_conv" in str(jax.make_jaxpr(one)(params, x))


def test_whole_inputs_kept(factors):
    whole = Factors({path: LayerFactors({}) for path in PATHS})
    assert_same(gradients(lower_for_cpu(compress(plain, whole))), plain_gradients())


def test_keyword_arguments_and_structures():
    def apply(params, x, *, scale):
        return {"y": NET.apply(params, x) * scale, "note": "kept"}

    found = lower_for_cpu(apply)(PARAMS, X, scale=2.0)
    assert found["note"] == "kept"
    assert_close(found["y"], 2 * np.asarray(plain(PARAMS, X)))
