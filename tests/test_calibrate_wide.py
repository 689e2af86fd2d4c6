"""Calibration of wide modes: bases from sketches, without any matrix of that side.

The border, 4096, and the sketch's 1024 columns are set to a tenth, so that the tests are fast.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import conv
from helpers import two_devices
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from tolerances import assert_close, tolerance

import lance_jax
from lance_jax import hosvd
from lance_jax.dense import gram

pytestmark = pytest.mark.usefixtures("exact_products")

WIDE, BORDER, COLUMNS = 410, 400, 100


@pytest.fixture(autouse=True)
def small_border(monkeypatch):
    monkeypatch.setattr(hosvd, "WIDEST", BORDER)
    monkeypatch.setattr(hosvd, "COLUMNS", COLUMNS)


def samples(m, n=WIDE, seed=0, dtype="float32"):
    """(m, n) whose energy falls from direction to direction, and which is mostly mean."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(m, m)) * 0.8 ** np.arange(m) @ generator.normal(size=(m, n))
    return np.asarray(x + generator.normal(size=n), dtype)


def project(params, x):
    return x @ params["w"]


def weight(n=WIDE, dtype="float32"):
    return {"w": np.random.default_rng(9).normal(size=(n, 3)).astype(dtype) / n}


def assert_wide(basis, columns, energy, dtype="float32") -> None:
    """The basis of few columns X (n, m) of a wide mode, against their exact leading subspace."""
    basis, columns = np.asarray(basis, np.float64), np.asarray(columns, np.float64)
    values = np.linalg.svd(columns, compute_uv=False) ** 2
    rank = int(np.argmax(np.cumsum(values) >= energy * values.sum())) + 1
    assert basis.shape == (len(columns), rank)
    assert_close(basis.T @ basis, np.eye(rank), dtype)
    held = np.sum((basis.T @ columns) ** 2)
    assert abs(held - values[:rank].sum()) <= tolerance(dtype) * values.sum()


def test_a_feature_mode_from_a_generator_with_a_short_last_batch():
    x = samples(24)
    batches = ((jnp.asarray(part),) for part in np.split(x, [10, 20]))
    fac = lance_jax.calibrate(project, weight(), batches, energy=0.95)
    assert fac["w"].bases["feature"].dtype == jnp.float32
    assert_wide(fac["w"].bases["feature"], x.T, 0.95)


def test_float64():
    x = samples(24, dtype="float64")
    with jax.enable_x64(True):
        params = weight(dtype="float64")
        fac = lance_jax.calibrate(project, params, [jnp.asarray(x)], energy=0.999)
        assert fac["w"].bases["feature"].dtype == jnp.float64
        assert_wide(fac["w"].bases["feature"], x.T, 0.999, "float64")


def test_about_the_mean():
    x = samples(24)
    batches = [jnp.asarray(part) for part in np.split(x, [10, 20])]
    fac = lance_jax.calibrate(project, weight(), batches, energy=0.9, center=True)
    mean = x.astype(np.float64).mean(0)
    assert_close(fac["w"].mean, mean, scale=np.abs(x).max())
    assert_wide(fac["w"].bases["feature"], (x - mean).T, 0.9)


@pytest.mark.parametrize("groups", [1, 2])
def test_patches(groups):
    """A 3x3 kernel on 46 channels a group: (n, r), or (groups, n, r) at one rank."""
    case = conv("wide", (2, 4, 4, 46 * groups), (3, 3, 46, 2), padding="SAME", groups=groups)
    x = case.tensors[1]
    fac = lance_jax.calibrate(
        case.apply, case.tensors[0], [jnp.asarray(x)] * 2, energy=0.9, modes=("patch",)
    )
    basis = np.asarray(fac["layer/kernel"].bases["patch"])
    patches = case.op.patches(x)
    energies = np.linalg.svd(patches, compute_uv=False) ** 2
    enough = np.cumsum(energies, 1) >= 0.9 * energies.sum(1, keepdims=True)
    rank = int(np.max(np.argmax(enough, 1))) + 1
    assert basis.shape == ((groups, 414, rank) if groups > 1 else (414, rank))
    for u, rows, one in zip(basis.reshape(groups, 414, rank), patches, energies, strict=True):
        assert_close(u.T @ u, np.eye(rank))
        assert_close(np.sum((rows @ u) ** 2), one[:rank].sum())
    fast = lance_jax.compress(case.apply, fac)
    params = case.tensors[0]
    np.testing.assert_array_equal(jax.jit(fast)(params, x), jax.jit(case.apply)(params, x))


def test_scanned_layers():
    """Stacked bases at one rank, each of its own step's input."""
    x = samples(12)
    generator = np.random.default_rng(1)
    params = {
        "w": generator.normal(size=(2, WIDE, 5)).astype(np.float32) / 10,
        "v": generator.normal(size=(5, WIDE)).astype(np.float32) * 3,
    }

    def apply(params, x):
        def body(x, w):
            return x + jnp.tanh(x @ w) @ params["v"], None

        return lax.scan(body, x, params["w"])[0]

    fac = lance_jax.calibrate(apply, params, [jnp.asarray(x)], energy=0.99, select="w")
    basis = np.asarray(fac["w"].bases["feature"], np.float64)
    seen = [x, x + np.tanh(x @ params["w"][0]) @ params["v"]]
    ranks = []
    for u, one in zip(basis, seen, strict=True):
        values = np.linalg.svd(one.astype(np.float64), compute_uv=False) ** 2
        ranks.append(int(np.argmax(np.cumsum(values) >= 0.99 * values.sum())) + 1)
        assert_close(u.T @ u, np.eye(basis.shape[-1]))
        assert_close(np.sum((one @ u) ** 2), values[: basis.shape[-1]].sum())
    assert len(set(ranks)) > 1  # or the test would not show that the largest is taken
    assert basis.shape == (2, WIDE, max(ranks))


@pytest.mark.parametrize("short", [100, 405])
def test_a_batch_mode_with_a_short_last_batch(short):
    """Whether the short one is itself wide, or has a Gram matrix of its own."""
    x = samples(6, WIDE + short).T
    batches = [jnp.asarray(x[:WIDE]), jnp.asarray(x[WIDE:])]
    options = {"modes": ("batch",), "energy": 0.9}
    fac = lance_jax.calibrate(project, weight(6), batches, **options)
    padded = np.zeros((WIDE, 6))
    padded[:short] = x[WIDE:]
    assert_wide(fac["w"].bases["batch"], np.concatenate([x[:WIDE], padded], 1), 0.9)


def test_two_devices():
    x = samples(24)
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))
    sharded = jax.device_put(jnp.asarray(x), sharding)
    fac = lance_jax.calibrate(project, weight(), [sharded], energy=0.95)
    assert_wide(fac["w"].bases["feature"], x.T, 0.95)


def test_more_inputs_than_the_sketch_has_columns():
    """The energy is there, in a few directions more than the fewest."""
    energies = np.arange(1, 131.0) ** -1.5
    generator = np.random.default_rng(2)
    x = generator.normal(size=(130, 130)) * np.sqrt(energies)
    x = (x @ generator.normal(size=(130, WIDE))).astype(np.float32)
    batches = [jnp.asarray(part) for part in np.split(x, 2)]
    fac = lance_jax.calibrate(project, weight(), batches, energy=0.9)
    basis = np.asarray(fac["w"].bases["feature"], np.float64)
    x = x.astype(np.float64)
    values = np.linalg.eigvalsh(x @ x.T)[::-1]
    rank = int(np.argmax(np.cumsum(values) >= 0.9 * values.sum())) + 1
    assert rank <= basis.shape[1] <= 1.1 * rank
    assert np.sum((x @ basis) ** 2) / np.sum(x**2) >= 0.9 - 2e-5


def test_an_energy_that_needs_too_many_directions():
    """One line that names the layer, the mode and what can be reached; which then can be."""
    x = np.random.default_rng(3).normal(size=(130, WIDE)).astype(np.float32)
    batches = [jnp.asarray(x)]
    with pytest.raises(ValueError, match="feature mode of 'w', 410 wide.*100 dir") as error:
        lance_jax.calibrate(project, weight(), batches, energy=0.98)
    (reached,) = re.findall(r"reaches (0\.\d+)", str(error.value))
    assert "0.98" in str(error.value)
    fac = lance_jax.calibrate(project, weight(), batches, energy=float(reached))
    basis = np.asarray(fac["w"].bases["feature"], np.float64)
    assert basis.shape[1] <= COLUMNS
    assert np.sum((x.astype(np.float64) @ basis) ** 2) >= float(reached) * np.sum(x**2)


def test_no_square_matrix(monkeypatch):
    """In all that is compiled there is a sketch, and nothing of the size of a Gram matrix."""
    case = conv("wide", (2, 4, 4, 46), (3, 3, 46, 2), padding="SAME")
    texts, jit = [], jax.jit

    def recorded(function, **options):
        def run(*args):
            texts.append(str(jax.make_jaxpr(function)(*args)))
            return jit(function, **options)(*args)

        return run

    monkeypatch.setattr(jax, "jit", recorded)
    lance_jax.calibrate(case.apply, case.tensors[0], [case.tensors[1]], modes=("patch",))
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", " ".join(texts))
    sizes = {shape: np.prod([int(n) for n in shape.split(",")]) for shape in shapes}
    assert f"414,{COLUMNS + 1}" in sizes
    assert max(sizes.values()) < 414**2 / 2


@pytest.mark.parametrize(("n", "columns"), [(BORDER, BORDER), (BORDER + 1, COLUMNS + 1)])
def test_the_border(n, columns):
    assert jax.eval_shape(lambda x: gram(x, 1), jnp.ones((2, n))).shape == (n, columns)


@pytest.mark.parametrize("task", ["protect", "allocate"])
def test_slices_of_a_wide_mode_reach_their_share_or_say_that_they_cannot(task):
    x, flat = samples(24), np.random.default_rng(0).normal(size=(400, WIDE)).astype("float32")

    def directions(batch, share):
        if task == "protect":
            slices = lance_jax.continual.protect(None, project, weight(), [batch], threshold=share)
            return slices.protected("w")
        factors = lance_jax.continual.allocate(None, project, weight(), [batch], energy=share)
        return factors["w"].update

    assert_wide(directions(x, 0.98), x.T, 0.98)
    told = r"the input of 'w': a share of 0\.98 .* the 100 directions .* \(410\) hold 0\.[3-7]"
    with pytest.raises(ValueError, match=told):
        directions(flat, 0.98)
