"""`report` against numbers worked out by hand, from shapes alone."""

import math

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

F32, BF16 = 4, 2  # bytes of one number


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def basis(n, r):
    return networks.orthonormal(np.random.default_rng(0), n, r)


def bits(*shape):
    """Bytes of a packed mask of one bit an element."""
    return math.ceil(math.prod(shape) / 8)


# A dense net: 6 samples of 20 features -> 24 -> 16 -> 10, linear in its logits.
DENSE = {
    "first": {"kernel": struct(20, 24), "bias": struct(24)},
    "second": {"kernel": struct(24, 16), "bias": struct(16)},
    "head": {"kernel": struct(16, 10), "bias": struct(10)},
}
DENSE_BATCH = (struct(6, 20), struct(6, 10))


def dense_loss(params, x, target, relu=jax.nn.relu):
    for name in ("first", "second"):
        x = relu(x @ params[name]["kernel"] + params[name]["bias"])
    return ((x @ params["head"]["kernel"] + params["head"]["bias"]) * target).sum()


DENSE_MASKS = bits(6, 24) + bits(6, 16)

# A convolutional net: 4 pictures of 16 x 16 x 3 -> 16 x 16 x 8 -> 8 x 8 x 16 -> mean -> 10.
CONV = {
    "stem": {"kernel": struct(3, 3, 3, 8), "bias": struct(8)},
    "body": {"kernel": struct(3, 3, 8, 16), "bias": struct(16)},
    "head": {"kernel": struct(16, 10), "bias": struct(10)},
}
CONV_BATCH = (struct(4, 16, 16, 3), struct(4, 10))


def conv_loss(params, x, target):
    for name, stride in (("stem", 1), ("body", 2)):
        x = lax.conv_general_dilated(
            x,
            params[name]["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(x + params[name]["bias"])
    logits = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    return (logits * target).sum()


CONV_MASKS = bits(4, 16, 16, 8) + bits(4, 8, 8, 16)
CONV_FACTORS = Factors(
    {
        "body/kernel": LayerFactors(
            {"height": basis(16, 5), "width": basis(16, 6), "channel": basis(8, 4)}
        ),
        "head/kernel": LayerFactors({"feature": basis(16, 2)}),
    }
)


def rows(report):
    return {row.path: row for row in report.layers}


def test_dense_net_of_plain_backprop():
    """The batch, its own copy in the caller's hands, is no cost of the step."""
    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH)
    inputs = 6 * 24 * F32 + 6 * 16 * F32
    assert report.saved_bytes_backprop.total == inputs + DENSE_MASKS
    # Without factors the masks are packed too, and that is plain backprop's fair figure.
    assert report.saved_bytes.total == inputs + DENSE_MASKS
    assert report.factor_bytes == 0


def test_dense_net_with_factors():
    factors = Factors(
        {
            "first/kernel": LayerFactors({"feature": basis(20, 3)}),
            "second/kernel": LayerFactors({"feature": basis(24, 5)}),
        }
    )
    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, factors=factors)
    cores = 6 * 3 * F32 + 6 * 5 * F32
    assert report.saved_bytes.layer_inputs == cores + 6 * 16 * F32  # the head has no factors
    assert report.saved_bytes.total == cores + 6 * 16 * F32 + DENSE_MASKS
    assert report.saved_bytes_backprop.total == 6 * 24 * F32 + 6 * 16 * F32 + DENSE_MASKS
    assert report.factor_bytes == (20 * 3 + 24 * 5) * F32 == factors.nbytes


def test_dense_net_with_frozen_layers():
    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, trainable=["second", "head"])
    inputs = 6 * 24 * F32 + 6 * 16 * F32
    for kept in (report.saved_bytes, report.saved_bytes_backprop):
        assert kept.layer_inputs == inputs
        assert kept.total == inputs + bits(6, 16)  # the first relu is behind the last gradient

    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, trainable="head")
    for kept in (report.saved_bytes, report.saved_bytes_backprop):
        assert (kept.layer_inputs, kept.total) == (6 * 16 * F32, 6 * 16 * F32)

    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, trainable="bias")
    for kept in (report.saved_bytes, report.saved_bytes_backprop):
        assert (kept.layer_inputs, kept.total) == (0, DENSE_MASKS)


def test_conv_net_with_and_without_factors():
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)
    inputs = 4 * 16 * 16 * 8 * F32 + 4 * 16 * F32
    assert report.saved_bytes_backprop.total == inputs + CONV_MASKS
    cores = 4 * 5 * 6 * 4 * F32 + 4 * 2 * F32
    assert report.saved_bytes.total == cores + CONV_MASKS
    assert report.factor_bytes == (16 * 5 + 16 * 6 + 8 * 4 + 16 * 2) * F32


def test_layer_inputs_are_the_inputs_of_trainable_layers():
    report = lance_jax.report(
        conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS, trainable=["body", "head"]
    )
    assert report.saved_bytes.layer_inputs == 4 * 5 * 6 * 4 * F32 + 4 * 2 * F32
    assert report.saved_bytes_backprop.layer_inputs == 4 * 16 * 16 * 8 * F32 + 4 * 16 * F32
    mask = bits(4, 8, 8, 16)
    assert report.saved_bytes.total == report.saved_bytes.layer_inputs + mask
    assert report.saved_bytes_backprop.total == report.saved_bytes_backprop.layer_inputs + mask


def test_frozen_factors_cost_nothing():
    """A layer that is not trained keeps no core, whatever factors it has."""
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS, trainable="head")
    assert report.saved_bytes.total == 4 * 2 * F32
    assert report.saved_bytes_backprop.total == 4 * 16 * F32


@pytest.mark.parametrize(
    ("core_dtype", "bytes_kept"),
    [
        (None, 4 * 6 * 6 * 4 * F32),
        ("bfloat16", 4 * 6 * 6 * 4 * BF16),
        # 144 values a channel in 5 groups with 2 bounds of a byte, 20 groups in a range of 2 floats
        ("int8", 4 * 6 * 6 * 4 + 2 * 5 * 4 + 2 * F32),
        ("int4", 4 * 6 * 6 * 4 // 2 + 2 * 5 * 4 + 2 * F32),
    ],
)
def test_core_dtypes(core_dtype, bytes_kept):
    bases = {"height": basis(16, 6), "width": basis(16, 6), "channel": basis(8, 4)}
    factors = Factors({"body/kernel": LayerFactors(bases, core_dtype=core_dtype)})
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=factors)
    assert rows(report)["body/kernel"].bytes == bytes_kept
    assert report.saved_bytes.total == bytes_kept + 4 * 16 * F32 + CONV_MASKS


@pytest.mark.parametrize(
    ("core_dtype", "bytes_kept"),
    [
        # 6 values a channel are too few: 144 values in 5 groups and a range
        ("int8", 6 * 24 + 2 * 5 + 2 * F32),
        ("int4", 6 * 24 // 2 + 2 * 5 + 2 * F32),
        ("bfloat16", 6 * 24 * BF16),
    ],
)
def test_whole_inputs_in_a_small_dtype(core_dtype, bytes_kept):
    factors = Factors({"second/kernel": LayerFactors({}, core_dtype=core_dtype)})
    report = lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, factors=factors)
    assert rows(report)["second/kernel"].bytes == bytes_kept
    assert report.factor_bytes == 0


def test_bf16_activations():
    def loss(params, x, target):
        half, x, target = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x, target))
        return dense_loss(half, x, target).astype(jnp.float32)

    factors = Factors({"second/kernel": LayerFactors({"feature": basis(24, 5)})})
    report = lance_jax.report(loss, DENSE, *DENSE_BATCH, factors=factors)
    assert rows(report)["second/kernel"].bytes == 6 * 5 * BF16
    assert rows(report)["second/kernel"].bytes_backprop == 6 * 24 * BF16
    assert rows(report)["head/kernel"].bytes == 6 * 16 * BF16


def test_fair_backprop_counts_one_input_once():
    """Three products of one input keep it once; plain JAX keeps the relu's copy beside it."""

    def loss(params, x, target):
        h = jax.nn.relu(x @ params["first"]["kernel"])
        qkv = [h @ params[name] for name in "qkv"]
        return (sum(qkv) * target).sum()

    params = {"first": DENSE["first"]} | {name: struct(24, 10) for name in "qkv"}
    report = lance_jax.report(loss, params, *DENSE_BATCH)
    assert report.saved_bytes_backprop.total == 6 * 24 * F32 + bits(6, 24)


@pytest.mark.parametrize(
    "relu",
    [
        jax.nn.relu,
        jax.nn.relu6,
        jax.nn.leaky_relu,
        lambda x: jnp.maximum(x, 0),
        lambda x: jnp.clip(x, 0, 6),
        lambda x: jnp.where(x > 0, x, 0.1 * x),
    ],
    ids=["relu", "relu6", "leaky_relu", "maximum", "clip", "where"],
)
def test_fair_backprop_counts_masks_of_one_bit(relu):
    def loss(params, x, target):
        return dense_loss(params, x, target, relu)

    report = lance_jax.report(loss, DENSE, *DENSE_BATCH)
    assert report.saved_bytes_backprop.total == 6 * 24 * F32 + 6 * 16 * F32 + DENSE_MASKS


def test_fair_backprop_drops_constants_and_parameters():
    table = jnp.ones((16, 33))

    def loss(params, x, target):
        h = jax.nn.relu(x @ (2.0 * params["first"]["kernel"]))
        return ((h @ params["second"]["kernel"].reshape(24, 16)) @ table).sum() + 0 * target.sum()

    report = lance_jax.report(loss, DENSE, *DENSE_BATCH)
    assert report.saved_bytes_backprop.total == 6 * 24 * F32 + bits(6, 24)


def test_other_residuals_are_in_the_total():
    """What softmax and GELU keep is neither an input of a layer nor a mask, but it is kept."""

    def loss(params, x, target):
        h = jnp.exp(x @ params["first"]["kernel"])
        return (jnp.sin(h @ params["head"]) * target).sum()

    params = {"first": DENSE["first"], "head": struct(24, 10)}
    factors = Factors({"head": LayerFactors({"feature": basis(24, 2)})})
    report = lance_jax.report(loss, params, *DENSE_BATCH, factors=factors)
    # exp keeps its output, which is the head's input; sine keeps the cosine of the logits.
    assert report.saved_bytes_backprop.total == 6 * 24 * F32 + 6 * 10 * F32
    assert report.saved_bytes.total == 6 * 2 * F32 + 6 * 24 * F32 + 6 * 10 * F32
    head_input = rows(report)["head"]
    assert (head_input.bytes, head_input.bytes_backprop) == (6 * 2 * F32, 6 * 24 * F32)


def scan_loss(params, x, target):
    x, _ = lax.scan(lambda x, p: (jax.nn.relu(x @ p), None), x, params["layers"])
    return ((x @ params["head"]) * target).sum()


def test_scanned_layers_are_counted_each_time():
    params = {"layers": struct(3, 20, 20), "head": struct(20, 10)}
    stacked = jnp.stack([basis(20, 4)] * 3)
    factors = Factors({"layers": LayerFactors({"feature": stacked})})
    report = lance_jax.report(scan_loss, params, *DENSE_BATCH, factors=factors)
    assert rows(report)["layers"].bytes == 3 * 6 * 4 * F32
    assert rows(report)["layers"].bytes_backprop == 3 * 6 * 20 * F32
    masks = 3 * bits(6, 20)
    assert report.saved_bytes.total == 3 * 6 * 4 * F32 + 6 * 20 * F32 + masks
    assert report.factor_bytes == 3 * 20 * 4 * F32


def test_macs():
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH)
    found = rows(report)
    stem, body, head = 4 * 256 * 27 * 8, 4 * 64 * 72 * 16, 4 * 16 * 10
    assert found["stem/kernel"].macs_forward == stem
    assert found["body/kernel"].macs_forward == body
    assert found["head/kernel"].macs_forward == head
    assert found["body/kernel"].macs_dx == body and found["body/kernel"].macs_dw == body
    assert found["head/kernel"].macs_dx == head and found["head/kernel"].macs_dw == head
    layers = lance_jax.layers(conv_loss, CONV, *CONV_BATCH)
    assert [layer.macs for layer in layers] == [stem, body, head]


def test_macs_of_a_weight_gradient_from_the_core():
    factors = Factors({"second/kernel": LayerFactors({"feature": basis(24, 3)})})
    row = rows(lance_jax.report(dense_loss, DENSE, *DENSE_BATCH, factors=factors))["second/kernel"]
    assert row.macs_dx == 6 * 24 * 16
    assert row.macs_dw == 6 * 3 * 16 + 24 * 3 * 16  # U . (core^T dY)

    row = rows(lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS))["body/kernel"]
    plain = 4 * 64 * 72 * 16
    assert row.macs_dx == plain
    assert 0 < row.macs_dw < plain


def test_ranks():
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)
    assert dict(rows(report)["body/kernel"].ranks) == {"height": 5, "width": 6, "channel": 4}
    assert dict(rows(report)["head/kernel"].ranks) == {"feature": 2}
    assert not rows(report)["stem/kernel"].ranks


def test_rows_stand_in_order_of_use():
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH)
    paths = [row.path for row in report.layers]
    assert paths == ["stem/kernel", "body/kernel", "head/kernel"]
    assert [row.kind for row in report.layers] == ["conv", "conv", "dense"]


def test_table():
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)
    lines = str(report).splitlines()
    for path, row in rows(report).items():
        (line,) = [line for line in lines if path in line.split()]
        assert f"{row.bytes:,}" in line and f"{row.macs_dw:,}" in line


def test_nothing_is_executed():
    lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)
    before = {id(a) for a in jax.live_arrays()}
    executed = []

    def loss(params, x, target):
        jax.debug.callback(executed.append, x.sum())
        return conv_loss(params, x, target)

    report = lance_jax.report(loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)
    jax.effects_barrier()
    assert executed == []
    assert [a for a in jax.live_arrays() if id(a) not in before and a.size > 1] == []
    arrays = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (CONV, *CONV_BATCH))
    assert str(lance_jax.report(conv_loss, *arrays, factors=CONV_FACTORS)) == str(report)


def test_factors_as_shapes():
    """A plan needs no factors, only their ranks."""
    factors = jax.eval_shape(lambda: CONV_FACTORS)
    report = lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=factors)
    assert report == lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=CONV_FACTORS)


def test_auxiliary_output_is_no_cost():
    """What the loss returns beside its value is the caller's, kept for the backward pass or not."""

    def loss(params, x, target):
        return dense_loss(params, x, target), {"norm": jnp.square(x).sum()}

    assert str(lance_jax.report(loss, DENSE, *DENSE_BATCH)) == str(
        lance_jax.report(dense_loss, DENSE, *DENSE_BATCH)
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"(?s)body/kernl.*body/kernel"):
        factors = Factors({"body/kernl": LayerFactors({"channel": basis(8, 2)})})
        lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=factors)
    with pytest.raises(ValueError, match=r"(?s)body/kernel.*channel"):
        factors = Factors({"body/kernel": LayerFactors({"channel": basis(9, 2)})})
        lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=factors)
    with pytest.raises(ValueError, match="bodie"):
        lance_jax.report(conv_loss, CONV, *CONV_BATCH, trainable="bodie")
    with pytest.raises(ValueError, match="batch"):
        factors = Factors({"head/kernel": LayerFactors({"batch": basis(5, 2)})})
        lance_jax.report(conv_loss, CONV, *CONV_BATCH, factors=factors)


def test_a_loss_that_is_compressed_already():
    kept = {"w": LayerFactors({}, core_dtype="int8")}
    fast = lance_jax.compress(lambda params, x: x @ params["w"], kept)

    def loss(params, x, y):
        return jnp.mean((fast(params, x) - y) ** 2)

    params, batch = {"w": jnp.ones((4, 3))}, (jnp.ones((5, 4)), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="loss_fn is compressed already; report takes the plain"):
        lance_jax.report(loss, params, *batch)
