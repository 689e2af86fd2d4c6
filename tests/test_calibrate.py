"""Calibration: the bases of the summed Gram matrices, whatever the batches and the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from calibration import PATHS, assert_bases, calibrate, network, ops, setting, split
from cases import PATH, TABLE, inputs
from helpers import two_devices
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from reference import Conv
from tolerances import assert_close, tolerance

import lance_jax

pytestmark = pytest.mark.usefixtures("exact_products")


@functools.cache
def default_factors(center=False):
    return calibrate(center=center)


def grams_of(op, x, modes) -> dict[str, np.ndarray]:
    return {mode: reference.gram(op, x, mode) for mode in modes}


# --- every kind of layer -------------------------------------------------------------------------


@pytest.mark.parametrize("case", TABLE)
def test_table(case):
    """The right bases, and an error of X^ over the batches within the shares that were lost."""
    op = case.op
    params, x, _ = case.tensors
    batches = [np.asarray(x), np.asarray(inputs(case.generator, op.x_shape), x.dtype)]
    axes = tuple(mode for mode in op.modes if mode != "patch")
    for modes in (axes, ("patch",)) if isinstance(op, Conv) else (axes,):
        with case.context():
            given = [(jnp.asarray(batch),) for batch in batches]
            options = {"modes": modes, "energy": 0.8}
            fac = lance_jax.calibrate(case.apply, params, given, **options)
        layer = fac[PATH]
        parts = [grams_of(op, batch, modes) for batch in batches]
        grams = {mode: sum(part[mode] for part in parts) for mode in modes}
        at_least = "float64" if case.dtype == "float64" else "float32"
        assert_bases(layer, grams, 0.8, at_least)
        if modes == axes:
            lost = sum(reference.lost_share(grams[mode], layer.bases[mode]) for mode in modes)
            assert lost <= 0.2 * len(modes) + tolerance(at_least)
            error = whole = 0.0
            for batch in batches:
                rebuilt = reference.rebuild(op, reference.core(op, batch, layer.bases), layer.bases)
                error += np.sum((batch.astype(np.float64) - rebuilt) ** 2)
                whole += np.sum(batch.astype(np.float64) ** 2)
            assert np.sqrt(error / whole) <= np.sqrt(lost) + tolerance(at_least)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_a_network(energy):
    """Every layer's own input, all but batch and patch by default, a short batch at the end."""
    fac = calibrate(energy=energy)
    _, _, seen = setting()
    assert list(fac) == PATHS
    for path, op in ops().items():
        if energy < 1:
            assert_bases(fac[path], grams_of(op, seen[path], op.default_modes), energy)
        assert set(fac[path].bases) == set(op.default_modes)
        assert (fac[path].mean, fac[path].core_dtype) == (None, None)
    if energy == 1:
        assert fac["conv/kernel"].ranks == {"height": 5, "width": 6, "channel": 3}


@pytest.mark.parametrize("sizes", [(10,), (1,) * 10, (2, 5, 3)])
def test_every_sample_has_equal_weight(sizes):
    _, x, _ = setting()
    assert_same(calibrate(split(x, *sizes)), default_factors())


def assert_same(fac, other, dtype="float32") -> None:
    assert list(fac) == list(other)
    for path, layer in fac.items():
        assert set(layer.bases) == set(other[path].bases)
        for mode, basis in layer.bases.items():
            expected = reference.projector(other[path].bases[mode])
            # Eigenvectors move by the rounding of the Gram matrix over the gap between eigenvalues.
            assert_close(reference.projector(basis), expected, dtype, scale=10, what=(path, mode))


def test_batches_of_any_kind():
    """Lone arrays in a list, or a generator of tuples, read once; also where a mean is wanted."""
    _, x, _ = setting()
    parts = split(x, 4, 4, 2)
    for center in (False, True):
        tuples = ((part,) for part in parts)
        assert_same(calibrate(tuples, center=center), default_factors(center))


def test_several_arguments():
    params, x, _ = setting()

    def scaled(params, x, options, key):
        return network(params, options["scale"] * x) + jax.random.normal(key, ())

    key = jax.random.key(0)
    batches = [(part, {"scale": jnp.float32(2)}, key) for part in split(x, 4, 4, 2)]
    assert_same(calibrate(batches, apply=scaled), calibrate(split(2 * x, 4, 4, 2)))


def test_one_trace_for_each_batch_shape():
    """As many visits for ten batches as for two: nothing grows with the number of batches."""
    _, x, _ = setting()
    counts = []
    for parts in (split(x[:4], 2, 2), split(x, *(2,) * 5) * 2):
        visits = 0

        def counted(params, x):
            nonlocal visits
            visits += 1
            return network(params, x)

        calibrate(parts, apply=counted)
        counts.append(visits)
    assert counts[0] == counts[1]


def test_the_arguments_are_left_alone():
    params, x, _ = setting()
    batch = jnp.asarray(x)
    calibrate([batch])
    np.testing.assert_array_equal(batch, x)
    assert not batch.is_deleted()
    assert set(params) == {"conv", "depthwise", "mix", "head"}


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True], ids=["scan", "scan and remat"])
def test_scanned_layers_share_the_largest_rank(remat):
    generator = np.random.default_rng(1)
    w = generator.normal(size=(3, 6, 6)).astype(np.float32) / 2
    x = inputs(generator, (8, 6)).astype(np.float32)

    def apply(params, x):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(jax.checkpoint(body) if remat else body, x, params["layers"]["w"])[0]

    params = {"layers": {"w": w}}
    *_, layer = lance_jax.layers(apply, params, x)
    assert (layer.path, layer.input_shape, layer.weight_shape) == ("layers/w", (8, 6), (6, 6))
    fac = calibrate([jnp.asarray(x)], params, apply, energy=0.8, select="layers/w")
    grams, hidden = [], x.astype(np.float64)
    for one in w:
        grams.append(hidden.T @ hidden)
        hidden = np.tanh(hidden @ one)
    ranks = [reference.smallest_rank(gram, 0.8) for gram in grams]
    assert len(set(ranks)) > 1  # or the test would not show that the largest is taken
    assert_bases(fac["layers/w"], {"feature": np.stack(grams)}, 0.8)


def test_a_scanned_weight_that_is_not_sliced_has_one_basis():
    """The same weight at every step: one set of factors, all steps' inputs in one Gram matrix."""
    generator = np.random.default_rng(2)
    w = generator.normal(size=(6, 6)).astype(np.float32) / 2
    x = inputs(generator, (8, 6)).astype(np.float32)

    def apply(params, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ params["w"]), None), x, None, length=3)[0]

    gram, hidden = np.zeros((6, 6)), x.astype(np.float64)
    for _ in range(3):
        gram += hidden.T @ hidden
        hidden = np.tanh(hidden @ w)
    assert lance_jax.layers(apply, {"w": w}, x)[0].uses == 3
    fac = calibrate([jnp.asarray(x)], {"w": w}, apply, energy=0.8)
    assert_bases(fac["w"], {"feature": gram}, 0.8)


def test_a_weight_used_twice():
    generator = np.random.default_rng(3)
    w = generator.normal(size=(6, 6)).astype(np.float32) / 2
    x = inputs(generator, (8, 6)).astype(np.float32)

    def apply(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    hidden = np.tanh(x.astype(np.float64) @ w)
    gram = x.T.astype(np.float64) @ x + hidden.T @ hidden
    for center in (False, True):
        fac = calibrate([jnp.asarray(x)], {"w": w}, apply, energy=0.9, center=center)
        if center:
            mean = np.concatenate([x, hidden]).mean(0)
            gram = gram - 16 * np.outer(mean, mean)
            assert_close(fac["w"].mean, mean)
        assert_bases(fac["w"], {"feature": gram}, 0.9)


def test_a_jitted_network_and_auxiliary_outputs():
    def wrapped(params, x):
        y = jax.jit(network)(params, x)
        return {"y": y, "count": jnp.argmax(y), "key": jax.random.key(0)}

    assert_same(calibrate(apply=wrapped), default_factors())


def test_lengths_may_differ_between_batches():
    """Where no chosen mode is the token mode."""
    generator = np.random.default_rng(4)
    w = generator.normal(size=(4, 5)).astype(np.float32)
    batches = [inputs(generator, (2, length, 4)).astype(np.float32) for length in (3, 7, 3)]
    fac = calibrate(
        [jnp.asarray(b) for b in batches], {"w": w}, lambda p, x: x @ p["w"], modes=("feature",)
    )
    rows = np.concatenate([batch.reshape(-1, 4) for batch in batches]).astype(np.float64)
    assert_bases(fac["w"], {"feature": rows.T @ rows}, 0.9)
    with pytest.raises(ValueError, match="token.*w"):
        calibrate([jnp.asarray(b) for b in batches], {"w": w}, lambda p, x: x @ p["w"])


def test_two_devices():
    _, x, _ = setting()
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))
    sharded = [jax.device_put(part, sharding) for part in split(x, 4, 4, 2)]
    assert_same(calibrate(sharded), default_factors())


# --- what to keep --------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [None, ("patch",), ("feature",)])
def test_centred(modes):
    fac = calibrate(center=True, modes=modes, energy=0.8)
    _, _, seen = setting()
    for path, layer in fac.items():
        op, x = ops()[path], seen[path].astype(np.float64)
        mean = x.mean(0)
        assert_close(layer.mean, mean, scale=np.abs(x).max(), what=path)
        wanted = [mode for mode in modes or op.default_modes if mode in op.modes]
        centred = grams_of(op, x - mean, wanted)
        assert_bases(layer, centred, 0.8, "float32")
    assert len(fac) == (4 if modes is None else 2)


def test_the_paper_keeps_all_axes_at_its_energy():
    _, x, _ = setting()
    parts = split(x, 5, 5)
    fac = calibrate(parts, modes="paper")
    seen = [{}, {}]
    for part, into in zip(parts, seen, strict=True):
        network(setting()[0], part, lambda path, x, into=into: into.update({path: np.asarray(x)}))
    for path, op in ops(5).items():
        modes = [mode for mode in op.modes if mode != "patch"]
        both = [grams_of(op, one[path], modes) for one in seen]
        assert_bases(fac[path], {mode: both[0][mode] + both[1][mode] for mode in modes}, 0.7)


def test_factors_with_the_batch_mode_hold_for_one_batch_size():
    params, x, _ = setting()
    fac = calibrate(split(x, 5, 5), modes=("batch", "channel"))
    assert fac["conv/kernel"].bases["batch"].shape[0] == 5
    fast = lance_jax.compress(network, fac)
    fast(params, x[:5])
    with pytest.raises(ValueError, match=r"batch.*5|5.*batch") as error:
        fast(params, x[:4])
    assert "4" in str(error.value)


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (("channel",), {"conv/kernel": {"channel"}}),
        (("height",), {"conv/kernel": {"height"}, "depthwise/kernel": {"height"}}),
        (("patch",), {"conv/kernel": {"patch"}, "depthwise/kernel": {"patch"}}),
        (
            ("feature", "width"),
            {
                "conv/kernel": {"width"},
                "depthwise/kernel": {"width"},
                "mix/kernel": {"feature"},
                "head/kernel": {"feature"},
            },
        ),
        (["token"], {"mix/kernel": {"token"}}),
        ((), dict.fromkeys(PATHS, set())),
    ],
)
def test_modes_apply_where_a_layer_has_them(modes, expected):
    fac = calibrate(modes=modes, core_dtype="int4")
    assert {path: set(layer.bases) for path, layer in fac.items()} == expected
    assert all(layer.core_dtype == "int4" for layer in fac.values())
    left = [path for path in PATHS if path not in expected]
    assert [skip.path for skip in fac.skipped] == left


def test_whole_inputs_in_low_precision():
    """modes=(): no basis, so that the layer keeps its whole input in core_dtype."""
    params, x, _ = setting()
    fac = calibrate(modes=(), core_dtype="int8", select="mix")
    assert list(fac) == ["mix/kernel"]
    fast = lance_jax.compress(network, fac)
    np.testing.assert_array_equal(jax.jit(fast)(params, x), jax.jit(network)(params, x))


@pytest.mark.parametrize("core_dtype", [None, "bfloat16", "int8", "int4"])
def test_the_core_dtype_is_handed_on(core_dtype):
    fac = calibrate(core_dtype=core_dtype, select="head")
    assert fac["head/kernel"].core_dtype == core_dtype


# --- which layers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, PATHS),
        ("conv", ["conv/kernel"]),
        ("kernel", PATHS),
        (r"^(mix|head)/", ["mix/kernel", "head/kernel"]),
        (["head", "^conv"], ["conv/kernel", "head/kernel"]),
        (("mix",), ["mix/kernel"]),
        (lance_jax.last(1), ["mix/kernel"]),
        (lance_jax.last(2), ["conv/kernel", "mix/kernel"]),
        (lambda layer: layer.kind == "dense", ["mix/kernel", "head/kernel"]),
        (lambda layer: "channel" in layer.modes, ["conv/kernel"]),
    ],
)
def test_select(select, expected):
    assert list(calibrate(select=select, modes=())) == expected


def test_all_selects_agree_on_the_bases():
    alone = lance_jax.Factors({"mix/kernel": default_factors()["mix/kernel"]})
    assert_same(calibrate(select="mix"), alone)


# --- bad input -----------------------------------------------------------------------------------
