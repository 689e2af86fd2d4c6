"""`layers` finds what can be compressed; `compress` changes weight gradients and nothing else."""

import re
from functools import cache, partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lance_jax
from lance_jax import Factors, LayerFactors

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


pytestmark = pytest.mark.usefixtures("exact_products")


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


def equations(jaxpr, into=True):
    """All equations of a jaxpr, those of the bodies in it included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values() if into else ():
            for body in value if isinstance(value, tuple | list) else (value,):
                body = getattr(body, "jaxpr", body)
                if hasattr(body, "eqns"):
                    yield from equations(body)


def products(function, *args):
    """(precision, preferred_element_type) of every product and convolution, sorted."""
    return sorted(
        (
            eqn.primitive.name,
            str(eqn.params["precision"]),
            str(eqn.params["preferred_element_type"]),
        )
        for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    )


# --- layers


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


def attention(params, x):
    """(N, T, 6) -> (N, T, 6) with 3-D kernels, (6, heads, depth) and (heads, depth, 6)."""
    q, k, v = (jnp.einsum("ntc,chd->nthd", x, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k))
    mixed = jnp.einsum("nhts,nshd->nthd", weights, v)
    return x + jnp.einsum("nthd,hdc->ntc", mixed, params["out"])


ATTENTION = {name: random(6, 2, 5, seed=i) / 3 for i, name in enumerate("qkv")} | {
    "out": random(2, 5, 6, seed=4) / 3
}


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


# --- the matrix of frameworks and transformations


def loss_of(apply_fn):
    _, target = networks.batch()
    return lambda params, x: (apply_fn(params, x) * target).sum()


@cache
def reference_gradients(share):
    """Gradients of the network without transformations, at inputs projected without `compress`."""
    with jax.default_matmul_precision("highest"):
        bases = {} if share is None else networks.bases(share)
        x, _ = networks.batch()
        apply_fn = partial(networks.reference, bases)
        return jax.jit(jax.grad(loss_of(apply_fn), (0, 1)))(networks.weights(), x)


@pytest.mark.parametrize("transformation", networks.TRANSFORMATIONS)
@pytest.mark.parametrize("framework", networks.FRAMEWORKS)
def test_matrix(framework, transformation):
    net = networks.network(framework, transformation)
    params = net.pack(networks.weights())
    x, _ = networks.batch()

    found = lance_jax.layers(net.apply, params, x)
    low_rank = net.factors(networks.bases(0.5))
    assert {layer.path for layer in found} == set(low_rank)
    assert tuple(found.skipped) == ()

    fast = lance_jax.compress(net.apply, low_rank)
    assert_equal(jax.jit(fast)(params, x), jax.jit(net.apply)(params, x))

    # Full rank in one row and one column of the matrix, low rank everywhere.
    shares = {0.5: 0.5} | ({1.0: None} if "raw" in framework or transformation == "scan" else {})
    for share, reference in shares.items():
        fast = lance_jax.compress(net.apply, net.factors(networks.bases(share)))
        got, got_dx = jax.jit(jax.grad(loss_of(fast), (0, 1)))(params, x)
        want, want_dx = reference_gradients(reference)
        assert_close(net.unpack(got), want)
        assert_close(got_dx, want_dx)


def test_reference_gradients():
    """The matrix' reference: other gradients than the plain ones in the kernels, and only there."""
    plain, plain_dx = reference_gradients(None)
    low, low_dx = reference_gradients(0.5)
    assert_close(low_dx, plain_dx)
    for path, modes in networks.bases(0.5).items():
        *parents, name = path.split("/")
        got, want = low, plain
        for key in parents:
            got, want = got[key], want[key]
        assert_close(got["bias"], want["bias"])
        difference = jnp.linalg.norm(got[name] - want[name]) / jnp.linalg.norm(want[name])
        assert 0.1 < difference < 1.1
        if set(modes) == {"feature"}:
            u = modes["feature"]
            assert_close(got[name], u @ u.T @ want[name])


# --- what surrounds the layers


class Regularised(nn.Module):
    """Dropout, batch statistics and an auxiliary output around two dense layers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(x)
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(0.4, deterministic=not train)(x)
        return nn.Dense(3, name="second")(x)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_batch_statistics_auxiliary_outputs_keywords(train):
    model = Regularised()
    x, key = random(8, 5), jax.random.key(3, impl="unsafe_rbg")  # compiles in no time
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]

    def apply_fn(params, stats, x, key, *, train):
        return model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=train,
            rngs={"dropout": key},
            mutable=["batch_stats", "intermediates"],
        )

    found = lance_jax.layers(apply_fn, params, stats, x, key, train=train)
    assert [layer.path for layer in found] == ["first/kernel", "second/kernel"]
    fast = lance_jax.compress(
        apply_fn, feature({"first/kernel": orthonormal(5, 5), "second/kernel": orthonormal(6, 6)})
    )

    def outputs(f):
        return jax.jit(partial(f, train=train))(params, stats, x, key)

    got, want = outputs(fast), outputs(apply_fn)
    assert set(got[1]) == {"batch_stats", "intermediates"}
    assert_equal(got, want)
    if train:
        assert not jnp.array_equal(got[1]["batch_stats"]["norm"]["mean"], stats["norm"]["mean"])

    def grads(f):
        def loss(params, stats, x, key):
            y, state = f(params, stats, x, key, train=train)
            return (y * jnp.cos(y)).sum(), state

        return jax.jit(jax.grad(loss, has_aux=True))(params, stats, x, key)

    (got, got_state), (want, want_state) = grads(fast), grads(apply_fn)
    assert_close(got, want)
    assert_close(got_state, want_state)


def test_nnx_dropout_and_batch_statistics():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.dropout = nnx.Dropout(0.4, rngs=rngs)
            self.second = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(params, rest, x):
        model = nnx.merge(graph, params, rest, copy=True)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    x = random(8, 5)
    found = lance_jax.layers(apply_fn, params, rest, x)
    fast = lance_jax.compress(apply_fn, networks.factors_of(found, share=1))
    assert len(found) == 2
    assert_equal(jax.jit(fast)(params, rest, x), jax.jit(apply_fn)(params, rest, x))
    got, want = (
        jax.jit(jax.grad(lambda p, f=f: jnp.square(f(p, rest, x)[0]).sum()))(params)
        for f in (fast, apply_fn)
    )
    assert_close(got, want)


@pytest.mark.parametrize("kwargs", [{"train": True}, {"train": False}, {"train": 1, "name": "a"}])
def test_static_keyword_arguments_stay_python_values(kwargs):
    def apply_fn(p, x, *, train, name=None):
        assert isinstance(train, bool | int) and (name is None or isinstance(name, str))
        return (x @ p["w"]) * (2.0 if train else 1.0)

    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    params, x = {"w": random(4, 3)}, random(2, 4)
    assert_equal(fast(params, x, **kwargs), apply_fn(params, x, **kwargs))
    jitted = jax.jit(fast, static_argnames=("train", "name"))
    assert_close(jitted(params, x, **kwargs), apply_fn(params, x, **kwargs))


def test_keyword_arguments_are_differentiable():
    def apply_fn(p, *, x, scale):
        return (x @ p["w"]) * scale

    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 4)}))
    params, x, scale = {"w": random(4, 3)}, random(2, 4), random(3)
    got, want = (
        jax.grad(lambda x, scale, f=f: f(params, x=x, scale=scale).sum(), (0, 1))(x, scale)
        for f in (fast, apply_fn)
    )
    assert_close(got, want)


def test_pytrees_in_and_out():
    def apply_fn(p, data, nothing):
        assert nothing is None
        y = data["x"][0] @ p["w"]
        return {"y": y, "count": data["n"] + 1, "none": None, "static": (jnp.arange(3), [])}

    data = {"x": (random(2, 4), random(1)), "n": jnp.int32(3)}
    params = {"w": random(4, 3)}
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    assert_equal(jax.jit(fast)(params, data, None), jax.jit(apply_fn)(params, data, None))


def test_bf16_activations_with_f32_parameters():
    model = networks.network("raw", "plain")
    params = networks.weights()
    x, _ = networks.batch()

    def apply_fn(params, x):
        half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        return model.apply(half, x.astype(jnp.bfloat16))

    found = lance_jax.layers(apply_fn, params, x)
    assert len(found) == 5  # followed through the casts
    fast = lance_jax.compress(apply_fn, model.factors(networks.bases(1.0)))
    got = jax.jit(fast)(params, x)
    assert got.dtype == jnp.bfloat16
    assert_equal(got, jax.jit(apply_fn)(params, x))

    def loss(f):
        return lambda p, x: (f(p, x).astype(jnp.float32)).sum()

    (got, got_dx), (want, want_dx), (exact, _) = (
        jax.jit(jax.grad(loss(f), (0, 1)))(params, x) for f in (fast, apply_fn, model.apply)
    )
    chex.assert_trees_all_equal_dtypes(got, params)
    assert_equal(got_dx, want_dx)
    for g, w, e in zip(*map(jax.tree.leaves, (got, want, exact)), strict=True):
        # Bases and cores are rounded to bfloat16 too: a few of its steps, as of plain backprop.
        assert jnp.linalg.norm(g - e) <= jnp.linalg.norm(w - e) + 2**-6 * jnp.linalg.norm(e)


def test_module_with_its_own_compute_dtype():
    model = nn.Dense(3, dtype=jnp.bfloat16)
    x = random(4, 6)
    params = model.init(jax.random.key(0), x)["params"]

    def apply_fn(p, x):
        return model.apply({"params": p}, x)

    fast = lance_jax.compress(apply_fn, feature({"kernel": orthonormal(6, 3)}))
    assert_equal(jax.jit(fast)(params, x), jax.jit(apply_fn)(params, x))
    got = jax.jit(jax.grad(lambda p: fast(p, x).astype(jnp.float32).sum()))(params)
    chex.assert_trees_all_equal_dtypes(got, params)


# --- parameters of an equation survive


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_precision_passes_through(precision):
    def apply_fn(p, x):
        y = lax.conv_general_dilated(
            x,
            p["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=precision,
        )
        return jnp.einsum("nwc,co->nwo", y, p["dense"], precision=precision)

    params, x = {"conv": random(3, 4, 5), "dense": random(5, 6)}, random(2, 7, 4)
    fast = lance_jax.compress(
        apply_fn,
        Factors(
            {
                "conv": LayerFactors({"channel": orthonormal(4, 2)}),
                "dense": LayerFactors({"feature": orthonormal(5, 2)}),
            }
        ),
    )
    assert products(fast, params, x) == products(apply_fn, params, x)
    dx = products(jax.grad(lambda x: fast(params, x).sum()), x)
    wanted = {str(eqn[1]) for eqn in products(apply_fn, params, x)}
    assert {name for name, *_ in dx} == {"conv_general_dilated", "dot_general"}
    backward = [eqn for eqn in dx if eqn[1] in wanted]
    assert len(backward) >= 4  # forward and dX of both layers, at the precision asked for


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_preferred_element_type_passes_through(kind):
    def apply_fn(p, x):
        if kind == "dense":
            return lax.dot_general(
                x, p["w"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return lax.conv_general_dilated(
            x,
            p["w"][None],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.float32,
        )

    params, x = {"w": random(8, 5, dtype="bfloat16")}, random(2, 7, 8, dtype="bfloat16")
    mode = {"dense": "feature", "conv": "channel"}[kind]
    fast = lance_jax.compress(
        apply_fn, Factors({"w": LayerFactors({mode: orthonormal(8, 8).astype(jnp.bfloat16)})})
    )
    assert products(fast, params, x) == products(apply_fn, params, x)
    got = jax.jit(fast)(params, x)
    assert got.dtype == jnp.float32
    assert_equal(got, jax.jit(apply_fn)(params, x))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, x) for f in (fast, apply_fn))
    chex.assert_trees_all_equal_dtypes(got, want)
    assert_equal(got_dx, want_dx)
    scale = float(jnp.abs(want["w"].astype(jnp.float32)).max())
    assert_close(
        got["w"].astype("float32"), want["w"].astype("float32"), atol=scale * 2**-5, rtol=0
    )


def test_custom_rules_are_kept():
    @jax.custom_vjp
    def round_through(x):
        return jnp.round(x)

    round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))

    def apply_fn(p, x):
        return round_through(jax.nn.relu(x @ p["w"])) @ p["v"]

    # Zero weights put every relu at its tie.
    params, x = {"w": jnp.zeros((4, 5)), "v": random(5, 3)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"v": orthonormal(5, 5), "w": orthonormal(4, 4)}))
    (got, _), (want, _) = (gradients(f, jnp.sum)(params, x) for f in (fast, apply_fn))
    assert not want["w"].any()  # jax.nn.relu has slope 0 at 0
    assert_close(got, want)

    params["w"] = random(4, 5)
    (got, _), (want, _) = (gradients(f, jnp.sum)(params, x) for f in (fast, apply_fn))
    assert want["w"].any()  # and rounding slope 1 everywhere
    assert_close(got, want)


def test_remat_policy_is_kept():
    policy = jax.checkpoint_policies.dots_saveable

    def apply_fn(p, x):
        return jax.checkpoint(lambda x: jax.nn.relu(x @ p["w"]), policy=policy, prevent_cse=False)(
            x
        )

    params, x = {"w": random(4, 5)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    (eqn,) = [
        eqn for eqn in equations(jax.make_jaxpr(fast)(params, x).jaxpr) if "policy" in eqn.params
    ]
    assert eqn.params["policy"] is policy
    assert eqn.params["prevent_cse"] is False


def test_scan_options_are_kept():
    def apply_fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["w"], reverse=True, unroll=2)

    params, x = {"w": random(4, 3, 3)}, random(2, 3)
    stacked = jnp.stack([orthonormal(3, 3, seed) for seed in range(4)])
    fast = lance_jax.compress(apply_fn, feature({"w": stacked}))
    scans = [
        [
            eqn
            for eqn in equations(jax.make_jaxpr(f)(params, x).jaxpr)
            if eqn.primitive.name == "scan"
        ]
        for f in (fast, apply_fn)
    ]
    assert len(scans[0]) == len(scans[1]) == 1
    for option in ("reverse", "unroll", "length"):
        assert scans[0][0].params[option] == scans[1][0].params[option]
    got, want = (
        gradients(f, lambda y: jnp.square(y[0]).sum())(params, x) for f in (fast, apply_fn)
    )
    assert_close(got, want)


def test_named_scopes_are_kept():
    def apply_fn(p, x):
        with jax.named_scope("encoder_scope"):
            return jax.nn.relu(x @ p["w"])

    params, x = {"w": random(4, 5)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    (product,) = [
        eqn
        for eqn in equations(jax.make_jaxpr(fast)(params, x).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    text = jax.jit(fast).lower(params, x).as_text(debug_info=True)
    assert "encoder_scope" in str(product.source_info.name_stack) or "encoder_scope" in text


def test_effects_are_kept():
    seen = []

    def apply_fn(p, x):
        jax.debug.callback(lambda n: seen.append(float(n)), x.sum())
        return x @ p["w"]

    params, x = {"w": random(4, 5)}, jnp.ones((2, 4))
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    jax.block_until_ready(jax.jit(fast)(params, x))
    jax.effects_barrier()
    assert seen == [8.0]


# --- weights in unusual places


def test_weight_used_twice_and_otherwise():
    """One weight in two products and in a penalty; the penalty's gradient is exact."""

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return (h @ p["w"]).sum() + 0.1 * (p["w"] ** 2).sum()

    params, x, u = {"w": random(4, 4)}, random(3, 4), orthonormal(4, 2)
    fast = lance_jax.compress(apply_fn, feature({"w": u}))
    (got, got_dx), (want, want_dx) = (
        gradients(f, lambda y: y)(params, x) for f in (fast, apply_fn)
    )
    penalty = 0.2 * params["w"]
    assert_close(got["w"] - penalty, u @ u.T @ (want["w"] - penalty))
    assert_close(got_dx, want_dx)


def test_tied_embedding():
    """Looked up exactly, multiplied with compressed: two shares of one gradient."""

    def apply_fn(p, tokens):
        return jnp.tanh(p["table"][tokens].mean(1)) @ p["table"].T

    params, tokens, u = {"table": random(9, 4)}, jnp.arange(6).reshape(3, 2), orthonormal(4, 2)
    (layer,) = lance_jax.layers(apply_fn, params, tokens)
    assert (layer.path, layer.modes) == ("table", {"batch": 3, "feature": 4})
    fast = lance_jax.compress(apply_fn, feature({"table": u}))
    hidden = jnp.tanh(params["table"][tokens].mean(1))
    product = jax.grad(lambda w: (hidden @ w.T).sum())(params["table"])
    (got,), (want,) = (gradients(f, jnp.sum, (0,))(params, tokens) for f in (fast, apply_fn))
    lookup = want["table"] - product
    assert_close(got["table"], lookup + product @ u @ u.T)


def test_recurrent_weight():
    """The same weight at each step of a scan: one factor set, a projected sum."""

    def apply_fn(p, xs):
        def step(h, x):
            h = jnp.tanh(h @ p["h"] + x @ p["x"])
            return h, h

        return lax.scan(step, jnp.zeros((2, 4)), xs)[1]

    params, xs, u = {"h": random(4, 4), "x": random(3, 4)}, random(5, 2, 3), orthonormal(4, 2)
    found = lance_jax.layers(apply_fn, params, xs)
    assert {layer.path for layer in found} == {"h", "x"}
    fast = lance_jax.compress(apply_fn, feature({"h": u}))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, xs) for f in (fast, apply_fn))
    assert_close(got, {"h": u @ u.T @ want["h"], "x": want["x"]})
    assert_close(got_dx, want_dx)


def test_scan_in_scan():
    """Bases of layers stacked twice have two leading axes."""

    def apply_fn(p, x):
        def outer(x, weights):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

        return lax.scan(outer, x, p["w"])[0]

    params, x = {"w": random(2, 3, 4, 4)}, random(2, 4)
    bases = jnp.stack([orthonormal(4, 4, seed) for seed in range(6)]).reshape(2, 3, 4, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": bases}))
    assert_close(gradients(fast)(params, x), gradients(apply_fn)(params, x))


def test_nested_scan_in_cond_in_remat_in_jit():
    @jax.jit
    def stack(params, x):
        def some(x):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        return jax.checkpoint(lambda x: lax.cond(jnp.isfinite(x.sum()), some, jnp.sin, x))(x)

    params, x = {"w": random(3, 4, 4)}, random(2, 4)
    bases = jnp.stack([orthonormal(4, 2, seed) for seed in range(3)])
    fast = lance_jax.compress(stack, feature({"w": bases}))
    assert_equal(jax.jit(fast)(params, x), stack(params, x))

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x

    flat = lance_jax.compress(unrolled, feature({f"w{i}": bases[i] for i in range(3)}))
    got, got_dx = gradients(fast)(params, x)
    want, want_dx = gradients(flat)({f"w{i}": params["w"][i] for i in range(3)}, x)
    assert_close(got["w"], jnp.stack([want[f"w{i}"] for i in range(3)]))
    assert_close(got_dx, want_dx)


def test_branches_with_different_layers():
    def apply_fn(p, index, x):
        branches = [lambda x: x @ p["a"], lambda x: jnp.sin(x @ p["b"]), lambda x: x[:, :3]]
        return lax.switch(index, branches, x)

    params, x, u = {"a": random(4, 3), "b": random(4, 3, seed=1)}, random(2, 4), orthonormal(4, 2)
    assert {layer.path for layer in lance_jax.layers(apply_fn, params, 0, x)} == {"a", "b"}
    fast = lance_jax.compress(apply_fn, feature({"a": u}))
    for index, path in ((0, "a"), (1, "b"), (2, None)):
        got, want = (
            jax.jit(jax.grad(lambda p, f=f, i=index: jnp.square(f(p, i, x)).sum()))(params)
            for f in (fast, apply_fn)
        )
        if path == "a":
            want["a"] = u @ u.T @ want["a"]
        assert_close(got, want)


def test_weight_as_left_operand_and_transposed():
    def apply_fn(p, x):
        return (
            jnp.einsum("oc,nc->on", p["w"], x)
            + (p["v"].T.reshape(3, 2, 2) @ x.reshape(-1, 2, 2).sum(0)).sum()
        )

    def left(p, x):
        return p["w"] @ x.T

    params, x, u = {"w": random(3, 4)}, random(5, 4), orthonormal(4, 2)
    fast = lance_jax.compress(left, feature({"w": u}))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, x) for f in (fast, left))
    assert_close(got["w"], want["w"] @ u @ u.T)
    assert_close(got_dx, want_dx)


def test_attention_kernels():
    x = random(3, 7, 6)
    bases = {
        name: orthonormal(10 if name == "out" else 6, 3, i) for i, name in enumerate(ATTENTION)
    }
    fast = lance_jax.compress(attention, feature(bases))
    assert_equal(jax.jit(fast)(ATTENTION, x), jax.jit(attention)(ATTENTION, x))
    (got, got_dx), (want, want_dx) = (gradients(f)(ATTENTION, x) for f in (fast, attention))
    for name, u in bases.items():
        rows = want[name].reshape(len(u), -1)
        assert_close(got[name], (u @ u.T @ rows).reshape(want[name].shape))
    assert_close(got_dx, want_dx)


def test_weight_that_passes_a_framework_jit_comes_out_as_itself():
    """NNX returns a module's state from its transformations; its next use is the same weight."""

    @jax.jit
    def block(w, x):
        return w, jnp.tanh(x @ w)

    def apply_fn(p, x):
        w, x = block(p["w"], x)
        return x @ w

    params, x, u = {"w": random(4, 4)}, random(3, 4), orthonormal(4, 2)
    (layer,) = lance_jax.layers(apply_fn, params, x)
    assert layer.uses == 2
    fast = lance_jax.compress(apply_fn, feature({"w": u}))
    (got, _), (want, _) = (gradients(f)(params, x) for f in (fast, apply_fn))
    assert_close(got["w"], u @ u.T @ want["w"])


def test_closed_over_values_are_not_layers():
    constant = random(4, 4)

    def apply_fn(p, x):
        return (x @ constant) @ p["w"]

    params, x = {"w": random(4, 3)}, random(2, 4)
    assert [layer.path for layer in lance_jax.layers(apply_fn, params, x)] == ["w"]
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 4)}))
    assert_close(gradients(fast)(params, x), gradients(apply_fn)(params, x))


# --- compress inside and outside of transformations


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


MLP = {"a": random(4, 6), "b": random(6, 3, seed=1)}
MLP_BASES = {"a": orthonormal(4, 2), "b": orthonormal(6, 2)}


def mlp_fast(p, x):
    return lance_jax.compress(mlp, feature(MLP_BASES))(p, x)


def mlp_gradients(p, x):
    """The compressed gradients, written out."""
    hidden = x @ p["a"]
    ua, ub = MLP_BASES["a"], MLP_BASES["b"]
    dy = jnp.ones((len(x), 3))
    dh = jnp.where(hidden > 0, dy @ p["b"].T, 0)
    return {"a": ua @ (ua.T @ x.T @ dh), "b": ub @ (ub.T @ jax.nn.relu(hidden).T @ dy)}


def mlp_loss(p, x):
    return mlp_fast(p, x).sum()


def test_inside_grad():
    x = random(5, 4)
    want = mlp_gradients(MLP, x)
    assert_close(jax.grad(mlp_loss)(MLP, x), want)
    assert_close(jax.jit(jax.grad(mlp_loss))(MLP, x), want)
    _, vjp = jax.vjp(jax.jit(mlp_fast), MLP, x)
    assert_close(vjp(jnp.ones((5, 3)))[0], want)


def test_inside_vmap():
    xs = random(3, 5, 4)
    got = jax.jit(jax.vmap(jax.grad(mlp_loss), (None, 0)))(MLP, xs)
    assert_close(got, jax.vmap(lambda x: mlp_gradients(MLP, x))(xs))
    got = jax.jit(jax.grad(lambda p: jax.vmap(mlp_loss, (None, 0))(p, xs).sum()))(MLP)
    assert_close(got, mlp_gradients(MLP, xs.reshape(15, 4)))


def test_inside_vmap_over_parameters():
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), MLP)
    x = random(5, 4)
    got = jax.jit(jax.vmap(jax.grad(mlp_loss), (0, None)))(members, x)
    assert_close(got, jax.vmap(lambda p: mlp_gradients(p, x))(members))


def test_inside_scan_and_remat():
    xs = random(3, 5, 4)

    @jax.jit
    def train(params):
        def step(params, x):
            grads = jax.grad(jax.checkpoint(mlp_loss))(params, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

        return lax.scan(step, params, xs)[0]

    want = MLP
    for x in xs:
        want = jax.tree.map(lambda p, g: p - 0.1 * g, want, mlp_gradients(want, x))
    assert_close(train(MLP), want)


def test_accumulation_over_a_scan_in_the_loss():
    xs = random(3, 5, 4)

    def loss(params):
        return lax.scan(lambda s, x: (s + mlp_loss(params, x), None), jnp.float32(0), xs)[0]

    assert_close(jax.jit(jax.grad(loss))(MLP), mlp_gradients(MLP, xs.reshape(15, 4)))


def test_inside_cond():
    def loss(p, x):
        return lax.cond(x.sum() > -1e9, mlp_loss, lambda p, x: jnp.float32(0), p, x)

    x = random(5, 4)
    assert_close(jax.jit(jax.grad(loss))(MLP, x), mlp_gradients(MLP, x))


def test_composing():
    x = random(5, 4)
    fast = lance_jax.compress(mlp, feature({"a": MLP_BASES["a"]}))
    fast = lance_jax.compress(fast, feature({"b": MLP_BASES["b"]}))
    assert_equal(jax.jit(fast)(MLP, x), jax.jit(mlp)(MLP, x))
    got = jax.jit(jax.grad(lambda p: fast(p, x).sum()))(MLP)
    assert_close(got, mlp_gradients(MLP, x))


def test_calling_twice():
    fast = lance_jax.compress(mlp, feature(MLP_BASES))
    for x in (random(5, 4), random(5, 4, seed=1), random(2, 4)):
        assert_close(jax.grad(lambda p, x=x: fast(p, x).sum())(MLP), mlp_gradients(MLP, x))


def test_nothing_to_do_is_no_change():
    x = random(5, 4)
    same = lance_jax.compress(mlp, Factors({}), masks=False)
    assert str(jax.make_jaxpr(same)(MLP, x)) == str(jax.make_jaxpr(mlp)(MLP, x))


# --- retraces and lowering


def test_new_factor_values_do_not_retrace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(params, x, factors):
        return jax.grad(lambda p: lance_jax.compress(mlp, factors)(p, x).sum())(params)

    x = random(5, 4)
    for seed in (0, 1):
        bases = {"a": orthonormal(4, 2, seed), "b": orthonormal(6, 2, seed)}
        got = grads(MLP, x, feature(bases))
        u = bases["a"]
        plain = jax.grad(lambda p: mlp(p, x).sum())(MLP)
        assert_close(got["a"], u @ u.T @ plain["a"])


def test_traced_factors_in_scan_and_jit():
    bases = networks.bases(0.5)
    net = networks.network("raw", "scan")
    x, target = networks.batch()
    params = net.pack(networks.weights())

    def grads(params, factors):
        fast = lance_jax.compress(net.apply, factors)
        return jax.grad(lambda p: (fast(p, x) * target).sum())(params)

    factors = net.factors(bases)
    assert_close(net.unpack(jax.jit(grads)(params, factors)), reference_gradients(0.5)[0])


def test_factors_are_arguments_of_the_program_not_constants():
    """A closed-over basis must not be baked in: its text would be in the program."""
    basis = orthonormal(64, 32)
    params, x = {"w": random(64, 3)}, random(2, 64)

    def grads(params, x, factors):
        return jax.grad(lambda p: lance_jax.compress(lambda p, x: x @ p["w"], factors)(p, x).sum())(
            params
        )

    text = jax.jit(grads).lower(params, x, feature({"w": basis})).as_text()
    assert not re.search(r"dense<.{200,}> : tensor<(64x32|32x64)xf32>", text)


@pytest.mark.parametrize("length", [4])
def test_a_jitted_block_is_lowered_once(length):
    @jax.jit
    def block(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    def apply_fn(params, x):
        for i in range(length):
            x = block(params[f"block{i}"], x)
        return x

    params = {
        f"block{i}": {"w": random(4, 6, seed=i), "v": random(6, 4, seed=i)} for i in range(length)
    }
    x = random(2, 4)
    bases = {}
    for i in range(length):
        bases[f"block{i}/w"] = orthonormal(4, 2, seed=i)
        bases[f"block{i}/v"] = orthonormal(6, 3, seed=i)

    def count(f):
        return jax.jit(f).lower(params, x).as_text().count("stablehlo.dot_general")

    fast = lance_jax.compress(apply_fn, feature(bases))
    assert count(fast) == count(apply_fn) == 2

    # And each call still gets the factors of its own layer.
    (got, _), (want, _) = (gradients(f)(params, x) for f in (fast, apply_fn))
    for i in range(length):
        for name in "wv":
            u = bases[f"block{i}/{name}"]
            assert_close(got[f"block{i}"][name], u @ u.T @ want[f"block{i}"][name])


# --- shardings


def two_devices(axis_type=AxisType.Auto):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    return jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])


def test_sharding_constraint_inside():
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))

    def apply_fn(p, x):
        x = lax.with_sharding_constraint(jax.nn.relu(x @ p["a"]), sharding)
        return lax.with_sharding_constraint(x @ p["b"], sharding)

    x = jax.device_put(random(4, 4), sharding)
    fast = lance_jax.compress(apply_fn, feature(MLP_BASES))
    got, want = jax.jit(fast)(MLP, x), jax.jit(apply_fn)(MLP, x)
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    assert len({shard.device for shard in got.addressable_shards}) == 2
    assert_equal(got, want)
    got = jax.jit(jax.grad(lambda p, x: fast(p, x).sum()))(MLP, x)
    assert_close(got, mlp_gradients(MLP, x))


def test_jit_with_shardings_inside():
    """Kept where the body holds no layer; kept, or refused by name, where it does."""
    mesh = two_devices()
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    spread = jax.jit(jnp.sin, in_shardings=rows, out_shardings=rows)
    product = jax.jit(lambda w, x: x @ w, in_shardings=(everywhere, rows), out_shardings=everywhere)

    def untouched(p, x):
        return spread(x @ p["w"])

    def rebuilt(p, x):
        return product(p["w"], x)

    params, x = {"w": random(4, 6)}, random(4, 4)
    fast = lance_jax.compress(untouched, feature({"w": orthonormal(4, 2)}))
    got = jax.jit(fast)(params, x)
    assert got.sharding.is_equivalent_to(rows, got.ndim)

    fast = lance_jax.compress(rebuilt, feature({"w": orthonormal(4, 2)}))
    try:
        got = jax.jit(fast)(params, x)
    except ValueError as error:
        assert "sharding" in str(error)
    else:
        assert got.sharding.is_equivalent_to(everywhere, got.ndim)


def test_sharded_batch_gives_the_same_gradients():
    sharding = NamedSharding(two_devices(AxisType.Auto), PartitionSpec("data"))
    x = random(4, 4)
    got = jax.jit(jax.grad(mlp_loss))(MLP, jax.device_put(x, sharding))
    assert_close(got, mlp_gradients(MLP, x))


# --- bad input


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
        lambda: feature({"encoder/block0/kernel": jnp.ones((3, 4, 2))}),
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
