"""`layers`: what is found, in order of use, and what is skipped for which reason."""

import jax
import jax.numpy as jnp
import pytest
from helpers import (
    ATTENTION,
    assert_close,
    attention,
    feature,
    gradients,
    orthonormal,
    own_product,
    own_product_jvp,
    random,
    two_devices,
)
from jax import lax
from jax.sharding import PartitionSpec

import lance_jax

pytestmark = pytest.mark.usefixtures("exact_products")


def conv_net(params, x):
    """(N, 9, 8, 3) -> (N, 5): parameters in another order than they are used in."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, params["z"], (2, 2), "SAME", dimension_numbers=dimensions)
    x = jax.nn.relu(x)
    x = lax.conv_general_dilated(
        x, params["m"], (1, 1), "VALID", dimension_numbers=dimensions, feature_group_count=6
    )
    return jnp.einsum("nhwc,co->no", x, params["a"]["kernel"]) + params["a"]["bias"]


CONV_NET = {
    "z": random(3, 3, 3, 6),
    "m": random(2, 2, 1, 6),
    "a": {"kernel": random(6, 5), "bias": random(5)},
}


def test_layers_in_order_of_use():
    found = lance_jax.layers(conv_net, CONV_NET, random(2, 9, 8, 3))
    assert all(isinstance(layer, lance_jax.Layer) for layer in found)
    assert [layer.path for layer in found] == ["z", "m", "a/kernel"]
    assert [layer.kind for layer in found] == ["conv", "conv", "dense"]
    assert [layer.uses for layer in found] == [1, 1, 1]
    assert [tuple(layer.weight_shape) for layer in found] == [(3, 3, 3, 6), (2, 2, 1, 6), (6, 5)]
    assert [tuple(layer.input_shape) for layer in found[:2]] == [(2, 9, 8, 3), (2, 5, 4, 6)]
    assert len(found) == 3
    assert tuple(found.skipped) == ()


def test_layers_modes():
    stem, depthwise, _ = lance_jax.layers(conv_net, CONV_NET, random(2, 9, 8, 3))
    assert stem.modes == {"batch": 2, "height": 9, "width": 8, "channel": 3, "patch": 27}
    assert "channel" not in depthwise.modes  # no channel mode where there are groups
    assert {m: depthwise.modes[m] for m in ("batch", "height", "width")} == {
        "batch": 2,
        "height": 5,
        "width": 4,
    }

    def volumes(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1, 1), "SAME", dimension_numbers=("NCDHW", "OIDHW", "NCDHW")
        )

    (layer,) = lance_jax.layers(volumes, {"w": random(4, 2, 3, 1, 2)}, random(2, 2, 5, 6, 7))
    assert layer.modes == {
        "batch": 2,
        "depth": 5,
        "height": 6,
        "width": 7,
        "channel": 2,
        "patch": 12,
    }


@pytest.mark.parametrize(
    ("shape", "modes"),
    [
        ((2, 4), {"batch": 2, "feature": 4}),
        ((2, 7, 4), {"batch": 2, "token": 7, "feature": 4}),
        ((2, 5, 6, 4), {"batch": 2, "token0": 5, "token1": 6, "feature": 4}),
    ],
)
def test_layers_modes_of_dense(shape, modes):
    (layer,) = lance_jax.layers(lambda p, x: x @ p["w"], {"w": random(4, 3)}, random(*shape))
    assert layer.modes == modes


def test_layers_macs():
    stem, depthwise, head = lance_jax.layers(conv_net, CONV_NET, random(2, 9, 8, 3))
    assert stem.macs == 2 * 5 * 4 * 6 * 27
    assert depthwise.macs == 2 * 4 * 3 * 6 * 4
    assert head.macs == 2 * 4 * 3 * 6 * 5 or head.macs == 2 * 6 * 5  # summed after or before


def test_layers_uses():
    def twice(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"] + x @ p["v"]

    found = lance_jax.layers(twice, {"v": random(4, 4), "w": random(4, 4)}, random(2, 4))
    assert [(layer.path, layer.uses) for layer in found] == [("w", 2), ("v", 1)]


def test_layers_table():
    found = lance_jax.layers(conv_net, CONV_NET, random(2, 9, 8, 3))
    lines = str(found).splitlines()
    for layer in found:
        (row,) = [line for line in lines if layer.path in line.split()]
        assert layer.kind in row


def test_layers_takes_keyword_arguments():
    def apply_fn(p, x, *, wide, train):
        return x @ p["wide"] if wide is True and train is False else x @ p["narrow"]

    params = {"wide": random(4, 9), "narrow": random(4, 2)}
    found = lance_jax.layers(apply_fn, params, random(2, 4), wide=True, train=False)
    assert [layer.path for layer in found] == ["wide"]


def test_layers_of_attention():
    found = lance_jax.layers(attention, ATTENTION, random(3, 7, 6))
    assert {layer.path for layer in found} == set(ATTENTION)
    assert {layer.kind for layer in found} == {"dense"}
    assert {layer.path: layer.modes["feature"] for layer in found} == {
        "q": 6,
        "k": 6,
        "v": 6,
        "out": 10,
    }
    assert tuple(found.skipped) == ()  # scores are products of activations, not skipped layers


def while_net(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))


def batch_groups(p, x):
    return lax.conv_general_dilated(
        x,
        p["w"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        batch_group_count=2,
    )


def counted_loop(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


SKIPPED = {
    "custom_vjp": (lambda p, x: own_product(x, p["w"]), (4, 4), (2, 4), "custom_vjp"),
    "custom_jvp": (lambda p, x: own_product_jvp(x, p["w"]), (4, 4), (2, 4), "custom_jvp"),
    "while": (while_net, (4, 4), (2, 4), "while"),
    "dynamic slice": (counted_loop, (3, 4, 4), (2, 4), "computed"),
    "batch_group_count": (batch_groups, (3, 3, 5, 4), (2, 6, 6, 5), "batch_group_count"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_skipped_with_a_reason(name):
    apply_fn, weight, shape, reason = SKIPPED[name]
    found = lance_jax.layers(apply_fn, {"w": random(*weight)}, random(*shape))
    assert list(found) == []
    (skipped,) = found.skipped
    assert skipped.path == "w"
    assert reason in skipped.reason
    assert skipped.path in str(found) and skipped.reason in str(found)


def test_skipped_weight_computed_from_parameters():
    def lora(p, x):
        return x @ (p["w"] + p["a"] @ p["b"])

    params = {"w": random(4, 3), "a": random(4, 1), "b": random(1, 3)}
    found = lance_jax.layers(lora, params, random(2, 4))
    assert list(found) == []
    assert "w" in " ".join(skipped.path for skipped in found.skipped)


@pytest.mark.parametrize("choose", ["where", "cond", "switch"])
def test_skipped_weight_chosen_by_data(choose):
    def apply_fn(p, x):
        first = x[0, 0] > 0
        if choose == "where":
            w = jnp.where(first, p["w"], p["v"].T)
        elif choose == "cond":
            w = lax.cond(first, lambda: p["w"], lambda: p["v"].T)
        else:
            forms = [lambda p=p: p["w"], lambda p=p: p["v"].T, lambda p=p: p["w"] + p["v"].T]
            w = lax.switch(first.astype(int), forms)
        return x @ w

    params = {"w": random(4, 3), "v": random(3, 4)}
    found = lance_jax.layers(apply_fn, params, random(2, 4))
    assert list(found) == []
    ((path, reason),) = found.skipped
    assert set(path.split(" + ")) == {"w", "v"} and "computed" in reason


def test_an_activation_chosen_between_parameters_is_data():
    def apply_fn(p, x):
        return jnp.where(x > 0, p["a"], p["b"]) @ p["w"]

    params = {"a": random(4), "b": random(4), "w": random(4, 3)}
    (layer,) = lance_jax.layers(apply_fn, params, random(2, 4))
    assert layer.path == "w"


def test_skipped_in_shard_map():
    mesh, split = two_devices(), PartitionSpec("data")

    def apply_fn(p, x):
        mapped = jax.shard_map(
            lambda w, x: x @ w, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split
        )
        return mapped(p["w"], x) @ p["head"]

    params, x = {"w": random(4, 3), "head": random(3, 2)}, random(4, 4)
    found = lance_jax.layers(apply_fn, params, x)
    assert [layer.path for layer in found] == ["head"]
    assert [(s.path, "shard_map" in s.reason) for s in found.skipped] == [("w", True)]
    fast = lance_jax.compress(apply_fn, feature({"head": orthonormal(3, 3)}))
    assert_close(gradients(fast)(params, x), gradients(apply_fn)(params, x))


@pytest.mark.parametrize("name", ["custom_vjp", "custom_jvp"])
def test_a_skipped_layer_keeps_its_own_derivative(name):
    apply_fn, weight, shape, _ = SKIPPED[name]

    def two(p, x):
        return apply_fn(p, x) @ p["head"]

    params = {"w": random(*weight), "head": random(4, 3)}
    fast = lance_jax.compress(two, feature({"head": orthonormal(4, 4)}))
    x = random(*shape)
    assert_close(gradients(fast)(params, x), gradients(two)(params, x))
