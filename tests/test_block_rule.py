"""Blocks recomputed from their cores: their gradients, what they keep, and what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from block_networks import (
    BLOCKED,
    BLOCKS,
    block_inputs,
    blocked,
    loss_of,
    reference_gradients,
)
from helpers import assert_close, assert_equal, equations, orthonormal, random
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

DTYPES = [None, "bfloat16", "int8"]


def drawn_bases(net, share, modes=None):
    """Bases of one block for each of its modes but the batch."""
    shape = net.before(net.params, net.x).shape
    found = lance_jax.layers(blocked(net), net.params, net.x)
    block = next(layer for layer in found if layer.kind == "block")
    axes = {mode: i for i, mode in enumerate(block.modes) if mode != "batch"}
    ranks = {mode: max(1, round(share * shape[axis])) for mode, axis in axes.items()}
    return {mode: orthonormal(shape[axes[mode]], r, axes[mode]) for mode, r in ranks.items()}


def factors(net, bases, core_dtype=None):
    if net.scanned:
        bases = {mode: jnp.stack([u] * BLOCKS) for mode, u in bases.items()}
    return Factors({name: LayerFactors(bases, core_dtype=core_dtype) for name in net.names()})


def gradient(net, apply_fn):
    return jax.jit(jax.grad(loss_of(apply_fn)))(net.params, net.x)


def expanded(x, bases, core_dtype=None):
    """x from its core on the bases of its axes, in float64; the first is the batch."""
    core = _along_axes(np.asarray(x, np.float64), bases, lambda u: u)
    return _along_axes(reference.stored(core, core_dtype), bases, lambda u: u.T)


def _along_axes(x, bases, matrix):
    for axis, u in enumerate(bases.values(), 1):
        one = matrix(np.asarray(u, np.float64))
        x = np.moveaxis(np.tensordot(x, one, (axis, 0)), -1, axis)
    return x


@pytest.mark.parametrize("core_dtype", DTYPES)
def test_the_head_takes_in_the_loss(core_dtype):
    """Of the logits nothing is kept, and the loss's gradients are those at the core's X^."""
    labels = jnp.arange(12) % 50
    params, x = (
        {"layer": random(7, 6), "head": {"kernel": random(6, 50, seed=1)}},
        random(12, 7, seed=2),
    )

    def of_head(head, hidden):
        shares = jax.nn.log_softmax(hidden @ head["kernel"])
        return -jnp.take_along_axis(shares, labels[:, None], 1).mean()

    def loss(params, x):
        return of_head(params["head"], jnp.tanh(x @ params["layer"]))

    in_blocks = lance_jax.blocks(loss, "head")
    own = Factors({"head": LayerFactors({}, core_dtype=core_dtype)})
    fast = lance_jax.compress(in_blocks, own)
    vg = lance_jax.value_and_grad(fast, trainable="head")
    value, saved = vg.forward(params, x)
    np.testing.assert_array_equal(value, lance_jax.value_and_grad(loss).forward(params, x)[0])
    report = lance_jax.report(in_blocks, params, x, factors=own, trainable="head")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(saved))
    assert held == report.saved_bytes.total <= 4 * 12 * 6 + 4 < 4 * 12 * 50

    hidden = np.asarray(jnp.tanh(x @ params["layer"]), np.float32)
    at = hidden if core_dtype is None else reference.stored(hidden, core_dtype)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda a: jnp.asarray(a, "float64"), (params["head"], at))
        want = jax.tree.map(jnp.float32, jax.grad(of_head)(*exact))
    assert_close(vg(params, x)[1]["head"], want)


@pytest.mark.parametrize("name", BLOCKED)
def test_forward_is_bit_identical(name):
    net = BLOCKED[name]
    for core_dtype in DTYPES:
        fast = lance_jax.compress(blocked(net), factors(net, drawn_bases(net, 0.5), core_dtype))
        for apply in (lambda f: f, jax.jit):
            assert_equal(apply(fast)(net.params, net.x), apply(net.plain)(net.params, net.x))


@pytest.mark.parametrize("name", BLOCKED)
def test_whole_inputs_are_a_checkpoint(name):
    """With neither bases nor a smaller dtype: the same bits, one operation after another.

    In one program the compiler fuses differently what it merges, and rounds differently.
    """
    net = BLOCKED[name]
    fast = lance_jax.compress(blocked(net), factors(net, {}), masks=False)
    got, want = (jax.grad(loss_of(f))(net.params, net.x) for f in (fast, blocked(net)))
    assert_equal(got, want)
    assert_close(gradient(net, fast), want)


@pytest.mark.parametrize("name", BLOCKED)
def test_full_bases_are_a_checkpoint_to_rounding(name):
    net = BLOCKED[name]
    fast = lance_jax.compress(blocked(net), factors(net, drawn_bases(net, 1.0)))
    assert_close(gradient(net, fast), gradient(net, net.plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BLOCKED)
def test_gradients_are_those_at_the_expanded_core(name):
    net = BLOCKED[name]
    bases = drawn_bases(net, 0.6)
    fast = lance_jax.compress(blocked(net), factors(net, bases))
    want = reference_gradients(net, lambda x, i: expanded(x, bases))
    got = gradient(net, fast)
    assert_close(got, jax.tree.map(jnp.float32, want), rtol=1e-3, atol=1e-4)
    # or the test could not tell the core from the input
    exact = reference_gradients(net, lambda x, i: x)
    name = net.names()[0]
    for one, other in zip(*map(jax.tree.leaves, (want[name], exact[name])), strict=True):
        assert np.abs(one - other).max() > 0.01 * np.abs(other).max()


@pytest.mark.parametrize(
    ("name", "core_dtype"),
    [
        *(("convolution", dtype) for dtype in ("bfloat16", "int8", "int4")),
        *((name, "int8") for name in BLOCKED if name != "convolution"),
    ],
)
@pytest.mark.parametrize("share", [None, 0.6])
def test_gradients_are_those_at_the_stored_core(name, core_dtype, share):
    net = BLOCKED[name]
    bases = {} if share is None else drawn_bases(net, share)
    fast = lance_jax.compress(blocked(net), factors(net, bases, core_dtype))
    inputs = block_inputs(net, net.params, net.x)
    stored = [expanded(x, bases, core_dtype) for x in inputs]
    want = reference_gradients(net, lambda x, i: jnp.asarray(stored[i], "float64"))
    got = gradient(net, fast)
    assert_close(got, jax.tree.map(jnp.float32, want), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", BLOCKED)
def test_error_falls_with_rank_and_bits(name):
    net = BLOCKED[name]
    exact = gradient(net, net.plain)

    def error(bases, core_dtype):
        got = gradient(net, lance_jax.compress(blocked(net), factors(net, bases, core_dtype)))
        pairs = zip(*map(jax.tree.leaves, (got, exact)), strict=True)
        return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs)))

    by_bits = [error({}, core_dtype) for core_dtype in ("int4", "int8", None)]
    assert by_bits[0] > by_bits[1] > by_bits[2]
    by_rank = []
    for energy in (0.3, 0.9, 1.0):
        pattern = [f"^{name}$" for name in net.names()]
        own = lance_jax.calibrate(blocked(net), net.params, [net.x], select=pattern, energy=energy)
        got = gradient(net, lance_jax.compress(blocked(net), own))
        pairs = zip(*map(jax.tree.leaves, (got, exact)), strict=True)
        by_rank.append(float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))))
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[0] > 2 * by_rank[-1]


@pytest.mark.parametrize("core_dtype", [*DTYPES, "int4"])
@pytest.mark.parametrize("name", BLOCKED)
def test_nothing_but_cores_is_kept(name, core_dtype):
    net = BLOCKED[name]
    bases = drawn_bases(net, 0.5)
    fast = lance_jax.compress(blocked(net), factors(net, bases, core_dtype))
    vg = lance_jax.value_and_grad(loss_of(fast), trainable="^block")
    _, saved = vg.forward(net.params, net.x)
    shape = net.before(net.params, net.x).shape
    core = (shape[0], *(u.shape[-1] for u in bases.values()))
    data = reference.stored_arrays(core, core_dtype)
    stacked = [((BLOCKS, *shape), dtype) for shape, dtype in data]
    want = stacked if net.scanned else data * BLOCKS
    outside = [((4, 3), "float32")]  # the logits, for the loss
    got = [(leaf.shape, str(leaf.dtype)) for leaf in saved]
    assert sorted(got) == sorted(want + outside)


def convolutions(text):
    return len(re.findall(r" convolution\(|__cudnn\$conv", text))


def products(text):
    return len(re.findall(r" dot\(|__cublas\$gemm|gemm_fusion_dot", text))


def optimised(function, *args):
    """The compiled program, optimised as a user's is."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(function).lower(*args).compile(compiler_options=options).as_text()


def test_the_compiler_does_not_merge_the_recomputed_forward_with_the_first():
    """Neither in the second phase nor in one program.

    Where what is kept is exact it could: XLA's CPU compiler does so with that of `jax.checkpoint`.
    """
    net = BLOCKED["residual"]
    forward, backward = 1 + 2 * BLOCKS, 2 * 2 * BLOCKS + 1  # of the stem dW alone
    again = 2 * BLOCKS

    def count(function, *args):
        return convolutions(optimised(function, *args))

    assert count(jax.grad(loss_of(net.plain)), net.params, net.x) == forward + backward
    for core_dtype in (None, "int8"):
        fast = lance_jax.compress(blocked(net), factors(net, {}, core_dtype))
        vg = lance_jax.value_and_grad(loss_of(fast))
        _, saved = vg.forward(net.params, net.x)
        assert count(vg.backward, saved, net.params, net.x) == again + backward
        whole = count(jax.grad(loss_of(fast)), net.params, net.x)
        assert whole == forward + again + backward


# --- what else goes in and out -------------------------------------------------------------------

W = random(5, 5) / 3


@pytest.mark.parametrize("statistics_first", [False, True])
def test_a_block_with_statistics_is_not_merged_with_the_first_pass(statistics_first):
    """Their cotangents are zeros, which the compiler knows."""

    def apply(params, x):
        def block(w, x):
            h = jnp.sin(x @ w)
            outs = jnp.cos(h @ w), lax.stop_gradient(h.mean(0))
            return outs[::-1] if statistics_first else outs

        for name in ("block0", "block1"):
            outs = jax.checkpoint(block)(params[name]["w"], x)
            x = outs[statistics_first]
        return jnp.sin(x).sum(), outs[1 - statistics_first]

    params = {"block0": {"w": W}, "block1": {"w": W + 1}}
    fast = lance_jax.compress(apply, {name: LayerFactors({}) for name in params})
    text = optimised(jax.grad(fast, has_aux=True), params, jnp.sin(random(4, 5)))
    # forward, again, and of each product dx and dW; no dx of the arguments
    assert products(text) == 4 + 4 + 8 - 1


def test_a_cotangent_that_overflows_spoils_no_other_sample():
    net = BLOCKED["residual"]
    fast = lance_jax.compress(blocked(net), factors(net, {}))
    ys, vjp = jax.vjp(lambda x: fast(net.params, x), net.x)
    dx = vjp(jnp.ones_like(ys).at[0].set(jnp.inf))[0]
    assert jnp.isfinite(dx[1:]).all() and not jnp.isfinite(dx[0]).all()


def test_there_are_no_second_derivatives():
    """Silently wrong they would be."""
    net = BLOCKED["residual"]
    layer = lance_jax.compress(net.plain, {"block1/conv1": LayerFactors({})})
    for fast in (lance_jax.compress(blocked(net), factors(net, {})), layer):
        grad = jax.grad(loss_of(fast))
        tangent = jax.tree.map(jnp.ones_like, net.params)

        def squares(p, g=grad):
            return sum((a**2).sum() for a in jax.tree.leaves(g(p, net.x)))

        for second in (
            lambda g=grad, t=tangent: jax.jvp(lambda p: g(p, net.x), (net.params,), (t,)),
            lambda s=squares: jax.grad(s)(net.params),
            lambda s=squares: jax.grad(jax.jit(s))(net.params),
        ):
            with pytest.raises(ValueError, match="a compressed function has first derivatives al"):
                second()


def test_under_vmap():
    net = BLOCKED["residual"]
    one_by_one = lance_jax.compress(blocked(net), factors(net, {}, "bfloat16"))

    def mapped(apply_fn):
        def loss(params, xs):
            each = jax.vmap(lambda x: apply_fn(params, x[None])[0])(xs)
            return jnp.sum(jnp.sin(each))

        return jax.grad(loss)(net.params, net.x)

    assert_close(mapped(one_by_one), gradient(net, one_by_one), rtol=1e-3, atol=1e-3)


def test_an_ensemble_has_the_gradients_of_its_members():
    net = BLOCKED["transformer"]
    fast = lance_jax.compress(blocked(net), factors(net, drawn_bases(net, 0.5), "bfloat16"))
    members = [jax.tree.map(lambda leaf, i=i: leaf * (1 + i / 9), net.params) for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    got = jax.jit(jax.vmap(jax.grad(loss_of(fast)), (0, None)))(stacked, net.x)
    want = [jax.grad(loss_of(fast))(member, net.x) for member in members]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", BLOCKED)
def test_in_float64(name):
    net = BLOCKED[name]
    bases = drawn_bases(net, 0.6)
    want = reference_gradients(net, lambda x, i: expanded(x, bases))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (net.params, net.x))
        own = factors(net, {mode: jnp.asarray(u, "float64") for mode, u in bases.items()})
        got = jax.grad(loss_of(lance_jax.compress(blocked(net), own)))(*double)
        assert_close(jax.device_get(got), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKED)
def test_in_micro_batches(name):
    """Cores in bfloat16, in which each value is stored on its own."""
    net = BLOCKED[name]
    own = factors(net, drawn_bases(net, 0.5), "bfloat16")
    fast = lance_jax.compress(blocked(net), own)

    def mean(params, x):
        return jnp.sin(fast(params, x)).mean()

    want = lance_jax.value_and_grad(mean)(net.params, net.x)
    for size in (2, 1):
        parts = lance_jax.value_and_grad(mean, micro_batch=size)
        assert_close(parts(net.params, net.x), want, rtol=1e-3, atol=1e-5)


def test_in_a_branch():
    net = BLOCKED["convolution"]

    def apply(params, x):
        return lax.cond(x.sum() > 1e9, net.plain, lambda p, x: net.plain(p, -x), params, x)

    inside = lance_jax.blocks(apply, net.pattern)
    names = [f"{name}{n}" for n in ("", ":2") for name in net.names()]
    kept = Factors({name: LayerFactors({}, core_dtype="int8") for name in names})
    got = jax.jit(jax.grad(loss_of(lance_jax.compress(inside, kept))))(net.params, net.x)
    own = lance_jax.compress(blocked(net), factors(net, {}, "int8"))
    assert_close(got, jax.jit(jax.grad(loss_of(own)))(net.params, -net.x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_activations_stay_so(dtype):
    net = BLOCKED["residual"]
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (net.params, net.x))
    fast = lance_jax.compress(blocked(net), factors(net, drawn_bases(net, 0.5), "int8"))
    grads = jax.grad(lambda p, x: fast(p, x).sum())(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    assert_equal(fast(params, x), net.plain(params, x))


# --- the layers inside ---------------------------------------------------------------------------


def test_factors_of_the_layers_inside_hold_in_the_recomputed_block():
    net = BLOCKED["residual"]
    inner = {
        f"{name}/{layer}": LayerFactors({"channel": orthonormal(8, 3, seed)})
        for seed, name in enumerate(net.names())
        for layer in ("conv1", "conv2")
    }
    both = Factors({**factors(net, {}), **inner})
    got = gradient(net, lance_jax.compress(blocked(net), both))
    want = gradient(net, lance_jax.compress(net.plain, Factors(inner)))
    assert_close(got, want)


def test_masks_are_packed_in_the_recomputed_block():
    """The backward pass packs them with `masks`, and without it does not."""
    net = BLOCKED["residual"]

    def packed(masks):
        fast = lance_jax.compress(blocked(net), factors(net, {}), masks=masks)
        jaxpr = jax.make_jaxpr(jax.grad(loss_of(fast), 0))(net.params, net.x).jaxpr
        return sum(eqn.outvars[0].aval.dtype == jnp.uint8 for eqn in equations(jaxpr))

    assert packed(True) > 0
    assert packed(False) == 0
