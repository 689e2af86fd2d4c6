"""`lance_jax.continual` over the tasks of a network: what a task learns changes no other."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import equations, random

import lance_jax
from lance_jax import Factors, LayerFactors, continual

pytestmark = pytest.mark.usefixtures("exact_products")


def network(params, x):
    """(N, 8, 8, 3) -> (N, 5): a convolution, a depthwise one, a strided one, and two dense layers.

    Without biases, so that all that a task trains is weights.
    """
    return inputs_and_output(params, x)[1]


def inputs_and_output(params, x):
    """What enters each layer, and what comes out at the end."""

    def conv(x, w, stride=1, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    b = jax.nn.relu(conv(x, params["a"]))
    c = jax.nn.relu(conv(b, params["b"], groups=12))
    d = jax.nn.relu(conv(c, params["c"], stride=2)).reshape(len(x), -1)
    e = jax.nn.relu(d @ params["d"])
    return {"a": x, "b": b, "c": c, "d": d, "e": e}, e @ params["e"]


PARAMS = {
    "a": random(3, 3, 3, 12, seed=1) / 4,
    "b": random(3, 3, 1, 12, seed=2) / 3,
    "c": random(3, 3, 12, 8, seed=3) / 8,
    "d": random(128, 40, seed=4) / 8,
    "e": random(40, 5, seed=5) / 6,
}


def task(seed, n=24):
    """Pictures (n, 8, 8, 3) of few directions, another few for each seed."""
    rng = np.random.default_rng(seed)
    patterns = rng.normal(size=(3, 8, 8, 3))
    x = np.tensordot(rng.normal(size=(n, 3)), patterns, 1)
    return jnp.asarray(x, jnp.float32), jnp.asarray(rng.integers(0, 5, n))


def loss_of(apply_fn):
    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y).mean()

    return loss


def train(params, optimizer, factors, x, y, steps=5):
    """Trained parameters, and the gradients of each step."""
    step = lance_jax.value_and_grad(loss_of(lance_jax.compress(network, factors)))
    state, history = optimizer.init(params), []
    for _ in range(steps):
        grads = step(params, x, y)[1]
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append((grads, updates))
    return params, history


def protected_rows(slices, updates):
    """P^T dW, relative to dW, of every layer."""
    for path, dw in updates.items():
        p = slices.protected(path)
        rows = np.asarray(dw, np.float64).reshape(-1, dw.shape[-1])
        # depthwise: a basis for each channel
        leaked = np.einsum("gdk,dg->gk", p, rows) if p.ndim == 3 else p.T @ rows
        yield path, np.abs(leaked).max(initial=0.0) / max(np.abs(rows).max(), 1e-30)


@pytest.mark.parametrize("core_dtype", [None, "int4"])
def test_sgd_with_momentum_leaves_old_tasks_alone(core_dtype):
    old, _ = task(0)
    x, y = task(1)
    slices = continual.protect(None, network, PARAMS, [old], threshold=1.0)
    factors = continual.allocate(slices, network, PARAMS, [x], core_dtype=core_dtype)
    assert not factors["d"].frozen
    params, history = train(PARAMS, optax.sgd(0.1, momentum=0.9), factors, x, y)
    for grads, updates in history:
        for found in (grads, updates):
            for path, leaked in protected_rows(slices, found):
                assert leaked < 1e-5, path
    before, after = network(PARAMS, old), network(params, old)
    assert np.abs(network(params, x) - network(PARAMS, x)).max() > 0.05
    np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))


def test_old_outputs_move_by_what_the_threshold_leaves_open():
    """A layer's output on old inputs changes by dW^T X: all of it that the slices lack."""
    old, _ = task(0)
    old = old + random(*old.shape, seed=9) / 3  # energy in all directions
    x, y = task(1)
    entered = inputs_and_output(PARAMS, old)[0]
    for threshold in (0.5, 0.9, 0.97, 0.99):
        slices = continual.protect(None, network, PARAMS, [old], threshold=threshold)
        factors = continual.allocate(slices, network, PARAMS, [x], core_dtype=None)
        params, _ = train(PARAMS, optax.sgd(0.1), factors, x, y)
        for path, layer in {
            "a": reference.Conv(old.shape, PARAMS["a"].shape, padding="SAME"),
            "c": reference.Conv(
                entered["c"].shape, PARAMS["c"].shape, strides=(2, 2), padding="SAME"
            ),
            "d": None,
            "e": None,
        }.items():
            x_old = np.asarray(entered[path], np.float64)
            gram = x_old.T @ x_old if layer is None else reference.gram(layer, x_old, "patch")
            rows = np.asarray(params[path] - PARAMS[path], np.float64).reshape(len(gram), -1)
            moved = np.trace(rows.T @ gram @ rows)
            bound = (1 - threshold) * np.trace(gram) * np.linalg.norm(rows, 2) ** 2
            assert moved <= bound * (1 + 1e-4), (path, threshold)
            assert moved > 0 or threshold > 0.9 or factors[path].frozen


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.01),
        optax.adamw(0.01, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
    ],
    ids=["adam", "adamw", "weight decay"],
)
def test_projected_updates_of_other_optimizers(optimizer):
    old, _ = task(0)
    x, y = task(1)
    slices = continual.protect(None, network, PARAMS, [old], threshold=1.0)
    factors = continual.allocate(slices, network, PARAMS, [x], core_dtype=None)
    projected = optax.chain(optimizer, continual.project_updates(factors, network, PARAMS, x))
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        _, history = train(PARAMS, optimizer, factors, x, y, 3)
        assert max(leaked for _, leaked in protected_rows(slices, history[-1][1])) > 1e-3
        params, history = train(PARAMS, projected, factors, x, y, 3)
    for _, updates in history:
        for path, leaked in protected_rows(slices, updates):
            assert leaked < 1e-5, path
    before = network(PARAMS, old)
    np.testing.assert_allclose(network(params, old), before, atol=1e-4 * np.abs(before).max())


def test_updates_are_of_the_tree_that_apply_fn_takes():
    """An optimiser over a part of it would be confined nowhere."""
    x, _ = task(0)

    def apply_fn(variables, x):
        return network(variables["params"], x)

    variables = {"params": PARAMS}
    slices = continual.protect(None, apply_fn, variables, [x], threshold=0.9)
    factors = continual.allocate(slices, apply_fn, variables, [task(1)[0]])
    for transform in (
        continual.project_updates(factors, apply_fn, variables, x),
        continual.project_out(slices, apply_fn, variables, x),
    ):
        transform.init(variables)
        transform.init({"params": {**PARAMS, "a": None, "b": optax.MaskedNode()}})
        for wrong in (transform.init, lambda tree, t=transform: t.update(tree, t.init(variables))):
            with pytest.raises(ValueError, match="no 'params/a', .* they have a, b, c, d, e"):
                wrong(PARAMS)
    with pytest.raises(ValueError, match="is a tuple; it must be a LayerFactors"):
        continual.project_updates(slices, apply_fn, variables, x)


def test_frozen_layers_get_no_update():
    x, y = task(1)
    factors = Factors({"d": LayerFactors({}, frozen=True)})
    optimizer = optax.chain(
        optax.sgd(0.01, momentum=0.9), optax.add_decayed_weights(-0.1),
        continual.project_updates(factors, network, PARAMS, x),
    )  # fmt: skip
    params, _ = train(PARAMS, optimizer, factors, x, y, 2)
    np.testing.assert_array_equal(params["d"], PARAMS["d"])
    assert np.abs(params["e"] - PARAMS["e"]).max() > 0


@pytest.mark.parametrize("scale", [None, 4.0])
def test_gradient_projection_takes_out_what_is_protected(scale):
    x, y = task(1)
    slices = continual.protect(None, network, PARAMS, [task(0)[0]], threshold=0.95)
    grads = jax.grad(loss_of(network))(PARAMS, x, y)
    lean = continual.project_out(slices, network, PARAMS, x, scale=scale)
    state = lean.init(PARAMS)
    found, _ = jax.jit(lean.update)(grads, state)
    if scale is None:
        for path, leaked in protected_rows(slices, found):
            assert leaked < 1e-5, path
    p = slices.protected("d").astype(np.float64)
    s = np.sqrt(slices.energies["d"][0])
    importance = np.ones(p.shape[1]) if scale is None else (scale + 1) * s / (scale * s + 1)
    dw = np.asarray(grads["d"], np.float64)
    np.testing.assert_allclose(found["d"], dw - p * importance @ p.T @ dw, atol=1e-6)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert shapes == {slices.protected(path).shape for path in slices}
    nothing = continual.project_out(None, network, PARAMS, x)
    same, _ = nothing.update(grads, nothing.init(PARAMS))
    np.testing.assert_array_equal(same["d"], grads["d"])


def test_a_step_holds_neither_slices_nor_projection_matrices():
    slices = None
    for seed in range(3):
        slices = continual.protect(slices, network, PARAMS, [task(seed)[0]], threshold=0.9)
    x, y = task(3)
    factors = continual.allocate(slices, network, PARAMS, [x])
    params, grads, saved = jax.tree.map(jnp.copy, PARAMS), None, None
    step = lance_jax.value_and_grad(loss_of(lance_jax.compress(network, factors)))
    before = {id(a) for a in jax.live_arrays()}
    _, saved = step.forward(params, x, y)
    held = [a.shape for a in jax.live_arrays() if id(a) not in before]
    grads = step.backward(saved, params, x, y)
    forbidden = {s.shape for path in slices for s in slices[path] if s is not None}
    forbidden |= {slices.protected(path).shape for path in slices}
    forbidden |= {(d, d) for d in (27, 9, 108, 128, 40)}
    forbidden -= {layer.update.shape for layer in factors.values() if layer.update is not None}
    assert held and not forbidden & set(held)
    traced = jax.make_jaxpr(lambda *args: step(*args))(params, x, y).jaxpr
    inside = {v.aval.shape for eqn in equations(traced) for v in eqn.outvars}
    assert not forbidden & inside
    assert grads["a"].shape == PARAMS["a"].shape


def test_layers_in_a_scan_have_stacked_slices_and_updates():
    params = {"w": random(4, 10, 10, seed=1) / 3, "head": random(10, 3, seed=2)}

    def apply_fn(params, x):
        x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["w"])[0]
        return x @ params["head"]

    rng = np.random.default_rng(0)
    old = jnp.asarray(rng.normal(size=(3, 10)), jnp.float32)
    new = jnp.asarray(rng.normal(size=(20, 10)), jnp.float32)
    slices = continual.protect(None, apply_fn, params, [old], threshold=0.9)
    factors = continual.allocate(slices, apply_fn, params, [new])
    assert slices.protected("w").shape[:2] == factors["w"].update.shape[:2] == (4, 10)

    def loss(params, x):
        return (lance_jax.compress(apply_fn, factors)(params, x) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params, new)
    leaked = np.einsum("ldk,ldo->lko", slices.protected("w"), grads["w"])
    assert np.abs(leaked).max() < 1e-5 * np.abs(grads["w"]).max()
    confined = continual.project_updates(factors, apply_fn, params, new)
    updates, _ = confined.update(params, confined.init(params))
    leaked = np.einsum("ldk,ldo->lko", slices.protected("w"), updates["w"])
    assert np.abs(leaked).max() < 1e-5 * np.abs(updates["w"]).max()


def test_slices_are_a_frozen_pytree():
    x, _ = task(0)
    slices = continual.protect(None, network, PARAMS, [x], threshold=0.9, select=["a", "d"])
    slices = continual.protect(slices, network, PARAMS, [x], threshold=0.9, select=["a", "d"])
    assert set(slices) == {"a", "d"}
    assert slices["a"][1] is None  # the same task again
    same = jax.tree.map(lambda leaf: leaf, slices)
    assert same.tasks == 2 and same["a"][1] is None
    np.testing.assert_array_equal(same.protected("d"), slices.protected("d"))
    for path in slices:
        assert [len(e) for e in same.energies[path]] == [slices[path][0].shape[-1]] * 2
    assert slices.nbytes == slices["a"][0].nbytes + slices["d"][0].nbytes
    assert "27" in repr(slices) and "protected" in repr(slices)
    with pytest.raises(AttributeError, match="Slices is frozen"):
        slices.energies = {}


def test_before_the_first_task_everything_is_free():
    x, _ = task(0)
    factors = continual.allocate(
        None, network, PARAMS, [x], energy=1.0, select="a", core_dtype=None
    )
    gram = reference.gram(
        reference.Conv(x.shape, PARAMS["a"].shape, padding="SAME"), np.asarray(x), "patch"
    )
    u = np.asarray(factors["a"].update)
    assert np.trace(u.T @ gram @ u) == pytest.approx(np.trace(gram), rel=1e-5)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"energy": 0.0}, r"energy is 0\.0; it must be in \(0, 1\]"),
        ({"scale": 0.0}, "scale is 0.0; it must be None or a positive"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"rule": "gpm"}, "rule is 'gpm'; it must be one of"),
        ({"core_dtype": "int3"}, "core_dtype is 'int3'"),
        ({"select": "conv"}, "select 'conv' matches no layer"),
    ],
)
def test_bad_options_of_allocate(options, told):
    with pytest.raises(ValueError, match=told):
        continual.allocate(None, network, PARAMS, [task(0)[0]], **options)


def test_bad_input_of_protect_and_allocate():
    x, _ = task(0)
    with pytest.raises(ValueError, match=r"threshold is 2\.0; it must be in"):
        continual.protect(None, network, PARAMS, [x], threshold=2.0)
    with pytest.raises(ValueError, match="the input of 'a' holds NaN or Inf"):
        continual.protect(None, network, PARAMS, [x * np.nan], threshold=0.9)
    with pytest.raises(ValueError, match="batches is empty"):
        continual.protect(None, network, PARAMS, [], threshold=0.9)
    slices = continual.protect(None, network, PARAMS, [x], threshold=0.9, select="a")
    with pytest.raises(ValueError, match="the same layers after every task; b differs"):
        continual.protect(slices, network, PARAMS, [x], threshold=0.9, select=["a", "b"])
    with pytest.raises(ValueError, match="slices have no layer 'b'; they have a"):
        continual.allocate(slices, network, PARAMS, [x], select="b")
    with pytest.raises(ValueError, match=r"the slices of 'a' have shape \(27, "):
        wider = {**PARAMS, "a": random(5, 5, 3, 12)}
        continual.allocate(slices, network, wider, [x], select="a")


def test_slices_of_other_layers_cannot_be_projected_out():
    x, _ = task(0)
    slices = continual.protect(None, network, PARAMS, [x], threshold=0.9)
    with pytest.raises(ValueError, match=r"scale is -1\.0; it must be None or a positive"):
        continual.project_out(slices, network, PARAMS, x, scale=-1.0)
    wider = {**PARAMS, "a": random(5, 5, 3, 12)}
    with pytest.raises(ValueError, match=r"the slices of 'a' have shape \(27, .* has D = 75"):
        continual.project_out(slices, network, wider, x)
    fewer = {**PARAMS, "b": random(3, 3, 1, 6)}

    def other(params, x):
        return network({**params, "b": jnp.tile(params["b"], 2)}, x)

    with pytest.raises(ValueError, match="slices have a layer 'b'; there are a, c, d, e"):
        continual.project_out(slices, other, fewer, x)


@pytest.mark.parametrize("change", [lambda p: 1.5 * p, lambda p: p * np.nan])
def test_slices_must_be_orthonormal(change):
    x, _ = task(0)
    good = continual.protect(None, network, PARAMS, [x], threshold=0.9)
    bad = jax.tree.map(change, good)
    told = "the slices of 'a' are not orthonormal"
    with pytest.raises(ValueError, match=told):
        continual.allocate(bad, network, PARAMS, [x])
    with pytest.raises(ValueError, match=told):
        continual.protect(bad, network, PARAMS, [x], threshold=0.9)
    with pytest.raises(ValueError, match=told):
        continual.project_out(bad, network, PARAMS, x)
    with pytest.raises(ValueError, match="slices is a dict; it must be a Slices or None"):
        continual.allocate(dict(good), network, PARAMS, [x])


def test_slices_stored_in_few_bits_are_orthogonal_to_what_is_new():
    """They differ from what they were; what is new is orthogonal to what they are."""
    good = continual.protect(None, network, PARAMS, [task(0)[0]], threshold=0.9)
    short = jax.tree.map(lambda p: (np.round(p * 100) / 100).astype(np.float16), good)
    factors = continual.allocate(short, network, PARAMS, [task(1)[0]])
    for path in ("a", "d", "e"):
        p = short.protected(path).astype(np.float64)
        assert np.abs(p.T @ p - np.eye(p.shape[1])).max() > 1e-4
        assert np.abs(p.T @ np.asarray(factors[path].update, np.float64)).max() < 1e-5


def test_slices_and_factors_can_be_copied_and_pickled():
    x, _ = task(0)
    slices = continual.protect(None, network, PARAMS, [x], threshold=0.9)
    factors = continual.allocate(slices, network, PARAMS, [task(1)[0]])
    for one in (slices, factors):
        for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert jax.tree.structure(same) == jax.tree.structure(one)
            jax.tree.map(np.testing.assert_array_equal, same, one)


def test_squares_that_overflow_are_told_as_such():
    x, _ = task(0)
    with pytest.raises(ValueError, match="'a' holds NaN or Inf, or values whose squares are Inf"):
        continual.protect(None, network, PARAMS, [x * 1e25], threshold=0.9)


@pytest.mark.parametrize("n", [0, 5])
def test_batches_of_nothing(n):
    with pytest.raises(ValueError, match="the inputs of all layers are zero in these batches, or"):
        continual.protect(
            None, lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, [jnp.zeros((n, 3))],
            threshold=0.9,
        )  # fmt: skip


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"update": [1.0]}, "update is a list; it must be an array"),
        ({"update": np.full((3, 1), np.nan)}, "update holds NaN or Inf"),
        ({"update": 2 * np.eye(3)}, "the columns of update must be orthogonal"),
        ({"update": np.ones((3, 2)) / 3}, "the columns of update must be orthogonal"),
        ({"update_core": True}, "update_core needs an update"),
        ({"update": np.eye(3), "frozen": True}, "a frozen layer keeps nothing"),
    ],
)
def test_bad_settings_of_factors(settings, told):
    with pytest.raises(ValueError, match=told):
        LayerFactors({}, **settings)


def test_an_update_that_does_not_fit_its_layer():
    x, _ = task(0)
    factors = Factors({"a": LayerFactors({}, update=np.eye(26, 3, dtype=np.float32))})
    with pytest.raises(ValueError, match=r"an update of shape \(26, 3\); it must be \(27, r\)"):
        lance_jax.compress(network, factors)(PARAMS, x)


def test_slices_stay_orthogonal_over_twenty_tasks():
    """Also as they are stored and read again between tasks."""
    params = {"w": random(120, 4, seed=1)}
    slices = None
    for t in range(20):
        x = random(30, 3, seed=10 + t) @ random(3, 120, seed=50 + t)
        slices = continual.protect(
            slices, lambda p, x: x @ p["w"], params, [x + 0.05 * random(30, 120, seed=90 + t)],
            threshold=0.97,
        )  # fmt: skip
        slices = continual.Slices.from_dict(slices.as_dict())
    assert slices.tasks == 20 and all(basis is not None for basis in slices["w"])
    p = slices.protected("w").astype(np.float64)
    assert p.shape[1] >= 60
    assert np.abs(p.T @ p - np.eye(p.shape[1])).max() < 1e-5
