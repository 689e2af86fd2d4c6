"""What enters a block, how calibration sees it, and what a block refuses."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from block_networks import BLOCKED, BLOCKS, block_inputs, blocked, loss_of
from calibration import assert_bases
from helpers import assert_close, assert_equal, orthonormal, random, saved_of

import lance_jax
from lance_jax import LayerFactors

W = random(5, 5) / 3


def test_a_block_of_integers_keeps_nothing():
    """An embedding enters by its tokens alone."""

    def apply(params, tokens):
        return jax.checkpoint(lambda p, t: jnp.sin(p["table"][t]) @ p["w"])(params["e"], tokens)

    params = {"e": {"table": random(7, 5), "w": W}}
    tokens = jnp.array([[1, 2], [3, 6]])
    block, *_ = lance_jax.layers(apply, params, tokens)
    assert (block.path, block.inputs, dict(block.modes)) == ("e", (), {})
    own = lance_jax.calibrate(apply, params, [tokens])
    loss = loss_of(lance_jax.compress(apply, own))
    _, saved = lance_jax.value_and_grad(loss).forward(params, tokens)
    assert [leaf.shape for leaf in saved] == [(2, 2, 5)]  # the output, for the loss
    assert_close(jax.grad(loss)(params, tokens), jax.grad(loss_of(apply))(params, tokens))


def test_a_number_for_each_sample_is_not_projected():
    """Such as the time of a step of diffusion: its order in the batch is another each time."""

    def apply(params, x, t):
        def block(w, x, t):
            return jnp.sin(x @ w) * t[:, None]

        return jax.checkpoint(block)(params["a"]["w"], x * params["b"], t + params["c"]).sum()

    params, x, t = {"a": {"w": W}, "b": random(5), "c": 1.0}, random(8, 5), random(8)
    own = lance_jax.calibrate(apply, params, [(x, t), (x[:3], t[:3])], energy=1.0)
    assert set(own["a"].bases) == {"0.feature"}
    grads = jax.grad(lance_jax.compress(apply, own))(params, x, t[::-1])
    assert_close(grads, jax.grad(apply)(params, x, t[::-1]))


def test_what_enters_must_be_the_same_in_all_batches():
    def apply(params, x):
        x = x @ params["w"]
        enter = (jnp.sin(x), jnp.cos(x)) if x.shape[1] > 4 else (jnp.sin(x),)
        block = jax.checkpoint(lambda w, *xs: sum(x @ w for x in xs))
        return block(params["a"]["w"], *enter)

    batches = [random(2, 6, 5), random(2, 4, 5)]
    with pytest.raises(ValueError, match="in one batch 'a' has no 0.token mode, as it had in the"):
        lance_jax.calibrate(apply, {"a": {"w": W}, "w": W}, batches, select="^a$")


def test_of_several_activations_the_one_of_zeros_is_named():
    def apply(params, x, bias):
        block = jax.checkpoint(lambda w, x, bias: jax.nn.softmax(x @ w + bias))
        return block(params["a"]["w"], jnp.sin(x @ params["w"]), bias @ params["w"])

    with pytest.raises(ValueError, match="activation 1 that enters 'a' is all zero in the calibr"):
        batch = random(4, 5), jnp.zeros((4, 5))
        lance_jax.calibrate(apply, {"a": {"w": W}, "w": W}, [batch], select="^a$")
    with pytest.raises(ValueError, match="activation 1 that enters 'a' holds NaN or Inf, or value"):
        batch = random(4, 5), jnp.full((4, 5), jnp.nan)
        lance_jax.calibrate(apply, {"a": {"w": W}, "w": W}, [batch], select="^a$")


def sizes(arrays):
    return sorted((math.prod(shape), str(dtype)) for shape, dtype in arrays)


def test_nothing_but_the_cores_of_several_activations_is_kept():
    def apply(params, x, memory):
        def block(w, x, memory):
            return jax.nn.softmax(x @ w @ memory.swapaxes(1, 2)) @ memory

        moved = jnp.sin(x @ params["in"]), jnp.cos(memory @ params["in"])
        return jax.checkpoint(block)(params["a"]["w"], *moved)

    params, args = {"a": {"w": W}, "in": W}, (random(2, 3, 5), random(2, 7, 5))
    bases = {"0.feature": orthonormal(5, 2), "1.token": orthonormal(7, 3)}
    loss = loss_of(lambda p, both: lance_jax.compress(apply, own)(p, *both))
    for core_dtype in (None, "int8"):
        own = {"a": LayerFactors(bases, core_dtype=core_dtype)}
        saved = saved_of(loss, params, args, trainable="^a")
        cores = [(2, 3, 2), (2, 3, 5)]
        want = [one for core in cores for one in reference.stored_arrays(core, core_dtype)]
        want.append(((2, 3, 5), "float32"))  # the output, for the loss
        # by sizes, as an array may be kept before it is transposed
        assert sizes((leaf.shape, leaf.dtype) for leaf in saved) == sizes(want)


def test_several_activations_have_factors_of_their_own():
    def apply(params, x, memory):
        def block(w, x, memory):
            return jax.nn.softmax(x @ w @ memory.swapaxes(1, 2)) @ memory

        moved = jnp.sin(x) * params["scale"], jnp.cos(memory) * params["scale"]
        return jax.checkpoint(block)(params["a"]["w"], *moved)

    params, x, memory = {"a": {"w": W}, "scale": jnp.ones(5)}, random(2, 3, 5), random(2, 7, 5)
    own = lance_jax.calibrate(apply, params, [(x, memory)], energy=0.8)
    assert set(own["a"].bases) == {"0.token", "0.feature", "1.token", "1.feature"}
    only = lance_jax.calibrate(apply, params, [(x, memory)], energy=0.8, modes=("token",))
    assert set(only["a"].bases) == {"0.token", "1.token"}
    one = lance_jax.calibrate(apply, params, [(x, memory)], modes=("1.feature", "0.token"))
    assert set(one["a"].bases) == {"1.feature", "0.token"}
    with pytest.raises(ValueError, match="mode '2.token' is in no selected layer; they have .*1.t"):
        lance_jax.calibrate(apply, params, [(x, memory)], modes=("2.token",))
    fast = lance_jax.compress(apply, only)
    grads = jax.grad(lambda params: fast(params, x, memory).sum())(params)["a"]
    u, v = only["a"].bases["0.token"], only["a"].bases["1.token"]

    def at_the_core(params):
        near = jnp.einsum("nti,tr,sr->nsi", jnp.sin(x), u, u)
        far = jnp.einsum("nti,tr,sr->nsi", jnp.cos(memory), v, v)
        return (jax.nn.softmax(near @ params["w"] @ far.swapaxes(1, 2)) @ far).sum()

    assert_close(grads, jax.grad(at_the_core)(params["a"]))


def masked(params, x, ids, how):
    """Three blocks of attention among the tokens that are there; the mask is of floats."""
    there = (ids[:, :, None] > 0) & (ids[:, None, :] > 0)
    # of a sum, a token that sees none would have a gradient where a choice has none
    itself = there | jnp.eye(len(ids[0]), dtype=bool)
    mask = {
        "multiplied": there.astype(jnp.float32),
        "added": jnp.where(itself, 0.0, -1e9),
        "infinite": jnp.where(itself, 0.0, -jnp.inf),
        "bool": there,
        "itself": itself,
    }[how]

    def block(w, x, mask):
        h = x @ w
        scores = h @ h.swapaxes(1, 2)
        added = how in ("added", "infinite")
        scores = scores + mask if added else jnp.where(mask, scores, -1e9)
        return x + jax.nn.softmax(scores) @ x

    for name in ("l0", "l1", "l2"):
        x = jax.checkpoint(block)(params[name]["w"], jnp.tanh(x), mask)
    return jnp.sin(x)


def without_mask(own):
    """The same factors where the mask is no activation: their names have no number."""
    return {
        path: LayerFactors(
            {mode[2:]: u for mode, u in layer.bases.items() if mode.startswith("0.")},
            core_dtype=layer.core_dtype,
        )
        for path, layer in own.items()
    }


def total(apply):
    return lambda params, *args: (apply(params, *args) ** 2).sum()


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (8, 6)))
MASKED = {f"l{i}": {"w": random(16, 16, seed=i) / 4} for i in range(3)}


@pytest.mark.parametrize("how", ["multiplied", "added", "infinite"])
@pytest.mark.parametrize("core_dtype", [None, "int8", "int4"])
def test_a_mask_of_floats_has_no_basis(how, core_dtype):
    """Projected, none of its zeros would be one."""
    x, apply = random(8, 6, 16), lambda params, x, ids: masked(params, x, ids, how)
    own = lance_jax.calibrate(apply, MASKED, [(x, IDS)], energy=1.0, core_dtype=core_dtype)
    assert [set(layer.bases) for layer in own.values()] == [set(), *[{"0.token", "0.feature"}] * 2]
    exact = jax.grad(total(apply))(MASKED, x, IDS)
    got = jax.grad(total(lance_jax.compress(apply, own)))(MASKED, x, IDS)
    if core_dtype is None:
        assert_close(got, exact)
    # as with a mask of booleans, which is passed again as it is, whatever the bits
    by_bool = functools.partial(masked, how="bool" if how == "multiplied" else "itself")
    same = jax.grad(total(lance_jax.compress(by_bool, without_mask(own))))(MASKED, x, IDS)
    assert_close(got, same)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_arguments_are_passed_again_as_they_are(wrap):
    """They are held anyway, at any depth; what is computed from them is kept whole."""
    x, mask = random(8, 6, 16), random(8, 6, 6)

    @wrap
    def body(params, x, mask):
        def block(w, x, mask):
            return jnp.tanh(x @ w + (mask + 1) @ x)

        for name in MASKED:
            x = jax.checkpoint(block)(params[name]["w"], x, mask)
        return x

    def apply(params, x, mask):
        return body(params, x, mask)

    names = [b.path for b in lance_jax.layers(apply, MASKED, x, mask) if b.kind == "block"][-3:]
    coarse = {n: LayerFactors({"feature": orthonormal(16, 2)}, core_dtype="int4") for n in names}
    with pytest.raises(ValueError, match="this block has none, as only arguments enter it"):
        lance_jax.compress(apply, coarse)(MASKED, x, mask)
    coarse[names[0]] = LayerFactors({}, core_dtype="int4")
    fast = lance_jax.compress(apply, coarse)
    assert_equal(fast(MASKED, x, mask), apply(MASKED, x, mask))
    exact = jax.grad(total(apply))(MASKED, x, mask)
    first = lance_jax.compress(apply, {names[0]: coarse[names[0]]})
    assert_close(jax.grad(total(first))(MASKED, x, mask), exact)
    step = lance_jax.value_and_grad(total(fast))
    got = step(MASKED, x, mask)[1]
    assert not np.allclose(got["l1"]["w"], exact["l1"]["w"], rtol=1e-2)
    _, saved = step.forward(MASKED, x, mask)
    # the cores of two blocks, packed, their bounds and scales; and the output, for the loss
    assert [leaf.shape for leaf in saved if leaf.size >= x.size] == [x.shape]


@pytest.mark.parametrize("name", BLOCKED)
def test_calibration_finds_each_boundarys_subspaces(name):
    net = BLOCKED[name]
    data = [net.x, random(*net.x.shape, seed=8)]
    own = lance_jax.calibrate(
        blocked(net), net.params, data, select=[f"^{n}$" for n in net.names()], energy=0.8
    )
    assert set(own) == set(net.names())
    parts = [block_inputs(net, net.params, x)[:BLOCKS] for x in data]
    inputs = [np.concatenate(both) for both in zip(*parts, strict=True)]

    def grams(x):
        unfolded = {axis: reference.unfold(x.astype(np.float64), axis) for axis in range(1, x.ndim)}
        names = ("height", "width", "channel") if x.ndim == 4 else ("token", "feature")
        return {n: u @ u.T for n, u in zip(names, unfolded.values(), strict=True)}

    each = [grams(x) for x in inputs]
    if net.scanned:
        each = [{mode: np.stack([one[mode] for one in each]) for mode in each[0]}]
    for block, expected in zip(own.values(), each, strict=True):
        assert_bases(block, expected, 0.8)


def test_all_that_is_outermost_is_selected_by_default():
    net = BLOCKED["residual"]
    own = lance_jax.calibrate(blocked(net), net.params, [net.x])
    assert list(own) == ["stem/kernel", *net.names(), "head/kernel"]


def test_what_selects_a_block_leaves_out_the_layers_inside():
    """Unless another pattern names them."""
    net = BLOCKED["residual"]

    def chosen(select):
        return list(lance_jax.calibrate(blocked(net), net.params, [net.x], select=select))

    assert chosen("block") == net.names()
    inside = [
        layer.path
        for layer in lance_jax.layers(blocked(net), net.params, net.x)
        if layer.block == "block1"
    ]
    assert inside and chosen("^block1/") == inside
    assert chosen(["block1", f"^{inside[0]}$"]) == ["block1", inside[0]]
    assert chosen(["block", "head"]) == [*net.names(), "head/kernel"]


def test_the_last_are_blocks_where_there_are_any():
    net = BLOCKED["residual"]
    own = lance_jax.calibrate(blocked(net), net.params, [net.x], select=lance_jax.last(2))
    assert list(own) == net.names()[-2:]
    with pytest.raises(ValueError, match="asks for more"):
        lance_jax.calibrate(blocked(net), net.params, [net.x], select=lance_jax.last(BLOCKS + 2))


def test_continual_learning_takes_the_layers_inside():
    net = BLOCKED["transformer"]
    slices = lance_jax.continual.protect(
        None, blocked(net), net.params, [net.x], threshold=0.9, select="^block"
    )
    assert all("/" in path for path in slices)


def test_a_policy_of_its_own_is_refused_by_name():
    def apply(params, x):
        policy = jax.checkpoint_policies.dots_saveable
        return jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=policy)(params["a"]["w"], x)

    params, x = {"a": {"w": W}}, random(4, 5)
    found = lance_jax.layers(apply, params, x)
    assert [layer.path for layer in found] == ["a/w"]
    (skip,) = found.skipped
    assert skip.path == "a"
    assert re.search(
        r"its jax\.checkpoint has a policy of its own, dots_?saveable", skip.reason, re.I
    )
    with pytest.raises(ValueError, match=r"factors\['a'\] cannot be compressed: its jax"):
        lance_jax.compress(apply, {"a": LayerFactors({})})(params, x)
    own = lance_jax.calibrate(apply, params, [x])  # its layers are there all the same
    assert list(own) == ["a/w"]
    (skip,) = lance_jax.layers(jax.checkpoint(apply), params, x).skipped
    assert skip.path == "a:2" and skip.reason.endswith("what that says, while a is recomputed")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LayerFactors({"patch": orthonormal(8, 2)}), "of mode 'patch'; this block has batch, heig"),
        (LayerFactors({"channel": orthonormal(7, 2)}), "of shape (7, 2); it must be (8, r)"),
        (LayerFactors({}, np.zeros((6, 5, 8))), "has mean; a block has bases and a core_dtype"),
        (LayerFactors({}, update=orthonormal(8, 2)), "has update; a block has bases and a"),
        (LayerFactors({}, frozen=True), "has frozen; a block has bases and a core_dtype alone"),
    ],
)
def test_factors_that_do_not_fit(layer, message):
    net = BLOCKED["residual"]
    with pytest.raises(ValueError, match=r"^factors\['block1'\]") as error:
        lance_jax.compress(blocked(net), {"block1": layer})(net.params, net.x)
    assert message in str(error.value)


def test_a_block_is_not_centred():
    net = BLOCKED["residual"]
    own = lance_jax.calibrate(blocked(net), net.params, [net.x], center=True)
    assert [skip.reason for skip in own.skipped] == ["a block has no mean"] * BLOCKS
