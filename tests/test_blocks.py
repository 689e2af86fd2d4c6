"""`blocks`: which equations become one `jax.checkpoint`, and that nothing else changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from block_networks import BLOCKED, loss_of
from helpers import assert_close, assert_equal, equations, random
from jax import lax

import lance_jax

W = {"w": random(5, 5) / 3, "v": random(5, 5, seed=1) / 3}
X = random(4, 5)


def dense(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def chain(params, x):
    for name in ("a", "b"):
        x = jax.nn.relu(x + dense(params[name], x))
    return x @ params["head"]


CHAIN = {"a": W, "b": W, "head": random(5, 3)}


def checkpoints(apply_fn, params, *args):
    jaxpr = jax.make_jaxpr(apply_fn)(params, *args).jaxpr
    return [eqn for eqn in equations(jaxpr) if "policy" in eqn.params]


def names(apply_fn, params, *args):
    found = lance_jax.layers(apply_fn, params, *args)
    return [layer.path for layer in found if layer.kind == "block"]


@pytest.mark.parametrize("name", BLOCKED)
def test_values_and_gradients_are_the_same(name):
    net = BLOCKED[name]
    blocked = lance_jax.blocks(net.plain, net.pattern)
    assert names(blocked, net.params, net.x) == net.names()
    for apply in (lambda f: f, jax.jit):
        assert_equal(apply(blocked)(net.params, net.x), apply(net.plain)(net.params, net.x))
    # of gradients the compiler fuses, and rounds, other parts together
    want = jax.grad(loss_of(net.plain), (0, 1))(net.params, net.x)
    got = jax.grad(loss_of(blocked), (0, 1))
    for apply in (lambda f: f, jax.jit):
        assert_close(apply(got)(net.params, net.x), want)


@pytest.mark.parametrize("name", BLOCKED)
def test_nothing_but_the_blocks_inputs_is_kept(name):
    net = BLOCKED[name]
    blocked = lance_jax.blocks(net.plain, net.pattern)
    vg = lance_jax.value_and_grad(loss_of(blocked), trainable=r"^block")
    _, saved = vg.forward(net.params, net.x)
    found = lance_jax.layers(blocked, net.params, net.x)
    *_, last = (layer for layer in found if layer.kind == "block")
    sizes = [leaf.size for leaf in saved if leaf.size > BATCH_SIZED]
    count = 1 if net.scanned else 3
    assert len(sizes) == count, [leaf.shape for leaf in saved]
    assert sum(sizes) == 3 * jnp.zeros(last.input_shape).size


BATCH_SIZED = 4 * 8  # the pooled features before the head


def test_a_block_takes_in_what_follows_and_ends_before_the_next():
    """relu and the sum of a residual block are in it; the head is not."""
    blocked = lance_jax.blocks(chain, "^[ab]")
    one, two = checkpoints(blocked, CHAIN, X)
    for eqn in (one, two):
        inside = [inner.primitive.name for inner in equations(eqn.params["jaxpr"])]
        assert inside.count("dot_general") == 2
        assert {"tanh", "add"} <= set(inside)
        assert len(eqn.outvars) == 1
    assert names(blocked, CHAIN, X) == ["a", "b"]


def test_arithmetic_among_parameters_counts_as_a_parameter():
    """Wherever it stands: here the weights of both blocks are scaled before either begins."""

    def apply(params, x):
        scaled = {name: params[name]["w"] * 2 for name in ("a", "b")}
        for name in ("a", "b"):
            x = jnp.tanh(x @ scaled[name])
        return x @ params["head"]

    blocked = lance_jax.blocks(apply, "^[ab]")
    assert names(blocked, CHAIN, X) == ["a", "b"]
    assert_equal(blocked(CHAIN, X), apply(CHAIN, X))


def test_blocks_begin_at_the_same_place_in_batches_of_all_sizes():
    def apply(params, x, positions):
        s = positions + 1  # larger than one sample's activations
        h = jnp.tanh(x @ params["a"]["w"])
        return jnp.concatenate([h, jnp.cos(h)], 1) * jnp.exp(s.sum() * 1e-9) @ params["b"]["w"]

    blocked = lance_jax.blocks(apply, "^[ab]")
    shapes = {
        n: {layer.path: layer.inputs for layer in lance_jax.layers(blocked, CHAIN, x, jnp.ones(60))}
        for n in (16, 1)
        for x in [random(n, 3, 5)]
    }
    assert shapes[16]["b"] == ((16, 3, 5), (60,))
    assert shapes[1]["b"] == ((1, 3, 5), (60,))


def test_a_block_ends_before_a_parameter_that_no_pattern_matches():
    blocked = lance_jax.blocks(chain, "^a")
    (eqn,) = checkpoints(blocked, CHAIN, X)
    assert [v.aval.shape for v in eqn.outvars] == [(4, 5)]
    assert names(blocked, CHAIN, X) == ["a"]


def test_several_results_and_inputs():
    """A block may give more than one result, and take what an earlier one gave."""

    def apply(params, x):
        early = jnp.tanh(x @ params["a"]["w"])
        late = jnp.tanh(early @ params["b"]["w"]) + early @ params["b"]["v"]
        return late @ params["head"] + early @ params["head"]

    blocked = lance_jax.blocks(apply, "^[ab]")
    assert names(blocked, CHAIN, X) == ["a", "b"]
    want = jax.grad(loss_of(apply))(CHAIN, X)
    assert_close(jax.grad(loss_of(blocked))(CHAIN, X), want)


def test_blocks_of_a_jitted_function_and_of_a_branch():
    def branching(params, x):
        return lax.cond(x.sum() > 0, chain, lambda p, x: chain(p, -x), params, x)

    for apply in (jax.jit(chain), branching):
        blocked = lance_jax.blocks(apply, "^[ab]")
        twice = apply is branching
        assert names(blocked, CHAIN, X) == ["a", "b", *(["a:2", "b:2"] if twice else [])]
        assert_equal(blocked(CHAIN, X), apply(CHAIN, X))


def test_a_users_own_checkpoint_is_a_block():
    def apply(params, x):
        for i in range(2):
            x = jax.checkpoint(dense)(params["layers"][i], x)
        return jax.checkpoint(lambda w, x: jnp.sin(x @ w))(params["head"], x)

    params = {"layers": [W, W], "head": random(5, 3)}
    assert names(apply, params, X) == ["layers/0", "layers/1", "block"]


def test_checkpoints_with_the_same_parameters_are_told_apart():
    def apply(params, x):
        for _ in range(3):
            x = jax.checkpoint(dense)(params["shared"], x)
        return x

    assert names(apply, {"shared": W}, X) == ["shared", "shared:2", "shared:3"]


def test_a_block_that_is_a_checkpoint_already_is_left_as_it_is():
    def apply(params, x):
        for name in ("a", "b"):
            x = jax.checkpoint(dense)(params[name], x)
        return x @ params["head"]

    blocked = lance_jax.blocks(apply, "^[ab]")
    assert len(checkpoints(blocked, CHAIN, X)) == 2
    assert names(blocked, CHAIN, X) == ["a", "b"]


def test_layers_tell_what_enters_a_block_and_what_it_costs():
    """The products of attention have no parameter, and are done again all the same."""

    def apply(params, x, memory):
        def block(params, x, memory):
            scores = jax.nn.softmax(x @ params["w"] @ memory.swapaxes(1, 2))
            return scores @ memory

        x, memory = jnp.sin(x @ params["b"]["w"]), jnp.cos(memory @ params["b"]["w"])
        return block(params["a"], x, memory) @ params["head"]

    blocked = lance_jax.blocks(apply, "^a")
    x, memory = random(2, 3, 5), random(2, 7, 5)
    _, block, inner, _ = lance_jax.layers(blocked, CHAIN, x, memory)
    assert (block.path, block.kind, inner.block) == ("a", "block", "a")
    assert block.inputs == ((2, 3, 5), (2, 7, 5))
    assert dict(block.modes) == {
        **{"0.batch": 2, "0.token": 3, "0.feature": 5},
        **{"1.batch": 2, "1.token": 7, "1.feature": 5},
    }
    assert block.macs == 2 * (3 * 5 * 5 + 3 * 5 * 7 + 3 * 7 * 5)


@pytest.mark.parametrize("framework", ["linen", "haiku"])
def test_networks_nobody_wrote_for_it(framework):
    x = random(2, 8, 8, 3)
    if framework == "linen":

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                for i in range(3):
                    h = nn.GroupNorm(4)(nn.Conv(8, (3, 3), name=f"layers_{i}_conv")(x))
                    x = nn.relu(h) if i == 0 else nn.relu(x + h)
                return nn.Dense(5)(x.mean((1, 2)))

        net = Net()
        params, pattern = net.init(jax.random.key(0), x), r"layers_\d+|GroupNorm_\d+"
        apply, count = net.apply, 6
    else:
        hk = pytest.importorskip("haiku")

        def forward(x, is_training):
            return hk.nets.ResNet18(5)(x, is_training)

        net = hk.transform_with_state(forward)
        params, state = net.init(jax.random.key(0), x, True)
        pattern, count = r"block_group_\d/~/block_\d", 8

        def apply(params, x):
            return net.apply(params, state, None, x, False)[0]

    blocked = lance_jax.blocks(apply, pattern)
    assert len(names(blocked, params, x)) == count
    assert_equal(jax.jit(blocked)(params, x), jax.jit(apply)(params, x))


def interleaved(params, x):
    x = dense(params["a"], x)
    x = dense(params["b"], x)
    return dense(params["a"], x) @ params["head"]


def under_one(params, x):
    return jnp.tanh(x @ params["a"]["w"]) * params["norm"] @ params["a"]["v"]


@pytest.mark.parametrize(
    ("apply", "pattern", "message"),
    [
        (chain, "^c", "pattern '^c' matches no parameter; there are a/v, a/w, b/v, b/w, head"),
        (chain, "(", "pattern '(' is no regular expression"),
        (chain, 3, "pattern is 3; it must be a string, a regular expression"),
        (chain, b"block", "pattern is b'block'; it must be a string"),
        (chain, "^x?", "pattern '^x?' matches an empty text in 'a/v'; a block needs a name"),
        (interleaved, "^[ab]", "blocks interleave: 'a' is used, then 'b', then 'a' again"),
        (under_one, "^a", "blocks interleave: 'a' is used, then 'norm', then 'a' again"),
    ],
)
def test_errors(apply, pattern, message):
    params = CHAIN | ({"norm": random(5)} if apply is under_one else {})
    with pytest.raises(ValueError, match=r"^") as error:
        lance_jax.blocks(apply, pattern)(params, X)
    assert message in str(error.value)


def test_parameters_that_no_equation_uses_are_no_block():
    with pytest.raises(ValueError, match="no block of equations"):
        lance_jax.blocks(lambda params, x: x @ params["head"], "^a")(CHAIN, X)


@pytest.mark.parametrize("scanned", [False, True])
def test_arithmetic_among_parameters_is_part_of_its_block(scanned):
    """Else its result would be kept: here W + A B of an adapter."""
    lora = {"w": random(5, 5) / 3, "a": random(5, 2), "b": random(2, 5) / 9}

    def block(p, x):
        return jnp.tanh(x @ (p["w"] + p["a"] @ p["b"]))

    def apply(params, x):
        x = jnp.sin(x)
        if scanned:
            return lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])[0]
        for name in params:
            x = block(params[name], x)
        return x

    params = {name: lora for name in ("block0", "block1", "block2")}
    if scanned:
        params = {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *params.values())}
    blocked = lance_jax.blocks(apply, r"block\w")
    vg = lance_jax.value_and_grad(loss_of(blocked))
    _, saved = vg.forward(params, X)
    shapes = [leaf.shape for leaf in saved]
    assert (5, 5) not in shapes and (3, 5, 5) not in shapes
    assert_close(jax.grad(loss_of(blocked))(params, X), jax.grad(loss_of(apply))(params, X))
