"""Bad input to `compress`: one ValueError that names the place, before anything is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers import feature, orthonormal, own_product, random
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

pytestmark = pytest.mark.usefixtures("exact_products")


def one_conv(p, x):
    return lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


BAD_FACTORS = {
    "path of no layer": (
        lambda: feature({"encoder/block0/kernal": orthonormal(4, 2)}),
        ["encoder/block0/kernal", "encoder/block0/kernel"],
    ),
    "path of a bias": (
        lambda: feature({"encoder/block0/bias": orthonormal(4, 2)}),
        ["encoder/block0/bias"],
    ),
    "one good path, one bad": (
        lambda: feature({"encoder/block0/kernel": orthonormal(4, 2), "decoder": orthonormal(4, 2)}),
        ["decoder"],
    ),
    "unknown mode": (
        lambda: Factors({"encoder/block0/kernel": LayerFactors({"chanel": orthonormal(4, 2)})}),
        ["chanel"],
    ),
    "mode of the other kind": (
        lambda: Factors({"encoder/block0/kernel": LayerFactors({"channel": orthonormal(4, 2)})}),
        ["encoder/block0/kernel", "channel", "feature"],
    ),
    "basis with other rows": (
        lambda: feature({"encoder/block0/kernel": orthonormal(5, 2)}),
        ["encoder/block0/kernel", "feature", "5", "4"],
    ),
    "more columns than rows": (
        lambda: feature({"encoder/block0/kernel": jnp.ones((4, 6))}),
        ["6", "4"],
    ),
    "no columns": (
        lambda: feature({"encoder/block0/kernel": jnp.ones((4, 0))}),
        ["0"],
    ),
    "a vector": (
        lambda: feature({"encoder/block0/kernel": jnp.ones(4)}),
        ["(4,)"],
    ),
    "stacked where nothing is scanned": (
        lambda: feature({"encoder/block0/kernel": jnp.stack([orthonormal(4, 2)] * 3)}),
        ["encoder/block0/kernel", "(3, 4, 2)"],
    ),
    "integer basis": (
        lambda: feature({"encoder/block0/kernel": jnp.ones((4, 2), jnp.int32)}),
        ["int32"],
    ),
    "unknown dtype": (
        lambda: Factors(
            {
                "encoder/block0/kernel": LayerFactors(
                    {"feature": orthonormal(4, 2)}, core_dtype="int3"
                )
            }
        ),
        ["int3", "int4", "int8", "bfloat16"],
    ),
    "mean of another size": (
        lambda: Factors(
            {
                "encoder/block0/kernel": LayerFactors(
                    {"feature": orthonormal(4, 2)}, mean=jnp.ones(9)
                )
            }
        ),
        ["encoder/block0/kernel", "9", "4"],
    ),
    "batch mode of another batch size": (
        lambda: Factors({"encoder/block0/kernel": LayerFactors({"batch": orthonormal(8, 2)})}),
        ["encoder/block0/kernel", "batch", "8", "3"],
    ),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_bad_factors(name):
    make, words = BAD_FACTORS[name]
    params = {"encoder": {"block0": {"kernel": random(4, 2), "bias": random(2)}}}

    def apply_fn(p, x):
        layer = p["encoder"]["block0"]
        return x @ layer["kernel"] + layer["bias"]

    with pytest.raises(ValueError) as caught:
        lance_jax.compress(apply_fn, make())(params, random(3, 4))
    for word in words:
        assert word in str(caught.value)


def test_bad_factors_of_a_convolution():
    params, x = {"kernel": random(3, 3, 4, 5)}, random(2, 6, 7, 4)
    for mode, rows in {"height": 7, "width": 6, "channel": 5, "patch": 4, "feature": 4}.items():
        factors = Factors({"kernel": LayerFactors({mode: orthonormal(rows, 2)})})
        with pytest.raises(ValueError, match=f"(?s)kernel.*{mode}"):
            lance_jax.compress(one_conv, factors)(params, x)


def test_bases_of_a_scan_of_another_length():
    def apply_fn(p, x):
        return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]

    factors = feature({"w": jnp.stack([orthonormal(4, 2)] * 2)})
    with pytest.raises(ValueError, match=r"(?s)w.*\(2, 4, 2\)"):
        lance_jax.compress(apply_fn, factors)({"w": random(3, 4, 4)}, random(2, 4))


MLP = {"a": random(4, 6), "b": random(6, 3, seed=1)}


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def test_compressed_twice():
    factors = feature({"a": orthonormal(4, 2)})
    once = lance_jax.compress(mlp, factors)
    with pytest.raises(ValueError, match="'a'.*it is compressed already"):
        lance_jax.compress(once, factors)(MLP, random(5, 4))
    found = lance_jax.layers(once, MLP, random(5, 4))
    assert [layer.path for layer in found] == ["b"]


def test_a_block_compressed_twice():
    """Its layers are compressed with it, so that no factors of theirs could do anything."""
    params = {"block_1": MLP}

    def apply_fn(params, x):
        return mlp(params["block_1"], x)

    blocked = lance_jax.blocks(apply_fn, "block_1")
    factors = lance_jax.calibrate(blocked, params, [random(5, 4)])
    once = lance_jax.compress(blocked, factors)
    for again in (factors, feature({"block_1/a": orthonormal(4, 2)})):
        with pytest.raises(ValueError, match="'block_1.*it is compressed already"):
            lance_jax.compress(once, again)(params, random(5, 4))
    found = lance_jax.layers(once, params, random(5, 4))
    assert not found and [place for place, _ in found.skipped] == ["block_1/a", "block_1/b"]


def test_factors_that_are_no_factors():
    wrongs: list[Any] = [None, 3, {"a": orthonormal(4, 2)}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="Factors"):
            lance_jax.compress(mlp, wrong)(MLP, random(5, 4))


def test_bad_input_raises_before_anything_is_compiled():
    factors = feature({"a": orthonormal(5, 2)})
    with pytest.raises(ValueError, match="a"):
        jax.make_jaxpr(lance_jax.compress(mlp, factors))(MLP, jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="a"):
        jax.jit(lance_jax.compress(mlp, factors)).lower(MLP, jnp.ones((5, 4)))


def test_factors_of_a_skipped_layer_say_why():
    params, x = {"w": random(4, 4)}, random(2, 4)
    fast = lance_jax.compress(
        lambda p, x: own_product(x, p["w"]), feature({"w": orthonormal(4, 2)})
    )
    with pytest.raises(ValueError, match=r"(?s)w.*custom_vjp"):
        fast(params, x)


def test_factors_of_a_block_for_a_function_without_blocks():
    params = {"a": {"w": random(4, 4), "v": random(4, 4)}}
    fast = lance_jax.compress(lambda p, x: x @ p["a"]["w"] @ p["a"]["v"], {"a": LayerFactors({})})
    message = "'a'. matches no layer or block; factors of a block need the function that `blocks` g"
    with pytest.raises(ValueError, match=message):
        fast(params, random(3, 4))
