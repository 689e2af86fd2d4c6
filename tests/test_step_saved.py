"""What `value_and_grad` keeps between its phases: nothing that is at hand, and what is reported."""

import gc
import math

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from helpers import assert_close, nbytes, random, saved_of
from jax import lax
from losses import MLP_FACTORS, NETWORKS, conv_loss, conv_net, factors_for, mlp, mlp_loss, scan_net

import lance_jax
from lance_jax import Factors, LayerFactors

pytestmark = pytest.mark.usefixtures("exact_products")


# --- what is saved


def sizes_of(*trees):
    """Element counts of all arrays, and of the slices of stacked ones."""
    sizes = set()
    for leaf in jax.tree.leaves(trees):
        sizes.add(leaf.size)
        if leaf.ndim > 2:
            sizes.add(leaf.size // leaf.shape[0])
    return sizes - {0, 1}


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
    # Values; two bounds for each of 1 and 2 groups; the range of the bounds of each core; masks.
    assert nbytes(saved) == 7 * (4 + 5) + 2 * (1 + 2) + 2 * 8 + math.ceil(7 * 13 / 8)


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
        half, whole = halves[0] + halves[1], wholes[0] + wholes[1]
        return ((half.astype(jnp.float32) + whole) * target).sum()

    params, batch = mlp()
    saved = saved_of(loss, params, *batch)
    arrays = [np.asarray(leaf).tobytes() for leaf in saved]
    assert len(set(arrays)) == len(arrays)
    assert sorted(leaf.dtype.name for leaf in saved if leaf.size == 7 * 13)[0] == "bfloat16"


# --- forms in which residuals reach the backward phase


def recurrent(p, x, reverse=False):
    def step(h, x):
        h = jnp.tanh(h @ p["square"].T * x)
        return h, h

    return lax.scan(step, jnp.ones((3, 7)), x, reverse=reverse)[1].sum(0)


def stacked(p, x, layer):
    return lax.scan(lambda h, w: (layer(h, w), None), x[0], p["stack"])[0]


# Forms in which parameters and batch reach the backward pass laid out anew, sliced or stacked.
FORMS = {
    "recurrent": recurrent,
    "recurrent, reverse": lambda p, x: recurrent(p, x[::-1], reverse=True),
    "weights transposed in scan": lambda p, x: stacked(p, x, lambda h, w: jnp.tanh(h @ w.T)),
    "jit in scan": lambda p, x: stacked(p, x, jax.jit(lambda h, w: jnp.tanh(h @ w.T))),
    "vmap in scan": lambda p, x: stacked(p, x, jax.vmap(lambda r, w: jnp.tanh(w @ r), (0, None))),
    "remat in scan": lambda p, x: stacked(p, x, jax.checkpoint(lambda h, w: jnp.tanh(h @ w))),
    "cond in scan": lambda p, x: stacked(
        p, x, lambda h, w: lax.cond(h[0, 0] > 0, lambda h: jnp.sin(h @ w.T), jnp.cos, h)
    ),
    "scan in scan": lambda p, x: lax.scan(
        lambda h, x: (stacked(p, h[None] * x, lambda h, w: jnp.tanh(h @ w.T)), None), x[0], x
    )[0],
    "weights out of scan": lambda p, x: (
        lax.scan(lambda h, w: (jnp.sin(h @ w), w.T), x[0], p["stack"])[1].sum(0)[:3] * x[0]
    ),
    "cond": lambda p, x: lax.cond(
        x[0, 0, 0] < 99, lambda x: jnp.tanh(x @ p["square"].T), jnp.sin, x[0]
    ),
    "switch": lambda p, x: lax.switch(
        1, [jnp.sin, lambda x: x @ p["square"], lambda x: jnp.exp(x @ p["square"].T)], x[0]
    ),
    "indexed": lambda p, x: jnp.tanh(x[1] @ p["stack"][2]) @ p["stack"][:, 0, :].T @ p["wide"].T,
    "products of weights": lambda p, x: x[0] @ lax.associative_scan(jnp.matmul, p["stack"])[-1],
    "broadcast": lambda p, x: (jnp.broadcast_to(p["scale"], x.shape) * x * p["square"][0]).sum(0),
    "batch alone": lambda p, x: (x * x * p["scale"]).sum(0),
}


@pytest.mark.parametrize(
    ("name", "trainable"),
    [(name, None) for name in FORMS]
    + [(name, "s(quare|cale)") for name in ("recurrent", "cond in scan", "switch", "indexed")],
)
def test_forms_of_residuals(name, trainable):
    """Gradients are jax's, with and without frozen leaves; bytes are those reported."""
    params = {
        "stack": random(5, 7, 7) / 3,
        "square": random(7, 7, seed=1) / 3,
        "wide": random(7, 5, seed=2),
        "scale": jnp.float32(1.5),
    }
    x = random(5, 3, 7, seed=3)

    def loss(params, x):
        y = FORMS[name](params, x)
        return (y * jnp.cos(y)).sum()

    _, want = jax.jit(jax.value_and_grad(loss))(params, x)
    if trainable is not None:
        want |= {"stack": None, "wide": None}
    vg = lance_jax.value_and_grad(loss, trainable=trainable)
    _, grads = vg(params, x)
    chex.assert_trees_all_equal_structs(grads, want)
    chex.assert_trees_all_close(grads, want, rtol=1e-4, atol=1e-4)

    vg = lance_jax.value_and_grad(lance_jax.compress(loss, Factors({})), trainable=trainable)
    shapes = jax.eval_shape(vg.forward, params, x)[1]
    report = lance_jax.report(loss, params, x, trainable=trainable)
    assert report.saved_bytes.total == nbytes(jax.tree.leaves(shapes))


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


@pytest.mark.parametrize("constant", [jnp.ones, lambda shape: jnp.full(shape, 0.5)])
def test_saved_holds_no_constant_array(constant):
    """A scalar that is broadcast to a residual is broadcast again."""

    def loss(params, x):
        return ((x @ params["w"]) * constant((7, 11))).sum()

    vg = lance_jax.value_and_grad(loss)
    batch = {"w": jnp.ones((5, 11))}, jnp.ones((7, 5))
    assert vg.forward(*batch)[1] == ()
    assert (vg(*batch)[1]["w"] == jax.grad(loss)(*batch)["w"]).all()
