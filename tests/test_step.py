"""`value_and_grad` in two phases: equal to jax's own, and honest about what lives in between."""

import gc
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

pytestmark = pytest.mark.usefixtures("exact_products")


def random(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(got, want):
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)


# --- losses. Sizes are such that no two arrays of different meaning have as many elements.


def mlp_loss(params, x, target):
    """(7, 11) -> (7, 13) -> (7, 17); linear in the logits, so that the loss keeps nothing."""
    h = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = h @ params["head"]["kernel"] + params["head"]["bias"]
    return (logits * target).sum()


def mlp() -> tuple[Any, Any]:
    params = {
        "hidden": {"kernel": random(11, 13), "bias": random(13, seed=1)},
        "head": {"kernel": random(13, 17, seed=2), "bias": random(17, seed=3)},
    }
    return params, (random(7, 11, seed=4), random(7, 17, seed=5))


MLP_FACTORS = {
    "hidden/kernel": LayerFactors(
        {"feature": networks.orthonormal(np.random.default_rng(0), 11, 4)}
    ),
    "head/kernel": LayerFactors({"feature": networks.orthonormal(np.random.default_rng(0), 13, 5)}),
}


def conv_loss(params, x, target):
    dims = ("NHWC", "HWIO", "NHWC")
    for name, stride in (("stem", 2), ("last", 1)):
        layer = params[name]
        x = lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=dims
        )
        x = jax.nn.relu(x + layer["bias"])
    logits = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def conv_net():
    def layer(*shape, seed):
        return {"kernel": random(*shape, seed=seed) / 5, "bias": random(shape[-1], seed=seed + 1)}

    params = {
        "stem": layer(3, 3, 3, 12, seed=0),
        "last": layer(1, 1, 12, 16, seed=4),
        "head": layer(16, 10, seed=6),
    }
    return params, (random(16, 20, 20, 3, seed=8), jnp.arange(16) % 10)


def scan_loss(params, x, target):
    """Five scanned layers of 13 features on (7, 13)."""

    def step(x, layer):
        return jax.nn.relu(x @ layer["kernel"] + layer["bias"]), None

    x, _ = lax.scan(step, x, params["layers"])
    return ((x @ params["head"]) * target).sum()


def scan_net():
    params = {
        "layers": {"kernel": random(5, 13, 13) / 3, "bias": random(5, 13, seed=1)},
        "head": random(13, 17, seed=2),
    }
    return params, (random(7, 13, seed=3), random(7, 17, seed=4))


def attention_loss(params, x, target):
    """Pre-norm attention and a GELU layer on (5, 9, 12), heads of (12, 3, 8)."""

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

    h = norm(x) * params["scale"]
    q, k, v = (jnp.einsum("ntc,chd->nthd", h, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / math.sqrt(8))
    x = x + jnp.einsum("nhts,nshd,hdc->ntc", weights, v, params["out"])
    x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
    logits = x.mean(1) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()


def attention_net():
    params = {name: random(12, 3, 8, seed=i) / 4 for i, name in enumerate("qkv")}
    params |= {
        "scale": jnp.ones(12),
        "out": random(3, 8, 12, seed=3) / 5,
        "up": random(12, 44, seed=4) / 4,
        "down": random(44, 12, seed=5) / 7,
        "head": random(12, 6, seed=6) / 4,
    }
    return params, (random(5, 9, 12, seed=7), jnp.arange(5))


NETWORKS = {
    "mlp": (mlp_loss, mlp, None),
    "conv": (conv_loss, conv_net, None),
    "scan": (scan_loss, scan_net, 5),
    "attention": (attention_loss, attention_net, None),
}


def factors_for(name, share=0.5, core_dtype=None):
    loss, make, length = NETWORKS[name]
    params, batch = make()
    layers = [layer for layer in lance_jax.layers(loss, params, *batch) if layer.path != "head"]
    return networks.factors_of(layers, share, core_dtype, length)


# --- equal to jax.value_and_grad


@pytest.mark.parametrize(
    ("name", "compressed"),
    [(name, True) for name in NETWORKS] + [("mlp", False), ("conv", False), ("scan", False)],
    ids=lambda value: {True: "compressed", False: "plain"}.get(value, value),
)
def test_equals_jax(name, compressed):
    loss, make, _ = NETWORKS[name]
    params, batch = make()
    if compressed:
        loss = lance_jax.compress(loss, factors_for(name))
    vg = lance_jax.value_and_grad(loss)
    want = jax.jit(jax.value_and_grad(loss))(params, *batch)
    assert_close(vg(params, *batch), want)
    value, saved = vg.forward(params, *batch)
    assert_close((value, vg.backward(saved, params, *batch)), want)


def test_gradient_is_at_the_arguments_given():
    """Nothing of the first call lives on: other parameters and another batch, other gradients."""
    vg = lance_jax.value_and_grad(mlp_loss)
    params, batch = mlp()
    vg(params, *batch)
    params = jax.tree.map(lambda a: a + 0.1, params)
    batch = (batch[0] * 2, batch[1] - 1)
    assert_close(vg(params, *batch), jax.value_and_grad(mlp_loss)(params, *batch))
    smaller = (batch[0][:3], batch[1][:3])
    assert_close(vg(params, *smaller), jax.value_and_grad(mlp_loss)(params, *smaller))


def test_two_steps_in_flight():
    """`saved` holds the state, the object none: phases of two batches may interleave."""
    vg = lance_jax.value_and_grad(mlp_loss)
    params, (x, target) = mlp()
    batches = [(x, target), (x + 1, target * 2)]
    saved = [vg.forward(params, *batch)[1] for batch in batches]
    for one, batch in zip(saved, batches, strict=True):
        want = jax.grad(mlp_loss)(params, *batch)
        assert_close(vg.backward(one, params, *batch), want)


def test_value_that_is_a_residual():
    """exp's output is its own residual, a constant loss has none, an identity keeps its input."""
    for loss in (
        lambda p, x: jnp.exp((p["w"] * x).sum()),
        lambda p, x: (p["w"] * 0 + x).sum(),
        lambda p, x: jnp.float32(3),
        lambda p, x: p["w"][0],
        lambda p, x: (p["w"] * p["w"]).sum(),
    ):
        params, x = {"w": random(4) / 3}, random(4, seed=1)
        assert_close(lance_jax.value_and_grad(loss)(params, x), jax.value_and_grad(loss)(params, x))


def test_auxiliary_output():
    def loss(params, x, target):
        h = jax.nn.relu(x @ params["hidden"]["kernel"])
        aux = {"h": h, "params": params, "x": x, "count": jnp.int32(3), "none": None, "flag": True}
        return (h.sum() * target).sum(), aux

    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = vg(params, x, target)
    (want, want_aux), want_grads = jax.value_and_grad(loss, has_aux=True)(params, x, target)
    assert_close((value, grads), (want, want_grads))
    assert_close(aux, want_aux)
    (value, aux), saved = vg.forward(params, x, target)
    assert_close((value, aux), (want, want_aux))
    assert_close(vg.backward(saved, params, x, target), want_grads)


@pytest.mark.parametrize("train", [True, False])
def test_keyword_arguments(train):
    def loss(params, x, *, target, train, key=None):
        assert train is True or train is False
        if key is not None:
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)
        return mlp_loss(params, x, target)

    params, (x, target) = mlp()
    kwargs = {"target": target, "train": train, "key": jax.random.key(0) if train else None}
    vg = lance_jax.value_and_grad(loss)
    want = jax.value_and_grad(loss)(params, x, **kwargs)
    assert_close(vg(params, x, **kwargs), want)
    value, saved = vg.forward(params, x, **kwargs)
    assert_close((value, vg.backward(saved, params, x, **kwargs)), want)


def test_batch_is_any_pytree():
    def loss(params, batch):
        return mlp_loss(params, batch["image"], batch["more"][0]) * batch["weight"]

    params, (x, target) = mlp()
    batch = {"image": np.asarray(x), "more": (target, None), "weight": 0.5, "id": jnp.arange(7)}
    assert_close(
        lance_jax.value_and_grad(loss)(params, batch), jax.value_and_grad(loss)(params, batch)
    )


def test_inside_jit():
    params, batch = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(mlp_loss, Factors(MLP_FACTORS)))
    assert_close(jax.jit(vg)(params, *batch), vg(params, *batch))

    @jax.jit
    def phases(params, *batch):
        value, saved = vg.forward(params, *batch)
        return value, vg.backward(saved, params, *batch)

    assert_close(phases(params, *batch), vg(params, *batch))


def test_inside_jit_closing_over_a_tracer():
    params, (x, target) = mlp()

    @jax.jit
    def step(params, x, scale):
        return lance_jax.value_and_grad(lambda p, x: mlp_loss(p, x, target) * scale)(params, x)

    want = jax.value_and_grad(lambda p, x: mlp_loss(p, x, target) * 2.0)(params, x)
    assert_close(step(params, x, 2.0), want)


def test_inside_vmap_and_scan():
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)

    def one(x, target):
        return vg(params, x[None], target[None])

    got = jax.jit(jax.vmap(one))(x, target)
    want = jax.vmap(lambda x, t: jax.value_and_grad(mlp_loss)(params, x[None], t[None]))(x, target)
    assert_close(got, want)
    got = jax.jit(lambda: lax.map(lambda batch: one(*batch), (x, target)))()
    assert_close(got, want)


def test_second_call_does_not_retrace():
    traces = 0

    def loss(params, x, target):
        nonlocal traces
        traces += 1
        return mlp_loss(params, x, target)

    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(loss, Factors(MLP_FACTORS)))
    vg(params, x, target)
    first = traces
    assert first > 0
    with jax.log_compiles(False):
        for scale in (2, 3):
            params = jax.tree.map(lambda a, scale=scale: a * scale, params)
            vg(params, x + scale, target)
            _, saved = vg.forward(params, x - scale, target)
            vg.backward(saved, params, x - scale, target)
    assert traces == first


def test_second_call_does_not_compile(caplog):
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)
    steps = [
        (jax.block_until_ready(jax.tree.map(lambda a, i=i: a * i, params)), x * i) for i in (1, 2)
    ]

    def compilations(params, x):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            jax.block_until_ready(vg(params, x, target))
        return [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]

    assert compilations(*steps[0])
    assert compilations(*steps[1]) == []


# --- what is saved


def sizes_of(*trees):
    """Element counts of all arrays, and of the slices of stacked ones."""
    sizes = set()
    for leaf in jax.tree.leaves(trees):
        sizes.add(leaf.size)
        if leaf.ndim > 2:
            sizes.add(leaf.size // leaf.shape[0])
    return sizes - {0, 1}


def saved_of(loss, params, *batch, **options):
    _, saved = lance_jax.value_and_grad(loss, **options).forward(params, *batch)
    return [leaf for leaf in jax.tree.leaves(saved) if hasattr(leaf, "size")]


def nbytes(leaves):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def assert_holds_none_of(saved, *trees):
    """No array of `saved` has as many elements as one of the trees: no copy, cast or transpose."""
    shapes = [leaf.shape for leaf in saved if leaf.size in sizes_of(*trees)]
    assert not shapes, f"saved holds arrays of shapes {shapes}"


def test_saved_holds_no_parameter_and_no_batch():
    params, batch = mlp()
    saved = saved_of(mlp_loss, params, *batch)
    assert_holds_none_of(saved, params, batch)
    assert nbytes(saved) >= 7 * 13 * 4  # and yet the hidden activations


def test_saved_holds_no_factors():
    params, batch = mlp()
    factors = Factors(MLP_FACTORS)
    saved = saved_of(lance_jax.compress(mlp_loss, factors), params, *batch)
    assert_holds_none_of(saved, params, batch, factors)
    # Cores of ranks 4 and 5, and one bit for each hidden unit.
    assert nbytes(saved) == 7 * (4 + 5) * 4 + math.ceil(7 * 13 / 8)


def test_saved_holds_no_factors_with_int8_cores():
    params, batch = mlp()
    factors = Factors(
        {path: LayerFactors(layer.bases, core_dtype="int8") for path, layer in MLP_FACTORS.items()}
    )
    saved = saved_of(lance_jax.compress(mlp_loss, factors), params, *batch)
    assert_holds_none_of(saved, params, batch, factors)
    assert nbytes(saved) == 7 * (4 + 5) + 4 * (4 + 5) + math.ceil(7 * 13 / 8)


def test_saved_holds_nothing_closed_over():
    table = random(17, 19, seed=9)
    offset = random(7, 23, seed=10)
    wide = random(19, 23, seed=11)

    def loss(params, x, target):
        h = jax.nn.relu(x @ params["hidden"]["kernel"])
        z = ((h @ params["head"]["kernel"]) @ table) @ wide
        return (z * offset).sum() + 0 * target.sum()

    params, batch = mlp()
    saved = saved_of(loss, params, *batch)
    assert_holds_none_of(saved, params, batch, table, offset, wide)
    assert_close(
        lance_jax.value_and_grad(loss)(params, *batch), jax.value_and_grad(loss)(params, *batch)
    )


def test_saved_holds_nothing_closed_over_in_numpy():
    table = np.asarray(random(17, 19, seed=9))

    def loss(params, x, target):
        return jnp.square(mlp_logits(params, x) @ table).sum() + 0 * target.sum()

    params, batch = mlp()
    assert_holds_none_of(saved_of(loss, params, *batch), params, batch, table)


def mlp_logits(params, x):
    return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]


def test_saved_holds_no_cast_of_a_parameter():
    """bf16 compute on f32 parameters: the backward pass casts again."""

    def loss(params, x, target):
        half, x, target = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x, target))
        return mlp_loss(half, x, target).astype(jnp.float32)

    params, batch = mlp()
    saved = saved_of(loss, params, *batch)
    assert_holds_none_of(saved, params)
    saved = saved_of(lance_jax.compress(loss, Factors(MLP_FACTORS)), params, *batch)
    assert_holds_none_of(saved, params, batch, Factors(MLP_FACTORS))


def test_saved_holds_no_transpose_of_a_parameter():
    def loss(params, x, target):
        h = jax.nn.relu(x @ params["hidden"].T)
        h = jax.nn.relu(h @ params["square"].reshape(13, 19).T.reshape(13, 19))
        return ((h @ params["head"].swapaxes(0, 1)) * target).sum()

    params = {"hidden": random(13, 11), "square": random(19, 13), "head": random(17, 19)}
    batch = (random(7, 11), random(7, 17))
    assert_holds_none_of(saved_of(loss, params, *batch), params, batch)
    assert_close(
        lance_jax.value_and_grad(loss)(params, *batch), jax.value_and_grad(loss)(params, *batch)
    )


@pytest.mark.parametrize("kind", ["plain", "compressed", "bf16", "remat", "transposed"])
def test_saved_holds_no_scanned_weights(kind):
    params, (x, target) = scan_net()
    x = x[:, None] * jnp.ones((1, 3, 1))  # so that activations have sizes of their own

    def loss(params, x, target):
        def step(x, layer):
            kernel = layer["kernel"]
            if kind == "bf16":
                kernel = kernel.astype(jnp.bfloat16)
            if kind == "transposed":
                kernel = kernel.T
            x = (x.astype(kernel.dtype) @ kernel).astype(jnp.float32)
            return jax.nn.relu(x + layer["bias"]), None

        x, _ = lax.scan(jax.checkpoint(step) if kind == "remat" else step, x, params["layers"])
        return ((x.sum(1) @ params["head"]) * target).sum()

    applied, factors = loss, ()
    if kind == "compressed":
        layers = [x for x in lance_jax.layers(loss, params, x, target) if x.path != "head"]
        factors = networks.factors_of(layers, length=5)
        applied = lance_jax.compress(loss, factors)
    saved = saved_of(applied, params, x, target)
    assert_holds_none_of(saved, params, (x, target), factors)
    vg = lance_jax.value_and_grad(applied)
    want = jax.jit(jax.value_and_grad(applied))(params, x, target)
    got = vg(params, x, target)
    if kind == "bf16":
        chex.assert_trees_all_close(got, want, rtol=2e-2, atol=0.2)
    else:
        assert_close(got, want)


def test_saved_holds_no_parameter_of_a_branch():
    def loss(params, x, target):
        def applied(params, x, target):
            return mlp_loss(params, x, target)

        def other(params, x, target):
            return x.sum() * params["hidden"]["bias"].sum()

        return lax.cond(jnp.isfinite(x.sum()), applied, other, params, x, target)

    params, batch = mlp()
    assert_holds_none_of(saved_of(loss, params, *batch), params, batch)
    vg = lance_jax.value_and_grad(loss)
    assert_close(vg(params, *batch), jax.value_and_grad(loss)(params, *batch))


def test_saved_holds_no_scaled_parameter():
    """A penalty on the weights: its derivative is a matter of the parameters alone."""

    def loss(params, x, target):
        penalty = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
        return mlp_loss(params, x, target) + 0.5 * penalty

    params, batch = mlp()
    assert_holds_none_of(saved_of(loss, params, *batch), params, batch)
    vg = lance_jax.value_and_grad(loss)
    assert_close(vg(params, *batch), jax.value_and_grad(loss)(params, *batch))


def test_saved_holds_no_integer_batch():
    """Token ids are the residual of a lookup, and are passed again."""

    def loss(params, tokens, target):
        rows = params["table"].at[tokens]
        x = rows.get(mode="promise_in_bounds", wrap_negative_indices=False).sum(1)
        return ((x @ params["head"]) * target).sum()

    params = {"table": random(29, 11), "head": random(11, 17)}
    batch = jnp.arange(7 * 5).reshape(7, 5) % 29, random(7, 17, seed=1)
    assert_holds_none_of(saved_of(loss, params, *batch), params, batch)
    vg = lance_jax.value_and_grad(loss)
    assert_close(vg(params, *batch), jax.value_and_grad(loss)(params, *batch))


@pytest.mark.parametrize("made", ["closed over", "inside"])
def test_a_loss_that_closes_over_its_batch_keeps_its_activations(made):
    """Two phases are no rematerialisation: products are not done again."""
    params, (x, target) = mlp()

    def loss(params):
        inputs = x if made == "closed over" else jnp.linspace(-1.0, 1.0, 77).reshape(7, 11)
        return mlp_loss(params, inputs, target)

    saved = saved_of(loss, params)
    assert nbytes(saved) >= 7 * 13 * 4
    assert_holds_none_of(saved, params, target)
    assert_close(lance_jax.value_and_grad(loss)(params), jax.value_and_grad(loss)(params))


def test_saved_is_a_pytree_of_arrays():
    params, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)
    _, saved = vg.forward(params, *batch)
    leaves, structure = jax.tree.flatten(saved)
    again = jax.tree.unflatten(structure, [jnp.copy(leaf) for leaf in leaves])
    assert_close(vg.backward(again, params, *batch), jax.grad(mlp_loss)(params, *batch))


def test_saved_holds_nothing_twice():
    """Two users of one activation, and of two casts of one: each is kept once."""

    def loss(params, x, target):
        h = x @ params["hidden"]["kernel"]
        kernels = params["head"]["kernel"], 2 * params["head"]["kernel"]
        halves = [h.astype(jnp.bfloat16) @ kernel.astype(jnp.bfloat16) for kernel in kernels]
        active = jnp.tanh(h)
        wholes = [active @ kernel for kernel in kernels]
        return ((sum(halves).astype(jnp.float32) + sum(wholes)) * target).sum()

    params, batch = mlp()
    saved = saved_of(loss, params, *batch)
    arrays = [np.asarray(leaf).tobytes() for leaf in saved]
    assert len(set(arrays)) == len(arrays)
    assert sorted(leaf.dtype.name for leaf in saved if leaf.size == 7 * 13)[0] == "bfloat16"


# --- trainable and frozen


TRAINABLE = {
    "regex": "head",
    "anchored regex": "^head/",
    "callable": lambda path: path.startswith("head/"),
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_frozen_layers_cost_nothing(name):
    params, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=TRAINABLE[name])
    value, grads = vg(params, *batch)
    want_value, want = jax.value_and_grad(mlp_loss)(params, *batch)
    assert_close(value, want_value)
    assert_close(grads, {"hidden": {"kernel": None, "bias": None}, "head": want["head"]})
    saved = saved_of(mlp_loss, params, *batch, trainable=TRAINABLE[name])
    assert nbytes(saved) == 7 * 13 * 4  # the head's input alone


def test_bias_only_keeps_masks_only():
    params, batch = mlp()
    loss = lance_jax.compress(mlp_loss, Factors({}))
    vg = lance_jax.value_and_grad(loss, trainable="bias")
    _, grads = vg(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    for layer in params:
        assert grads[layer]["kernel"] is None
        assert_close(grads[layer]["bias"], want[layer]["bias"])
    saved = saved_of(loss, params, *batch, trainable="bias")
    assert nbytes(saved) == math.ceil(7 * 13 / 8)


def test_list_of_expressions():
    params, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=["head/bias", "hidden/k"])
    _, grads = vg(params, *batch)
    assert grads["head"]["kernel"] is None and grads["hidden"]["bias"] is None
    want = jax.grad(mlp_loss)(params, *batch)
    assert_close(grads["hidden"]["kernel"], want["hidden"]["kernel"])
    assert_close(grads["head"]["bias"], want["head"]["bias"])


def test_frozen_suffix_is_passed_through():
    """A trainable first layer below a frozen one: exact gradient, no input of the frozen one."""
    params, batch = mlp()
    vg = lance_jax.value_and_grad(lance_jax.compress(mlp_loss, Factors({})), trainable="hidden")
    _, grads = vg(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    assert_close(grads, {"hidden": want["hidden"], "head": {"kernel": None, "bias": None}})
    _, saved = vg.forward(params, *batch)
    assert nbytes(jax.tree.leaves(saved)) == math.ceil(7 * 13 / 8)


def test_integer_leaves_are_frozen():
    params, batch = mlp()
    params["steps"] = jnp.int32(3)
    params["flags"] = jnp.array([True, False])

    def loss(params, x, target):
        scale = jnp.where(params["flags"][0], params["steps"], 0)
        return mlp_loss(params, x, target) * scale.astype(x.dtype)

    vg = lance_jax.value_and_grad(loss)
    _, grads = vg(params, *batch)
    assert grads["steps"] is None and grads["flags"] is None
    want = jax.grad(mlp_loss)({k: params[k] for k in ("hidden", "head")}, *batch)
    assert_close({k: grads[k] for k in want}, jax.tree.map(lambda a: 3 * a, want))
    trainable, frozen = vg.partition(params)
    assert trainable["steps"] is None and int(frozen["steps"]) == 3


def test_partition_and_merge():
    params, _ = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable="bias$")
    trainable, frozen = vg.partition(params)
    for layer in params:
        assert trainable[layer]["kernel"] is None and frozen[layer]["bias"] is None
        assert trainable[layer]["bias"] is params[layer]["bias"]
        assert frozen[layer]["kernel"] is params[layer]["kernel"]
    merged = vg.merge(trainable, frozen)
    chex.assert_trees_all_equal_structs(merged, params)
    assert all(map(lambda a, b: a is b, jax.tree.leaves(merged), jax.tree.leaves(params)))


def test_partition_of_other_trees():
    """Tuples, named tuples and None among the parameters keep their places."""
    params = {"a": (random(3), None, [random(2)]), "b": random(2)}
    vg = lance_jax.value_and_grad(lambda p: p["b"].sum() + p["a"][0].sum(), trainable="a/0")
    trainable, frozen = vg.partition(params)
    assert jax.tree.map(jnp.shape, trainable) == {"a": ((3,), None, [None]), "b": None}
    chex.assert_trees_all_equal(vg.merge(trainable, frozen), params)
    _, grads = vg(params)
    assert_close(grads, {"a": (jnp.ones(3), None, [None]), "b": None})


def test_nnx_state():
    import flax.nnx as nnx

    model = nnx.Sequential(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state)(x)).sum()

    x = random(6, 4)
    vg = lance_jax.value_and_grad(loss, trainable="1/kernel")
    _, grads = vg(state, x)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    }
    (path,) = leaves
    assert "1/kernel" in path
    want = jax.grad(loss)(state, x)
    kernel = [leaf for leaf in jax.tree.leaves(want) if leaf.shape == (5, 3)]
    assert_close(leaves[path], kernel[0])
    trainable, frozen = vg.partition(state)
    chex.assert_trees_all_equal(vg.merge(trainable, frozen), state)


@pytest.mark.parametrize("optimiser", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.01)])
@jax.numpy_dtype_promotion("standard")  # optax mixes counts with floats
def test_optax(optimiser):
    """Three steps equal to those of jax.grad in the trainable leaves alone; the rest stays."""
    start, batch = mlp()
    vg = lance_jax.value_and_grad(mlp_loss, trainable=["head", "hidden/bias"])

    @jax.jit
    def update(trainable, grads, state):
        updates, state = optimiser.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, frozen = vg.partition(start)
    state = optimiser.init(trainable)
    sizes = {leaf.size for leaf in jax.tree.leaves(state)}
    assert 11 * 13 not in sizes and 13 * 17 in sizes  # no state of the frozen kernel
    params = start
    for _ in range(3):
        _, grads = vg(params, *batch)
        trainable, state = update(trainable, grads, state)
        params = vg.merge(trainable, frozen)

    def rival(subset):
        return mlp_loss(
            {
                "hidden": {"kernel": start["hidden"]["kernel"], "bias": subset["b"]},
                "head": subset["h"],
            },
            *batch,
        )

    subset: Any = {"b": start["hidden"]["bias"], "h": start["head"]}
    state = optimiser.init(subset)
    for _ in range(3):
        updates, state = optimiser.update(jax.grad(rival)(subset), state, subset)
        subset = optax.apply_updates(subset, updates)
    assert_close(params["hidden"]["bias"], subset["b"])
    assert_close(params["head"], subset["h"])
    chex.assert_trees_all_equal(params["hidden"]["kernel"], start["hidden"]["kernel"])


def test_compressed_and_frozen():
    """Factors of a frozen layer cost nothing: its core is not kept."""
    params, batch = mlp()
    loss = lance_jax.compress(mlp_loss, Factors(MLP_FACTORS))
    saved = saved_of(loss, params, *batch, trainable="head")
    assert nbytes(saved) == 7 * 5 * 4
    _, grads = lance_jax.value_and_grad(loss, trainable="head")(params, *batch)
    want = jax.grad(mlp_loss)(params, *batch)
    u = MLP_FACTORS["head/kernel"].bases["feature"]
    assert_close(grads["head"]["kernel"], u @ u.T @ want["head"]["kernel"])
    assert_close(grads["head"]["bias"], want["head"]["bias"])


# --- bytes held are bytes reported


def live_bytes():
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conv", {}),
        ("conv", {"core_dtype": "int8"}),
        ("conv", {"core_dtype": "int4"}),
        ("scan", {}),
        ("scan", {"core_dtype": "int8"}),
        ("scan", None),
        ("attention", {}),
        ("attention", None),
    ],
    ids=lambda value: value if isinstance(value, str) else str((value or {}).get("core_dtype")),
)
def test_bytes_held_are_bytes_reported(name, options):
    loss, make, _ = NETWORKS[name]
    params, batch = make()
    factors = Factors({}) if options is None else factors_for(name, **options)
    vg = lance_jax.value_and_grad(lance_jax.compress(loss, factors))
    jax.block_until_ready(vg(params, *batch))  # constants of the programs are made once

    before = live_bytes()
    value, saved = jax.block_until_ready(vg.forward(params, *batch))
    held = live_bytes() - before - value.nbytes
    reported = lance_jax.report(loss, params, *batch, factors=factors).saved_bytes.total
    assert held > 0
    assert abs(held - reported) <= 0.01 * reported, (held, reported)

    jax.block_until_ready(vg.backward(saved, params, *batch))
    del saved, value
    assert live_bytes() <= before  # and nothing lives on


def test_bytes_held_with_frozen_layers():
    params, batch = conv_net()
    trainable = ["last", "head"]
    factors = factors_for("conv")
    vg = lance_jax.value_and_grad(lance_jax.compress(conv_loss, factors), trainable=trainable)
    jax.block_until_ready(vg.forward(params, *batch))
    before = live_bytes()
    value, saved = jax.block_until_ready(vg.forward(params, *batch))
    held = live_bytes() - before - value.nbytes
    report = lance_jax.report(conv_loss, params, *batch, factors=factors, trainable=trainable)
    assert abs(held - report.saved_bytes.total) <= 0.01 * held
    everything = lance_jax.report(conv_loss, params, *batch, factors=factors)
    assert report.saved_bytes.total < everything.saved_bytes.total
    del saved


# --- bad input


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ("hiden/kernel", ["hiden/kernel", "hidden/kernel"]),
        (["head", "hiden/kernel"], ["hiden/kernel", "hidden/kernel"]),
        (lambda path: False, ["trainable"]),
        ([], ["trainable"]),
        ("(", ["("]),
        (3, ["3"]),
    ],
    ids=["matches nothing", "one of two", "callable", "empty", "no expression", "number"],
)
def test_bad_trainable(trainable, words):
    params, batch = mlp()
    with pytest.raises(ValueError) as caught:
        lance_jax.value_and_grad(mlp_loss, trainable=trainable)(params, *batch)
    for word in words:
        assert word in str(caught.value)


def test_bad_losses():
    params, batch = mlp()
    for loss, has_aux, words in (
        (lambda p, x, t: x @ p["hidden"]["kernel"], False, "(7, 13)"),
        (lambda p, x, t: (x * 0).astype(jnp.int32).sum(), False, "int32"),
        (lambda p, x, t: (p["head"]["bias"].sum(), 3), False, "has_aux"),
        (lambda p, x, t: p["head"]["bias"].sum(), True, "has_aux"),
    ):
        with pytest.raises(ValueError) as caught:
            lance_jax.value_and_grad(loss, has_aux=has_aux)(params, *batch)
        assert words in str(caught.value)


def test_saved_of_other_arguments():
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)
    _, saved = vg.forward(params, x, target)
    with pytest.raises(ValueError, match="saved"):
        vg.backward(saved, params, x[:3], target[:3])


def test_no_floating_parameter():
    with pytest.raises(ValueError, match="float"):
        lance_jax.value_and_grad(lambda p: jnp.float32(0))({"n": jnp.int32(3)})
