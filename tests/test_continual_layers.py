"""`lance_jax.continual` on every layer of the table: slices, updates, and what is kept."""

import jax
import numpy as np
import pytest
import reference
from cases import PATH, TABLE, inputs
from helpers import equations, nbytes
from properties import quick_jit, rows_of
from tolerances import assert_close

import lance_jax
from lance_jax import Factors, LayerFactors, continual, conv, jaxprs
from lance_jax.layers import find

pytestmark = pytest.mark.usefixtures("exact_products")
cases = pytest.mark.parametrize("case", TABLE, ids=repr)


def tasks_of(case):
    """(parameters, inputs of an old and of a new task, cotangent).

    The old task's inputs have few directions, in any view of them: most of them are zero.
    """
    params, x, dy = case.tensors
    old = inputs(case.generator, x.shape)
    channel = case.op.canonical(np.arange(x.size).reshape(x.shape)).reshape(-1)[::3]
    old.reshape(-1)[channel] = 0
    return params, old.astype(x.dtype), x, dy


def allocated(case, threshold=0.8, energy=0.9, **options):
    """(slices after the old task, factors of the new one)."""
    params, old, new, _ = tasks_of(case)
    slices = continual.protect(None, case.apply, params, [old], threshold=threshold)
    factors = continual.allocate(slices, case.apply, params, [new], energy=energy, **options)
    return slices, factors


def gradient(case, factors):
    """dW of the new task under the factors."""
    params, _, x, dy = tasks_of(case)

    @quick_jit
    def backward(factors, params, x, dy):
        return jax.vjp(lance_jax.compress(case.apply, factors), params, x)[1](dy)

    return backward(factors, params, x, dy)[0]["layer"]["kernel"]


def as_rows(case, dw):
    """dW as (groups, D, out), and a basis as (groups, D, r)."""
    return rows_of(case, np.asarray(dw, np.float64), mode_of(case))


def stacked(basis):
    basis = np.asarray(basis, np.float64)
    return basis if basis.ndim == 3 else basis[None]


def mode_of(case):
    return "feature" if "feature" in case.op.modes else "patch"


def test_patches_are_held_in_parts(monkeypatch):
    """As many samples at a time as `_PATCH_BYTES` allows, or one."""
    x, w = jax.ShapeDtypeStruct((8, 10, 10, 4), np.float32), np.zeros((3, 3, 4, 5), np.float32)

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    op = find(jaxprs.trace(apply, {"w": w}, x)).uses["w"][0].of_product()
    sample = 10 * 10 * 36 * 4  # bytes of the patches of one

    def largest(most):
        monkeypatch.setattr(conv, "_PATCH_BYTES", most)
        found = equations(jax.make_jaxpr(lambda x: op.gram(x, "patch"))(x).jaxpr)
        arrays = [v.aval for eqn in found for v in eqn.outvars]
        return max(a.size * a.dtype.itemsize for a in arrays if 36 in a.shape)

    assert largest(8 * sample) == 8 * sample
    assert largest(3 * sample) == 2 * sample  # the parts are of one size
    assert largest(sample // 2) == sample


@cases
def test_slices_hold_what_the_task_needs(case):
    with case.context():
        params, old, new, _ = tasks_of(case)
        slices = continual.protect(None, case.apply, params, [old], threshold=0.8)
        slices = continual.protect(slices, case.apply, params, [new], threshold=0.9)
    assert slices.tasks == 2
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(slices))
    first, both = stacked(slices[PATH][0]), stacked(slices.protected(PATH))
    for x, basis, threshold in ((old, first, 0.8), (new, both, 0.9)):
        for gram, u in zip(stacked(reference.gram(case.op, x, mode_of(case))), basis, strict=True):
            used = u[:, u.any(0)]
            np.testing.assert_allclose(used.T @ used, np.eye(used.shape[1]), atol=1e-6)
            assert np.trace(used.T @ gram @ used) >= threshold * np.trace(gram) * (1 - 1e-4)


@cases
@pytest.mark.parametrize("by_update", [False, True])
def test_the_gradient_is_confined_to_directions_orthogonal_to_the_slices(case, by_update):
    with case.context():
        slices, factors = allocated(case, core_dtype=None)
        u = factors[PATH].update
        kept = LayerFactors({}, update=u, update_core=by_update)
        dw = gradient(case, Factors({PATH: kept}))
    _, _, x, dy = tasks_of(case)
    plain = as_rows(case, case.op.dweight(x, dy))
    scale, u = np.abs(plain).max(), stacked(u)
    assert_close(as_rows(case, dw), reference.projector(u) @ plain, case.dtype, scale, "dW")
    leaked = np.swapaxes(stacked(slices.protected(PATH)), 1, 2) @ as_rows(case, dw)
    assert np.abs(leaked).max() <= (1e-5 if case.dtype != "bfloat16" else 1e-2) * scale


@cases
@pytest.mark.parametrize("core_dtype", ["bfloat16", "int8", "int4"])
def test_the_same_update_confines_whatever_is_kept(case, core_dtype):
    with case.context():
        _, factors = allocated(case, core_dtype=core_dtype)
        u = factors[PATH].update
        inputs_kept = LayerFactors({}, core_dtype=core_dtype, update=u)
        dw = gradient(case, Factors({PATH: inputs_kept}))
    _, _, x, dy = tasks_of(case)
    plain = as_rows(case, reference.dweight(case.op, x, dy, {}, None, core_dtype))
    got, want = as_rows(case, dw), reference.projector(stacked(u)) @ plain
    # the scales of low bits are float32
    dtype = "bfloat16" if case.dtype == "bfloat16" else "float32"
    assert_close(got, want, dtype, np.abs(plain).max(), "dW")


@cases
def test_an_update_as_well_as_bases(case):
    """Bases decide what is kept, the update what is done with it."""
    with case.context():
        _, factors = allocated(case)
        params, _, x, dy = tasks_of(case)
        found = lance_jax.calibrate(
            case.apply, params, [x], energy=0.9, modes=case.op.default_modes
        )
        bases = found[PATH].bases
        layer = LayerFactors(bases, update=factors[PATH].update)
        dw = gradient(case, Factors({PATH: layer}))
    exact = {mode: np.asarray(basis, np.float64) for mode, basis in bases.items()}
    plain = as_rows(case, reference.dweight(case.op, x, dy, exact))
    want = reference.projector(stacked(factors[PATH].update)) @ plain
    assert_close(as_rows(case, dw), want, case.dtype, np.abs(plain).max())


@cases
def test_keeps_the_smaller_of_input_and_core(case):
    with case.context():
        _, factors = allocated(case, core_dtype="int8")
        layer = factors[PATH]
        params, _, x, dy = tasks_of(case)

        def loss_of(apply_fn):
            return lambda params, x: (apply_fn(params, x) * dy).sum()

        step = lance_jax.value_and_grad(
            loss_of(lance_jax.compress(case.apply, factors)), trainable=PATH
        )
        _, saved = step.forward(params, x)
        report = lance_jax.report(loss_of(case.apply), params, x, factors=factors, trainable=PATH)
    core = reference.core(case.op, x, {mode_of(case): np.asarray(layer.update)})
    shape = reference.side_by_side(core.shape) if mode_of(case) == "patch" else core.shape
    of_core = reference.stored_bytes(shape, "int8")
    of_input = reference.stored_bytes(case.op.canonical_shape, "int8")
    assert layer.update_core == (of_core < of_input)
    (row,) = report.layers
    assert row.bytes == min(of_core, of_input) == nbytes(jax.tree.leaves(saved))
    assert row.update == layer.update.shape[-1]
    assert str(row.update) in repr(report)


@cases
def test_a_layer_without_a_free_direction_is_frozen(case):
    with case.context():
        params, _, x, dy = tasks_of(case)
        slices = continual.protect(None, case.apply, params, [x], threshold=1.0)
        factors = continual.allocate(slices, case.apply, params, [x])
        again = continual.protect(slices, case.apply, params, [x], threshold=0.99)
        dw = gradient(case, factors)
    assert factors[PATH].frozen
    assert "frozen" in repr(factors)
    assert again[PATH][1] is None
    assert not np.asarray(dw).any()


@cases
def test_scaled_slices_come_back_by_their_importance(case):
    scale = 3.0
    with case.context():
        slices, factors = allocated(case, core_dtype=None, scale=scale)
        _, plain_factors = allocated(case, core_dtype=None)
        dw = gradient(case, factors)
    _, _, x, dy = tasks_of(case)
    plain = as_rows(case, case.op.dweight(x, dy))
    u = stacked(factors[PATH].update)
    scaled = reference.projector(u) @ plain
    assert_close(as_rows(case, dw), scaled, case.dtype, np.abs(plain).max(), "U U^T dW")
    # U U^T = the plain projector, and P diag(1 - importance) P^T
    old, protected = tasks_of(case)[1], stacked(slices.protected(PATH))
    want = np.zeros((len(u), u.shape[1], u.shape[1]))
    want += reference.projector(stacked(plain_factors[PATH].update))
    for i, gram in enumerate(stacked(reference.gram(case.op, old, mode_of(case)))):
        s = np.sqrt(np.maximum(np.diag(protected[i].T @ gram @ protected[i]), 0))
        s = s / s.max()
        importance = (scale + 1) * s / (scale * s + 1)
        want[i] += protected[i] * (1 - importance) @ protected[i].T
    np.testing.assert_allclose(reference.projector(u), want, atol=1e-3)
