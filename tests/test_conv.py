"""Compressed convolutions: every property crossed with the table, and with drawn shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import properties
import pytest
import reference
from cases import CONV, PATH, Case, bases, columns, conv
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from properties import Plan
from tolerances import assert_close

import lance_jax

pytestmark = pytest.mark.usefixtures("exact_products")
table = pytest.mark.parametrize("case", CONV, ids=repr)


def sets_of(case: Case) -> dict[str, tuple[str, ...]]:
    """The sets of modes that each property is tested with."""
    op = case.op
    spatial = op.names[1:-1]
    sets = {
        "spatial": spatial,
        "batch and spatial": ("batch", *spatial),
        "patch": ("patch",),
        "batch and patch": ("batch", "patch"),
    }
    if op.groups == 1:
        sets |= {"default": op.default_modes, "channel": ("channel",)}
        sets |= {"paper": ("batch", *op.default_modes), "batch and channel": ("batch", "channel")}
    return sets


def plans_of(case: Case, share: float = 0.5) -> dict[str, Plan]:
    return {
        name: Plan(bases(case.op, modes, case.generator, share))
        for name, modes in sets_of(case).items()
    }


@table
def test_reference_is_the_convolution_and_its_gradients(case):
    with case.context():
        properties.assert_reference(case)


@table
def test_forward_is_bit_identical(case):
    with case.context():
        properties.assert_same_forward(case, plans_of(case)["batch and spatial"])


@table
def test_gradients_are_those_at_the_projected_input(case):
    """And a channel or patch basis alone projects the weight gradient orthogonally."""
    with case.context():
        plans = plans_of(case)
        dws = properties.assert_gradients(case, plans)
    for mode in {"channel", "patch"} & set(plans):
        properties.assert_projection(case, plans[mode].bases[mode], dws[mode], mode)


@table
def test_full_rank_is_plain_backprop(case):
    axes = tuple(mode for mode in case.op.modes if mode != "patch")
    with case.context():
        plans = {
            name: Plan(bases(case.op, modes, case.generator, share=1))
            for name, modes in {"axes": axes, "patch": ("patch",), "nothing": ()}.items()
        }
        for dw in properties.assert_gradients(case, plans).values():
            assert_close(dw, case.op.dweight(*case.tensors[1:]), case.dtype)


@pytest.mark.parametrize("case", [case for case in CONV if case.dtype == "float32"], ids=repr)
def test_stored_cores(case):
    """dW is plain backprop's at the input that the stored, dequantised core stands for."""
    default = bases(case.op, case.op.default_modes, case.generator)
    patch = bases(case.op, ("patch",), case.generator)
    plans = {f"default {t}": Plan(default, None, t) for t in ("bfloat16", "int8", "int4")}
    plans |= {"patch int4": Plan(patch, None, "int4"), "whole int4": Plan({}, None, "int4")}
    properties.assert_gradients(case, plans)
    for name, plan in plans.items():
        kept = reference.core(case.op, case.tensors[1], plan.bases)
        shape = kept.shape
        if name == "patch int4":
            shape = reference.side_by_side(shape)
        held = properties.held(case, plan)
        expected = reference.stored_bytes(shape, name.split()[1])
        assert properties.nbytes(held) == expected, (name, held)


@table
def test_nothing_but_the_core_is_held(case):
    with case.context():
        properties.assert_only_the_core_is_held(case, plans_of(case))


@table
def test_centred(case):
    """The mean's share of dW is exact, and only the rest is projected."""
    with case.context():
        _, x, _ = case.tensors
        mean = np.asarray(x, np.float64).mean(case.op.batch_axis)
        drawn = bases(case.op, case.op.default_modes, case.generator, share=0.3)
        plans = {"centred": Plan(drawn, mean)}
        if case.dtype == "float32":
            patch = bases(case.op, ("patch",), case.generator, share=0.3)
            plans |= {"patch": Plan(patch, mean, "int8"), "whole": Plan({}, mean, "int4")}
        properties.assert_gradients(case, plans)


@pytest.mark.parametrize("dead", ["one channel", "everything"])
def test_all_zero_channels(dead):
    case = conv("dead", (3, 6, 5, 4), (3, 3, 4, 5))
    _, x, _ = case.tensors
    x[..., 1 if dead == "one channel" else slice(None)] = 0
    plans = {
        f"{modes} {core_dtype}": Plan(bases(case.op, modes, case.generator), None, core_dtype)
        for modes in ((), ("height", "width"), ("channel",))
        for core_dtype in (None, "bfloat16", "int8", "int4")
    }
    for dw in properties.assert_gradients(case, plans).values():
        assert dead == "one channel" or not np.any(dw)


def test_all_zero_channels_make_no_nan_on_the_way():
    case = conv("dead", (3, 4, 4, 4), (1, 1, 4, 5))
    params, x, _ = case.tensors
    x[..., 1] = 0
    fac = properties.factors(case, Plan({}, None, "int4"))
    with jax.debug_nans(True):
        jax.vjp(lance_jax.compress(case.apply, fac), params, x)


LARGE = {
    "k3": conv("k3", (8, 32, 32, 16), (3, 3, 16, 8), padding="SAME"),
    "k3 stride 2": conv("k3 s2", (8, 32, 32, 16), (3, 3, 16, 24), strides=(2, 2), padding="SAME"),
    "k3 to many": conv("k3 to many", (8, 16, 16, 8), (3, 3, 8, 64), padding="SAME"),
    "k1": conv("k1", (8, 32, 32, 16), (1, 1, 16, 8)),
    "k1 to many": conv("k1 to many", (8, 32, 32, 16), (1, 1, 16, 96)),
    "k1 stride 2": conv("k1 s2", (8, 32, 32, 16), (1, 1, 16, 8), strides=(2, 2)),
    "NCHW": conv("NCHW", (8, 16, 32, 32), (8, 16, 3, 3), layout=("NCHW", "OIHW", "NCHW")),
    "groups": conv("groups", (8, 32, 32, 16), (3, 3, 4, 8), groups=4),
    "depthwise stride 2": conv("dw s2", (8, 32, 32, 16), (3, 3, 1, 16), strides=(2, 2), groups=16),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_the_input_is_never_rebuilt(case):
    """Nor is anything of its size made on the way to the weight's gradient."""
    plans = plans_of(case, share=0.06)
    plans |= {f"{name}, int4": Plan(plan.bases, None, "int4") for name, plan in plans.items()}
    properties.assert_never_rebuilt(case, plans)


@pytest.mark.parametrize("modes", [("height", "width"), ("batch", "height", "width")], ids=str)
def test_not_even_where_that_would_be_cheaper(modes):
    case = conv("few channels", (8, 64, 64, 2), (1, 1, 2, 64))
    plan = Plan(bases(case.op, modes, case.generator, share=0.5))
    properties.assert_never_rebuilt(case, {"spatial": plan}, cheaper=False)


def test_input_dtype_and_weight_dtype_may_differ():
    """bfloat16 activations of float32 parameters: the gradient is float32 and of bfloat16 grade."""
    case = conv("mixed", (3, 6, 5, 4), (3, 3, 4, 5))
    params, x, dy = case.tensors
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    drawn = bases(case.op, case.op.default_modes, case.generator)

    def apply(params, x):
        return case.function(x, params["layer"]["kernel"].astype(jnp.bfloat16))

    fast = lance_jax.compress(apply, properties.factors(case, Plan(drawn)))

    @properties.quick_jit
    def run(params, x, dy):
        y, pull = jax.vjp(lambda params: fast(params, x), params)
        return y, *pull(dy)

    y, grads = run(params, x, dy)
    assert y.dtype == jnp.bfloat16
    assert grads["layer"]["kernel"].dtype == jnp.float32
    expected = reference.dweight(case.op, x, np.asarray(dy, np.float64), drawn)
    assert_close(grads["layer"]["kernel"], expected, "bfloat16")


def test_precision_and_preferred_element_type_pass_through():
    case = conv("preferred", (3, 6, 5, 4), (3, 3, 4, 5), "bfloat16")
    params, x, _ = case.tensors

    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["layer"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=case.op.layout,
            precision=("high", "highest"),
            preferred_element_type=jnp.float32,
        )

    drawn = bases(case.op, ("channel",), case.generator)
    fast = lance_jax.compress(apply, properties.factors(case, Plan(drawn)))
    kept, plain = (jax.make_jaxpr(f)(params, x) for f in (fast, apply))
    found = [
        [
            (eqn.params["precision"], eqn.params["preferred_element_type"])
            for eqn in properties.equations(jaxpr.jaxpr)
            if eqn.primitive is lax.conv_general_dilated_p
        ]
        for jaxpr in (kept, plain)
    ]
    assert found[0] == found[1]

    @properties.quick_jit
    def run(params, x):
        y, pull = jax.vjp(fast, params, x)
        return y, *pull(y)

    y, grads, dx = run(params, x)
    assert y.dtype == jnp.float32
    assert dx.dtype == grads["layer"]["kernel"].dtype == jnp.bfloat16


def test_a_kernel_that_is_laid_out_anew():
    """The gradient arrives in the layout in which the parameter is stored."""
    case = conv("OIHW kernel", (3, 6, 5, 4), (3, 3, 4, 5))
    params, x, dy = case.tensors
    stored = {"layer": {"kernel": params["layer"]["kernel"].transpose(3, 2, 0, 1).reshape(20, 9)}}

    def apply(params, x):
        kernel = params["layer"]["kernel"].reshape(5, 4, 3, 3).transpose(2, 3, 1, 0)
        return case.function(x, kernel)

    drawn = bases(case.op, ("height", "channel"), case.generator)
    fast = lance_jax.compress(apply, properties.factors(case, Plan(drawn)))

    @properties.quick_jit
    def run(params, x, dy):
        return jax.vjp(lambda params: fast(params, x), params)[1](dy)[0]

    grads = run(stored, x, dy)
    expected = reference.dweight(case.op, x, dy, drawn).transpose(3, 2, 0, 1).reshape(20, 9)
    assert_close(grads["layer"]["kernel"], expected)


def test_a_convolution_that_cannot_be_compressed_is_listed():
    x, kernel = jnp.ones((4, 5, 5, 3)), jnp.ones((2, 2, 3, 4))

    def apply(params, x):
        return lax.conv_general_dilated(
            x,
            params["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            batch_group_count=2,
        )

    found = lance_jax.layers(apply, {"kernel": kernel}, x)
    assert not found
    assert [skip.path for skip in found.skipped] == ["kernel"]
    assert "batch_group_count" in found.skipped[0].reason


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"channel": (5, 2)}, ["channel", "(5, 2)", "4", PATH]),
        ({"channel": (4, 5)}, ["channel", "4", PATH]),
        ({"channel": (1, 4, 2)}, ["channel", "4", PATH]),
        ({"patch": (4, 9, 2)}, ["patch", "36", PATH]),
        ({"feature": (4, 2)}, ["feature", "channel", PATH]),
        ({"depth": (4, 2)}, ["depth", "height", PATH]),
        ({"batch": (4, 2)}, ["batch", "3", PATH]),
        ({"patch": (36, 2), "channel": (4, 2)}, ["patch", "channel", PATH]),
    ],
)
def test_a_basis_that_does_not_fit(bad, words):
    case = conv("bad", (3, 6, 5, 4), (3, 3, 4, 5))
    params, x, _ = case.tensors
    fac = properties.factors(case, Plan({mode: columns(shape) for mode, shape in bad.items()}))
    with pytest.raises(ValueError) as error:
        lance_jax.compress(case.apply, fac)(params, x)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("modes", [("channel",), ("height", "channel"), ("height",)], ids=str)
def test_an_output_without_elements(modes):
    """A kernel larger than its unpadded input: nothing comes out, and nothing goes back."""
    case = conv("empty", (2, 2, 2, 3), (5, 5, 3, 4))
    params = {"layer": {"kernel": jnp.ones((5, 5, 3, 4)), "bias": jnp.ones(4)}}
    x = jnp.ones((2, 2, 2, 3))
    fac = properties.factors(case, Plan(bases(case.op, modes, case.generator)))
    fast = lance_jax.compress(case.apply, fac)
    grads = jax.jit(jax.grad(lambda p, x: fast(p, x).sum(), (0, 1)))(params, x)
    assert not any(map(np.any, jax.tree.leaves(grads)))


def test_grouped_layers_have_no_channel_mode():
    case = conv("grouped", (3, 6, 5, 4), (3, 3, 2, 4), groups=2)
    params, x, _ = case.tensors
    (layer,) = lance_jax.layers(case.apply, params, x)
    assert dict(layer.modes) == {"batch": 3, "height": 6, "width": 5, "patch": 18}
    fac = properties.factors(case, Plan({"channel": np.eye(4)}))
    with pytest.raises(ValueError, match="channel"):
        lance_jax.compress(case.apply, fac)(params, x)


@table
def test_layers_describes_the_convolution(case):
    with case.context():
        params, x, _ = case.tensors
        (layer,) = lance_jax.layers(case.apply, params, x)
    op = case.op
    assert (layer.path, layer.kind, layer.uses) == (PATH, "conv", 1)
    assert (layer.input_shape, layer.weight_shape) == (op.x_shape, op.w_shape)
    assert dict(layer.modes) == op.modes
    y_size = op.forward(x, params["layer"]["kernel"]).size
    assert layer.macs == y_size * op.modes["patch"]


@st.composite
def drawn_cases(draw):
    """Any convolution whose output is not empty."""
    ndim = draw(st.integers(1, 3))
    letters = "DHW"[3 - ndim :]
    layouts = []
    for ends in ("NC", "OI", "NC"):
        # lax reads the order of the spatial axes from the kernel's layout.
        order = list(letters) if ends == "OI" else draw(st.permutations(letters))
        for letter in ends:
            order.insert(draw(st.integers(0, len(order))), letter)
        layouts.append("".join(order))
    sizes = {}

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(ndim))

    kernel, dilation, x_dilation = (
        each(1, 3),
        each(1, 2),
        draw(st.sampled_from([(1,) * 3, (2,) * 3])),
    )
    padding = draw(st.sampled_from(["VALID", "explicit"]))
    pairs = list(zip(each(-1, 2), each(0, 2), strict=True))
    padding = pairs if padding == "explicit" or x_dilation[0] > 1 else padding
    spatial = tuple(
        (k - 1) * d + 1 + draw(st.integers(1, 3)) for k, d in zip(kernel, dilation, strict=True)
    )
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    sizes |= dict(zip(letters, spatial, strict=True)) | {
        "N": draw(st.integers(1, 3)),
        "C": channels,
    }
    weights = dict(zip(letters, kernel, strict=True))
    weights |= {"I": channels // groups, "O": groups * draw(st.integers(1, 3))}
    case = conv(
        "drawn",
        tuple(sizes[letter] for letter in layouts[0]),
        tuple(weights[letter] for letter in layouts[1]),
        layout=tuple(layouts),
        strides=each(1, 3),
        padding=padding,
        dilation=dilation,
        groups=groups,
        x_dilation=x_dilation,
    )
    modes = draw(st.sampled_from(list(sets_of(case).values())))
    return case, modes, draw(st.sampled_from([0.01, 0.5, 1]))


@given(drawn_cases())
def test_drawn_shapes(drawn):
    case, modes, share = drawn
    plan = Plan(bases(case.op, modes, case.generator, share))
    properties.assert_same_forward(case, plan)
    properties.assert_gradients(case, {"drawn": plan})
