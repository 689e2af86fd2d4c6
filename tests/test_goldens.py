"""The published LANCE layers' own numbers: subspaces from their Gram matrices, and one step.

The golden files are no part of the repository; without them these tests are skipped.
"""

import jax
import numpy as np
import properties
import pytest
import reference
from cases import Case, conv, dense
from properties import Plan
from real_data import GOLDENS, needs_goldens
from tolerances import assert_close

import lance_jax

CONVS = ["k1s1", "k1s2", "k3s1p0", "k3s1p1", "k3s1p2d2", "k3s2p1", "k5s1p2"]
FILES = [f"conv_{name}" for name in CONVS] + ["dense_a", "dense_b"]
MODES = {
    "conv": {"b": "batch", "c": "channel", "h": "height", "w": "width"},
    "dense": {"b": "batch", "l": "token", "c": "feature"},
}

pytestmark = [pytest.mark.usefixtures("exact_products"), needs_goldens]
files = pytest.mark.parametrize("name", FILES)


def load(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Case]:
    """(arrays, bases by mode, the layer as a case with the file's tensors)."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        golden = dict(file)
    kind = name.split("_")[0]
    x, w, dy = golden["x"], golden["weight"], golden["dy"]
    if kind == "conv":
        stride, pad, dilation = (int(golden[k]) for k in ("stride", "padding", "dilation"))
        case = conv(
            name,
            x.shape,
            w.shape,
            layout=("NCHW", "OIHW", "NCHW"),
            strides=(stride, stride),
            padding=[(pad, pad)] * 2,
            dilation=(dilation, dilation),
        )
        bias = golden.get("bias", np.zeros(len(w), np.float32))[:, None, None]
    else:
        case = dense(name, "btf,of->bto", x.shape, w.shape, lambda x, w: x @ w.T)
        bias = golden["bias"]
    bias = bias[(None,) * (dy.ndim - bias.ndim)]
    vars(case)["tensors"] = ({"layer": {"kernel": w, "bias": bias}}, x, dy)
    bases = {mode: golden[f"u_{short}"] for short, mode in MODES[kind].items()}
    return golden, bases, case


@files
def test_subspaces(name):
    """Their rank, the first whose share *exceeds* the threshold, is ours where none equals it."""
    golden, bases, _ = load(name)
    shorts = MODES[name.split("_")[0]]
    for short, mode in shorts.items():
        u = lance_jax.subspace(golden[f"cov_{short}"], float(golden["threshold"]))
        assert u.shape == bases[mode].shape, mode
        assert_close(reference.projector(u), reference.projector(bases[mode]), what=mode)


@files
def test_one_step(name):
    golden, bases, case = load(name)
    plan = Plan(bases)
    params, x, dy = case.tensors
    y = jax.jit(lance_jax.compress(case.apply, properties.factors(case, plan)))(params, x)
    dparams, dx = properties.gradients(case, {name: plan})[name]
    assert_close(y, golden["y"], what="y")
    assert_close(dx, golden["dx"], what="dX")
    scale = np.abs(golden["dweight_exact"]).max()
    assert_close(dparams["layer"]["kernel"], golden["dweight"], scale=scale, what="dW")
    if "dbias" in golden:
        db = np.asarray(dparams["layer"]["bias"]).ravel()
        assert_close(db, golden["dbias"], what="db")
    assert_close(case.op.dweight(x, dy), golden["dweight_exact"], what="plain dW")
    assert np.abs(golden["dweight"] - golden["dweight_exact"]).max() > 0.01 * scale


@files
def test_the_core(name):
    """What is held is their core, in whatever order of its axes."""
    golden, bases, case = load(name)
    fac = properties.factors(case, Plan(bases))
    params, x, _ = case.tensors
    pull = jax.vjp(lance_jax.compress(case.apply, fac), params, x)[1]
    core = golden["core"]
    (held,) = properties.held(case, Plan(bases))
    assert sorted(held[0]) == sorted(core.shape)
    kept = [leaf for leaf in jax.tree.leaves(pull) if (leaf.shape, str(leaf.dtype)) == held]
    assert any(
        np.allclose(
            np.sort(leaf, axis=None), np.sort(core, axis=None), atol=1e-5 * np.abs(core).max()
        )
        for leaf in kept
    )
    assert_close(
        reference.core(case.op, x, bases),
        case.op.canonical(core) if name.startswith("conv") else core,
        what="core",
    )
