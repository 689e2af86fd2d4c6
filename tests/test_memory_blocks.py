"""`report` of networks made of blocks: what lives between the phases, and inside the second."""

import jax
import jax.numpy as jnp
import pytest
from block_networks import BATCH, BLOCKED, BLOCKS, loss_of
from helpers import orthonormal, random

import lance_jax
from lance_jax import Factors, LayerFactors

F32 = 4


def compressed(net, bases, core_dtype):
    """(loss in blocks, factors of all blocks)."""
    if net.scanned:
        bases = {mode: jnp.stack([u] * BLOCKS) for mode, u in bases.items()}
    layer = LayerFactors(bases, core_dtype=core_dtype)
    loss = loss_of(lance_jax.blocks(net.plain, net.pattern))
    return loss, Factors(dict.fromkeys(net.names(), layer))


def bases_of(net):
    last = "channel" if net.x.ndim == 4 else "feature"
    return {last: orthonormal(8, 3)}


@pytest.mark.parametrize(
    ("name", "core_dtype"),
    [
        *(("convolution", dtype) for dtype in (None, "bfloat16", "int8", "int4")),
        *((name, "int8") for name in BLOCKED if name != "convolution"),
    ],
)
def test_predicted_bytes_are_held(name, core_dtype):
    net = BLOCKED[name]
    for bases in ({}, bases_of(net)):
        loss, factors = compressed(net, bases, core_dtype)
        report = lance_jax.report(loss, net.params, net.x, factors=factors)
        fast = lance_jax.compress(loss, factors)
        _, saved = lance_jax.value_and_grad(fast).forward(net.params, net.x)
        held = sum(leaf.nbytes for leaf in saved)
        assert abs(report.saved_bytes.total - held) <= 0.01 * held
        rows = {row.path: row for row in report.layers}
        kept = sum(rows[name].bytes for name in net.names())
        inside = [row for row in report.layers if row.path.startswith("block") and "/" in row.path]
        assert inside and all(row.bytes == 0 for row in inside)
        assert report.saved_bytes.layer_inputs == kept + sum(
            rows[path].bytes for path in ("stem/kernel", "head/kernel")
        )


@pytest.mark.parametrize("scanned", [False, True])
def test_keys_that_are_held_are_counted(scanned):
    """Of a key for each sample, drawn in the network, as many as there are samples."""
    params = {"a": {"w": random(3, 6, 6)}}

    def layer(w, x, key):
        keys = jax.random.split(key, len(x))

        def block(w, x, keys):
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (6,)))(keys)
            return jnp.where(kept, jnp.sin(x @ w), 0.0)

        return jax.checkpoint(block)(w, x, keys)

    def loss(params, x, key):
        if scanned:
            keys = jax.random.split(key, 3)
            steps = (params["a"]["w"], keys)
            x, _ = jax.lax.scan(lambda x, step: (layer(step[0], x, step[1]), None), x, steps)
        else:
            for i in range(3):
                x = layer(params["a"]["w"][i], x, jax.random.fold_in(key, i))
        return (x**2).sum()

    args = jnp.tile(X, (4, 1)), jax.random.key(1)
    report = lance_jax.report(loss, params, *args)
    _, saved = lance_jax.value_and_grad(loss).forward(params, *args)
    assert any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in saved)
    held = sum(leaf.nbytes for leaf in saved)
    assert abs(report.saved_bytes.total - held) <= 0.01 * held


@pytest.mark.parametrize("name", BLOCKED)
def test_plain_backprop_is_counted_without_checkpoints(name):
    net = BLOCKED[name]
    plain = lance_jax.report(loss_of(net.plain), net.params, net.x)
    loss, factors = compressed(net, {}, "int8")
    for own in (None, factors):
        blocked = lance_jax.report(loss, net.params, net.x, factors=own)
        assert blocked.saved_bytes_backprop == plain.saved_bytes_backprop
        assert blocked.saved_bytes.total < plain.saved_bytes.total
    assert (plain.transient, plain.macs_recomputed) == (0, 0)


def dense_block(params, x):
    return jnp.sin(jnp.sin(x @ params["w"]) @ params["v"])


def dense_net(params, x):
    for name in ("a", "b"):
        x = dense_block(params[name], x)
    return x


DENSE = {name: {"w": random(6, 20), "v": random(20, 6)} for name in ("a", "b")}
X = random(10, 6)


def test_transient_and_macs_by_hand():
    """A block needs its input again, the two sines' arguments, and the inner sine's result."""
    loss = loss_of(lance_jax.blocks(dense_net, "^[ab]"))
    kept = LayerFactors({"feature": orthonormal(6, 2)}, core_dtype="int8")
    whole = LayerFactors({})  # of the argument, which is there anyway
    report = lance_jax.report(loss, DENSE, X, factors={"a": whole, "b": kept})
    by_hand = F32 * 10 * (6 + 20 + 20 + 6)
    assert report.transient == by_hand
    assert report.macs_recomputed == 2 * 10 * (6 * 20 + 20 * 6)
    row = next(row for row in report.layers if row.path == "b")
    # one group of values: two bounds, and the range that they are in
    bytes_kept = 10 * 2 + 2 * 1 + 2 * F32
    assert (row.kind, row.bytes, dict(row.ranks)) == ("block", bytes_kept, {"feature": 2})
    assert (row.macs_forward, row.macs_dx) == (10 * 6 * 2, 10 * 6 * 2)
    assert [row.recomputed for row in report.layers] == [
        row.kind != "block" for row in report.layers
    ]
    (line,) = (line for line in str(report).splitlines() if line.startswith("b/w "))
    assert "recomputed" in line
    only_b = lance_jax.report(loss, DENSE, X, factors={"b": kept}, trainable="^b")
    assert only_b.macs_recomputed == report.macs_recomputed / 2  # no gradient passes the other
    # of a plain jax.checkpoint the input is kept, not expanded
    assert lance_jax.report(loss, DENSE, X).transient == by_hand - F32 * 10 * 6
    assert f"recomputed   4,800 MACs, {by_hand:,} bytes at a time" in str(report)


def test_a_block_in_a_block_is_recomputed_twice():
    def net(params, x):
        def outer(params, x):
            inner = jax.checkpoint(lambda w, x: jnp.sin(x @ w))(params["w"], jnp.sin(x))
            return jnp.sin(inner @ params["v"])

        return jax.checkpoint(outer)(params["a"], jnp.sin(x))

    report = lance_jax.report(loss_of(net), DENSE, X)
    assert report.macs_recomputed == (2 + 1) * 10 * 6 * 20


def test_a_block_without_products_is_reported():
    def net(params, x):
        return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x @ params["a"]["w"])

    report = lance_jax.report(loss_of(net), DENSE, X)
    assert report.macs_recomputed == 0 < report.transient
    assert f"recomputed   0 MACs, {report.transient:,} bytes at a time" in str(report)


def test_layers_and_masks_inside_make_the_transient_smaller():
    net = BLOCKED["residual"]
    loss, factors = compressed(net, {}, "int8")
    inner = {
        f"{name}/{conv}": LayerFactors({"channel": orthonormal(8, 1)}, core_dtype="int8")
        for name in net.names()
        for conv in ("conv1", "conv2")
    }
    alone = lance_jax.report(loss, net.params, net.x, factors=factors)
    both = lance_jax.report(loss, net.params, net.x, factors={**factors, **inner})
    assert both.saved_bytes.total == alone.saved_bytes.total
    assert both.transient < 0.75 * alone.transient
    size = BATCH * 6 * 5 * 8
    # the block's input, the input of its second convolution, and two packed masks
    assert alone.transient == F32 * 2 * size + 2 * size // 8


@pytest.mark.parametrize("name", BLOCKED)
def test_predicted_bytes_are_held_with_layers_inside_and_statistics(name):
    """An auxiliary output of the network's, and low bits in the blocks' layers as well."""
    net = BLOCKED[name]
    plain = lance_jax.blocks(net.plain, net.pattern)

    def loss(params, x):
        y = plain(params, x)
        return jnp.sin(y).sum(), {"mean": y.mean(0), "largest": y.max()}

    found = lance_jax.layers(plain, net.params, net.x)
    factors = {layer.path: LayerFactors({}, core_dtype="int4") for layer in found}
    for own in (factors, {path: factors[path] for path in net.names()}):
        report = lance_jax.report(loss, net.params, net.x, factors=own)
        vg = lance_jax.value_and_grad(lance_jax.compress(loss, own), has_aux=True)
        held = sum(leaf.nbytes for leaf in vg.forward(net.params, net.x)[1])
        assert report.saved_bytes.total == held


def test_blocks_that_no_gradient_passes_keep_nothing():
    net = BLOCKED["residual"]
    loss, factors = compressed(net, {}, "int8")
    trainable = ["^block2", "^head"]
    report = lance_jax.report(loss, net.params, net.x, factors=factors, trainable=trainable)
    assert [row.path for row in report.layers if row.kind == "block"] == ["block2"]
    fast = lance_jax.compress(loss, factors)
    vg = lance_jax.value_and_grad(fast, trainable=trainable)
    _, saved = vg.forward(net.params, net.x)
    assert report.saved_bytes.total == sum(leaf.nbytes for leaf in saved)
    assert [leaf.dtype for leaf in saved].count(jnp.uint8) == 2


def test_the_compilers_own_count_falls_with_smaller_blocks():
    """Of the second phase: its temporary memory, which on a CPU is more than what must be held."""
    width, depth = 64, 8
    params = {
        f"l{i}": {"w": random(width, width, seed=i) / 8, "v": random(width, width) / 8}
        for i in range(depth)
    }
    x = random(256, width)

    def apply(params, x):
        for i in range(depth):
            x = jnp.sin(jnp.cos(x @ params[f"l{i}"]["w"]) @ params[f"l{i}"]["v"])
        return x

    def grouped(size):
        """Under names of which each stands for several layers."""

        def run(stacked, x):
            return apply({k: v for group in stacked.values() for k, v in group.items()}, x)

        names = [f"l{i}" for i in range(depth)]
        groups = {
            f"g{i}": {name: params[name] for name in names[i : i + size]}
            for i in range(0, depth, size)
        }
        return lance_jax.blocks(run, r"^g\d"), groups

    counted, compiled = [], []
    for size in (8, 4, 1):
        run, groups = grouped(size)
        kept = LayerFactors({}, core_dtype="int8")
        loss, factors = loss_of(run), dict.fromkeys(groups, kept)
        counted.append(lance_jax.report(loss, groups, x, factors=factors).transient)
        vg = lance_jax.value_and_grad(lance_jax.compress(loss, factors))
        _, saved = vg.forward(groups, x)
        options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
        lowered = jax.jit(vg.backward).lower(saved, groups, x)
        analysis = lowered.compile(compiler_options=options).memory_analysis()
        compiled.append(analysis.temp_size_in_bytes)
    assert counted == sorted(counted, reverse=True) and counted[-1] < counted[0] / 4
    assert compiled == sorted(compiled, reverse=True) and compiled[-1] < compiled[0] / 2
    assert all(own <= theirs for own, theirs in zip(counted, compiled, strict=True))
