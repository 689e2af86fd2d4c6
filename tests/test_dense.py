"""Compressed dense products: every property crossed with the table, and with drawn shapes."""

import itertools
import string

import jax
import jax.numpy as jnp
import numpy as np
import properties
import pytest
import reference
from cases import DENSE, PATH, Case, bases, columns, dense
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from properties import Plan
from tolerances import assert_close

import lance_jax

pytestmark = pytest.mark.usefixtures("exact_products")
table = pytest.mark.parametrize("case", DENSE, ids=repr)


def sets_of(case: Case) -> list[tuple[str, ...]]:
    """Every set of modes but the empty one."""
    modes = tuple(case.op.modes)
    sizes = range(1, len(modes) + 1)
    return [chosen for size in sizes for chosen in itertools.combinations(modes, size)]


def plans_of(case: Case, share: float = 0.5) -> dict[str, Plan]:
    return {
        "+".join(modes): Plan(bases(case.op, modes, case.generator, share))
        for modes in sets_of(case)
    }


@table
def test_reference_is_the_product_and_its_gradients(case):
    with case.context():
        properties.assert_reference(case)


@table
def test_forward_is_bit_identical(case):
    with case.context():
        properties.assert_same_forward(case, plans_of(case)["batch+feature"])


@table
def test_gradients_are_those_at_the_projected_input(case):
    """And a feature basis alone projects the weight gradient orthogonally."""
    with case.context():
        plans = plans_of(case)
        dws = properties.assert_gradients(case, plans)
    basis = plans["feature"].bases["feature"]
    properties.assert_projection(case, basis, dws["feature"], "feature")


@table
def test_full_rank_is_plain_backprop(case):
    with case.context():
        all_modes = bases(case.op, tuple(case.op.modes), case.generator, share=1)
        plans = {"all modes": Plan(all_modes), "nothing": Plan({})}
        for dw in properties.assert_gradients(case, plans).values():
            assert_close(dw, case.op.dweight(*case.tensors[1:]), case.dtype)


@pytest.mark.parametrize("case", [case for case in DENSE if case.dtype == "float32"], ids=repr)
def test_stored_cores(case):
    """dW is plain backprop's at the input that the stored, dequantised core stands for."""
    default = bases(case.op, case.op.default_modes, case.generator)
    plans = {f"default {t}": Plan(default, None, t) for t in ("bfloat16", "int8", "int4")}
    plans["whole int4"] = Plan({}, None, "int4")
    properties.assert_gradients(case, plans)
    for name, plan in plans.items():
        kept = reference.core(case.op, case.tensors[1], plan.bases)
        held = properties.held(case, plan)
        expected = reference.stored_bytes(kept.shape, name.split()[1])
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
        drawn = bases(case.op, ("feature",), case.generator, share=0.3)
        plans = {"centred": Plan(drawn, mean)}
        if case.dtype == "float32":
            plans["stored"] = Plan(drawn, mean, "int4")
        properties.assert_gradients(case, plans)


def test_all_zero_features():
    case = dense("dead", "btf,fo->bto", (3, 6, 6), (6, 5))
    case.tensors[1][..., 2] = 0
    plans = {t: Plan({}, None, t) for t in ("bfloat16", "int8", "int4")}
    for dw in properties.assert_gradients(case, plans).values():
        assert np.all(np.any(np.asarray(dw), axis=1) == (np.arange(6) != 2))


LARGE = {
    "tokens": dense("large", "btf,fo->bto", (8, 64, 96), (96, 32)),
    "to many": dense("large", "btf,fo->bto", (8, 64, 24), (24, 384)),
    "attention": dense("large", "bthd,hdm->btm", (8, 64, 4, 24), (4, 24, 32)),
    "experts": dense("large", "ebtd,edf->ebtf", (2, 8, 32, 96), (2, 96, 32)),
    "w @ x": dense("large", "fb,of->ob", (96, 256), (32, 96), lambda x, w: w @ x),
}


@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_the_input_is_never_rebuilt(case):
    """Nor is anything of its size made on the way to the weight's gradient."""
    plans = plans_of(case, share=0.06)
    plans |= {f"{name}, int4": Plan(plan.bases, None, "int4") for name, plan in plans.items()}
    properties.assert_never_rebuilt(case, plans)


@pytest.mark.parametrize("modes", [("token",), ("batch", "token")], ids=str)
def test_not_even_where_that_would_be_cheaper(modes):
    case = dense("few features", "btf,fo->bto", (8, 256, 4), (4, 32))
    plan = Plan(bases(case.op, modes, case.generator, share=0.5))
    properties.assert_never_rebuilt(case, {"tokens": plan}, cheaper=False)


def test_a_single_vector():
    """Without a batch axis there is the feature mode alone."""
    case = dense("vector", "f,fo->o", (6,), (6, 4))
    params, x, _ = case.tensors
    (layer,) = lance_jax.layers(case.apply, params, x)
    assert dict(layer.modes) == {"feature": 6}
    plan = Plan(bases(case.op, ("feature",), case.generator))
    properties.assert_same_forward(case, plan)
    properties.assert_gradients(case, {"feature": plan})


def test_input_dtype_and_weight_dtype_may_differ():
    """bfloat16 activations of float32 parameters: the gradient is float32 and of bfloat16 grade."""
    case = dense("mixed", "btf,fo->bto", (3, 4, 6), (6, 5))
    params, x, dy = case.tensors
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)
    drawn = bases(case.op, case.op.default_modes, case.generator)

    def apply(params, x):
        return x @ params["layer"]["kernel"].astype(jnp.bfloat16)

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
    case = dense("preferred", "bf,fo->bo", (5, 6), (6, 4), dtype="bfloat16")
    params, x, _ = case.tensors

    def apply(params, x):
        kernel = params["layer"]["kernel"]
        return jnp.dot(x, kernel, precision=("high", "highest"), preferred_element_type=jnp.float32)

    drawn = bases(case.op, ("feature",), case.generator)
    fast = lance_jax.compress(apply, properties.factors(case, Plan(drawn)))
    jaxpr = jax.make_jaxpr(fast)(params, x)
    found = [
        (eqn.params["precision"], eqn.params["preferred_element_type"])
        for eqn in properties.equations(jaxpr.jaxpr)
        if eqn.primitive is lax.dot_general_p and eqn.outvars[0].aval.shape == (5, 4)
    ]
    assert found == [((lax.Precision.HIGH, lax.Precision.HIGHEST), jnp.float32)]

    @properties.quick_jit
    def run(params, x):
        y, pull = jax.vjp(fast, params, x)
        return y, *pull(y)

    y, grads, dx = run(params, x)
    assert y.dtype == jnp.float32
    assert dx.dtype == grads["layer"]["kernel"].dtype == jnp.bfloat16


def test_a_tied_weight_adds_the_gradients_of_its_uses():
    """An embedding's gather is exact; its use as the head is compressed."""
    generator = np.random.default_rng(0)
    table = generator.normal(size=(7, 6)).astype(np.float32)
    ids = np.array([[0, 3, 3], [6, 1, 0]])
    dy = generator.normal(size=(2, 3, 7)).astype(np.float32)

    def apply(params, ids):
        return jnp.tanh(params["embedding"][ids]) @ params["embedding"].T

    params = {"embedding": jnp.asarray(table)}
    (layer,) = lance_jax.layers(apply, params, ids)
    assert (layer.path, layer.uses) == ("embedding", 1)
    u = np.linalg.qr(generator.normal(size=(6, 2)))[0].astype(np.float32)
    fac = lance_jax.Factors({"embedding": lance_jax.LayerFactors({"feature": jnp.asarray(u)})})

    @properties.quick_jit
    def run(params, dy):
        return jax.vjp(lambda p: lance_jax.compress(apply, fac)(p, ids), params)[1](dy)[0]

    grads = run(params, dy)

    wide = table.astype(np.float64)
    x = np.tanh(wide[ids])
    expected = np.einsum("btf,bto->of", x @ reference.projector(u), dy)
    np.add.at(expected, ids, (1 - x**2) * np.einsum("bto,of->btf", dy, wide))
    assert_close(grads["embedding"], expected)


def test_two_uses_share_one_set_of_factors():
    generator = np.random.default_rng(1)
    w = generator.normal(size=(6, 6)).astype(np.float32) / 3
    x = generator.normal(size=(5, 6)).astype(np.float32)
    dy = generator.normal(size=(5, 6)).astype(np.float32)

    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    (layer,) = lance_jax.layers(apply, {"w": w}, x)
    assert (layer.uses, layer.macs) == (2, 2 * 5 * 6 * 6)
    u = np.linalg.qr(generator.normal(size=(6, 3)))[0].astype(np.float32)
    fac = lance_jax.Factors({"w": lance_jax.LayerFactors({"feature": jnp.asarray(u)})})

    @properties.quick_jit
    def run(params, dy):
        return jax.vjp(lambda p: lance_jax.compress(apply, fac)(p, x), params)[1](dy)[0]

    grads = run({"w": w}, dy)

    wide, p = w.astype(np.float64), reference.projector(u)
    hidden = np.tanh(x @ wide)
    dhidden = (1 - hidden**2) * (dy @ wide.T)
    assert_close(grads["w"], p @ hidden.T @ dy + p @ x.T.astype(np.float64) @ dhidden)


def test_a_weight_computed_from_parameters_is_listed():
    def apply(params, x):
        return x @ (params["w"] + params["a"] @ params["b"])

    params = {"w": jnp.ones((6, 4)), "a": jnp.ones((6, 2)), "b": jnp.ones((2, 4))}
    found = lance_jax.layers(apply, params, jnp.ones((5, 6)))
    assert not found
    assert any("w" in skip.path.split(" + ") for skip in found.skipped), found.skipped


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"feature": (5, 2)}, ["feature", "(5, 2)", "6", PATH]),
        ({"feature": (6, 7)}, ["feature", "6", PATH]),
        ({"feature": (1, 6, 2)}, ["feature", "(1, 6, 2)", PATH]),
        ({"token0": (4, 2)}, ["token0", "token", PATH]),
        ({"channel": (6, 2)}, ["channel", "feature", PATH]),
        ({"batch": (4, 2)}, ["batch", "3", PATH]),
    ],
)
def test_a_basis_that_does_not_fit(bad, words):
    case = dense("bad", "btf,fo->bto", (3, 4, 6), (6, 5))
    params, x, _ = case.tensors
    fac = properties.factors(case, Plan({mode: columns(shape) for mode, shape in bad.items()}))
    with pytest.raises(ValueError) as error:
        lance_jax.compress(case.apply, fac)(params, x)
    assert all(word in str(error.value) for word in words), error.value


def test_a_path_that_matches_no_layer_lists_near_misses():
    case = DENSE[0]
    params, x, _ = case.tensors
    fac = lance_jax.Factors({"layer/kernal": lance_jax.LayerFactors({"feature": jnp.eye(6)})})
    with pytest.raises(ValueError) as error:
        lance_jax.compress(case.apply, fac)(params, x)
    assert "layer/kernal" in str(error.value)
    assert PATH in str(error.value)


@table
def test_layers_describes_the_product(case):
    with case.context():
        params, x, _ = case.tensors
        (layer,) = lance_jax.layers(case.apply, params, x)
    op = case.op
    assert (layer.path, layer.kind, layer.uses) == (PATH, "dense", 1)
    assert layer.input_shape == op.x_shape
    assert sorted(layer.weight_shape) == sorted(op.w_shape)
    assert dict(layer.modes) == op.modes
    y_size = op.forward(x, params["layer"]["kernel"]).size
    assert layer.macs == y_size * op.modes["feature"]


@st.composite
def drawn_cases(draw):
    """Any product of an input with a weight, the axes of all three in any order."""
    kinds = {"shared": (0, 1), "free": (1, 3), "contracted": (1, 2), "out": (1, 2)}
    letters = iter(string.ascii_lowercase)
    axes = {
        kind: [next(letters) for _ in range(draw(st.integers(*count)))]
        for kind, count in kinds.items()
    }
    size = {letter: draw(st.integers(1, 4)) for group in axes.values() for letter in group}
    x, w, y = (
        "".join(draw(st.permutations(sum((axes[kind] for kind in kinds), []))))
        for kinds in (
            ("shared", "free", "contracted"),
            ("shared", "contracted", "out"),
            ("shared", "free", "out"),
        )
    )
    swap = draw(st.booleans())

    def function(a, b):
        return jnp.einsum(f"{w},{x}->{y}", b, a) if swap else jnp.einsum(f"{x},{w}->{y}", a, b)

    x_shape, w_shape = (tuple(size[letter] for letter in operand) for operand in (x, w))
    case = dense("drawn", f"{x},{w}->{y}", x_shape, w_shape, function)
    modes = draw(st.sampled_from(sets_of(case)))
    return case, modes, draw(st.sampled_from([0.01, 0.5, 1]))


@given(drawn_cases())
def test_drawn_shapes(drawn):
    case, modes, share = drawn
    plan = Plan(bases(case.op, modes, case.generator, share))
    properties.assert_same_forward(case, plan)
    properties.assert_gradients(case, {"drawn": plan})
