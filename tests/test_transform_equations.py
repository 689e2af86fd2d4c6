"""What `compress` must keep of the equations it rebuilds, and weights in unusual places."""

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    ATTENTION,
    assert_close,
    assert_equal,
    attention,
    equations,
    feature,
    gradients,
    orthonormal,
    random,
)
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

pytestmark = pytest.mark.usefixtures("exact_products")


# --- parameters of an equation survive


def products(function, *args):
    """(precision, preferred_element_type) of every product and convolution, sorted."""
    return sorted(
        (
            eqn.primitive.name,
            str(eqn.params["precision"]),
            str(eqn.params["preferred_element_type"]),
        )
        for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated")
    )


@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_precision_passes_through(precision):
    def apply_fn(p, x):
        y = lax.conv_general_dilated(
            x,
            p["conv"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=precision,
        )
        return jnp.einsum("nwc,co->nwo", y, p["dense"], precision=precision)

    params, x = {"conv": random(3, 4, 5), "dense": random(5, 6)}, random(2, 7, 4)
    fast = lance_jax.compress(
        apply_fn,
        Factors(
            {
                "conv": LayerFactors({"channel": orthonormal(4, 2)}),
                "dense": LayerFactors({"feature": orthonormal(5, 2)}),
            }
        ),
    )
    assert products(fast, params, x) == products(apply_fn, params, x)
    dx = products(jax.grad(lambda x: fast(params, x).sum()), x)
    wanted = {str(eqn[1]) for eqn in products(apply_fn, params, x)}
    assert {name for name, *_ in dx} == {"conv_general_dilated", "dot_general"}
    backward = [eqn for eqn in dx if eqn[1] in wanted]
    assert len(backward) >= 4  # forward and dX of both layers, at the precision asked for


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_preferred_element_type_passes_through(kind):
    def apply_fn(p, x):
        if kind == "dense":
            return lax.dot_general(
                x, p["w"], (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
        return lax.conv_general_dilated(
            x,
            p["w"][None],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            preferred_element_type=jnp.float32,
        )

    params, x = {"w": random(8, 5, dtype="bfloat16")}, random(2, 7, 8, dtype="bfloat16")
    mode = {"dense": "feature", "conv": "channel"}[kind]
    fast = lance_jax.compress(
        apply_fn, Factors({"w": LayerFactors({mode: orthonormal(8, 8).astype(jnp.bfloat16)})})
    )
    assert products(fast, params, x) == products(apply_fn, params, x)
    got = jax.jit(fast)(params, x)
    assert got.dtype == jnp.float32
    assert_equal(got, jax.jit(apply_fn)(params, x))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, x) for f in (fast, apply_fn))
    chex.assert_trees_all_equal_dtypes(got, want)
    assert_equal(got_dx, want_dx)
    scale = float(jnp.abs(want["w"].astype(jnp.float32)).max())
    assert_close(
        got["w"].astype("float32"), want["w"].astype("float32"), atol=scale * 2**-5, rtol=0
    )


def test_custom_rules_are_kept():
    @jax.custom_vjp
    def round_through(x):
        return jnp.round(x)

    round_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct,))

    def apply_fn(p, x):
        return round_through(jax.nn.relu(x @ p["w"])) @ p["v"]

    # Zero weights put every relu at its tie.
    params, x = {"w": jnp.zeros((4, 5)), "v": random(5, 3)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"v": orthonormal(5, 5), "w": orthonormal(4, 4)}))
    (got, _), (want, _) = (gradients(f, jnp.sum)(params, x) for f in (fast, apply_fn))
    assert not want["w"].any()  # jax.nn.relu has slope 0 at 0
    assert_close(got, want)

    params["w"] = random(4, 5)
    (got, _), (want, _) = (gradients(f, jnp.sum)(params, x) for f in (fast, apply_fn))
    assert want["w"].any()  # and rounding slope 1 everywhere
    assert_close(got, want)


def test_remat_policy_is_kept():
    policy = jax.checkpoint_policies.dots_saveable

    def apply_fn(p, x):
        return jax.checkpoint(lambda x: jax.nn.relu(x @ p["w"]), policy=policy, prevent_cse=False)(
            x
        )

    params, x = {"w": random(4, 5)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    (eqn,) = [
        eqn for eqn in equations(jax.make_jaxpr(fast)(params, x).jaxpr) if "policy" in eqn.params
    ]
    assert eqn.params["policy"] is policy
    assert eqn.params["prevent_cse"] is False


def test_scan_options_are_kept():
    def apply_fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, p["w"], reverse=True, unroll=2)

    params, x = {"w": random(4, 3, 3)}, random(2, 3)
    stacked = jnp.stack([orthonormal(3, 3, seed) for seed in range(4)])
    fast = lance_jax.compress(apply_fn, feature({"w": stacked}))
    scans = [
        [
            eqn
            for eqn in equations(jax.make_jaxpr(f)(params, x).jaxpr)
            if eqn.primitive.name == "scan"
        ]
        for f in (fast, apply_fn)
    ]
    assert len(scans[0]) == len(scans[1]) == 1
    for option in ("reverse", "unroll", "length"):
        assert scans[0][0].params[option] == scans[1][0].params[option]
    got, want = (
        gradients(f, lambda y: jnp.square(y[0]).sum())(params, x) for f in (fast, apply_fn)
    )
    assert_close(got, want)


def test_named_scopes_are_kept():
    def apply_fn(p, x):
        with jax.named_scope("encoder_scope"):
            return jax.nn.relu(x @ p["w"])

    params, x = {"w": random(4, 5)}, random(2, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    (product,) = [
        eqn
        for eqn in equations(jax.make_jaxpr(fast)(params, x).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    text = jax.jit(fast).lower(params, x).as_text(debug_info=True)
    assert "encoder_scope" in str(product.source_info.name_stack) or "encoder_scope" in text


def test_effects_are_kept():
    seen = []

    def apply_fn(p, x):
        jax.debug.callback(lambda n: seen.append(float(n)), x.sum())
        return x @ p["w"]

    params, x = {"w": random(4, 5)}, jnp.ones((2, 4))
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 2)}))
    jax.block_until_ready(jax.jit(fast)(params, x))
    jax.effects_barrier()
    assert seen == [8.0]


# --- weights in unusual places


def test_weight_used_twice_and_otherwise():
    """One weight in two products and in a penalty; the penalty's gradient is exact."""

    def apply_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        return (h @ p["w"]).sum() + 0.1 * (p["w"] ** 2).sum()

    params, x, u = {"w": random(4, 4)}, random(3, 4), orthonormal(4, 2)
    fast = lance_jax.compress(apply_fn, feature({"w": u}))
    (got, got_dx), (want, want_dx) = (
        gradients(f, lambda y: y)(params, x) for f in (fast, apply_fn)
    )
    penalty = 0.2 * params["w"]
    assert_close(got["w"] - penalty, u @ u.T @ (want["w"] - penalty))
    assert_close(got_dx, want_dx)


def test_tied_embedding():
    """Looked up exactly, multiplied with compressed: two shares of one gradient."""

    def apply_fn(p, tokens):
        return jnp.tanh(p["table"][tokens].mean(1)) @ p["table"].T

    params, tokens, u = {"table": random(9, 4)}, jnp.arange(6).reshape(3, 2), orthonormal(4, 2)
    (layer,) = lance_jax.layers(apply_fn, params, tokens)
    assert (layer.path, layer.modes) == ("table", {"batch": 3, "feature": 4})
    fast = lance_jax.compress(apply_fn, feature({"table": u}))
    hidden = jnp.tanh(params["table"][tokens].mean(1))
    product = jax.grad(lambda w: (hidden @ w.T).sum())(params["table"])
    (got,), (want,) = (gradients(f, jnp.sum, (0,))(params, tokens) for f in (fast, apply_fn))
    lookup = want["table"] - product
    assert_close(got["table"], lookup + product @ u @ u.T)


def test_recurrent_weight():
    """The same weight at each step of a scan: one factor set, a projected sum."""

    def apply_fn(p, xs):
        def step(h, x):
            h = jnp.tanh(h @ p["h"] + x @ p["x"])
            return h, h

        return lax.scan(step, jnp.zeros((2, 4)), xs)[1]

    params, xs, u = {"h": random(4, 4), "x": random(3, 4)}, random(5, 2, 3), orthonormal(4, 2)
    found = lance_jax.layers(apply_fn, params, xs)
    assert {layer.path for layer in found} == {"h", "x"}
    fast = lance_jax.compress(apply_fn, feature({"h": u}))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, xs) for f in (fast, apply_fn))
    assert_close(got, {"h": u @ u.T @ want["h"], "x": want["x"]})
    assert_close(got_dx, want_dx)


def test_scan_in_scan():
    """Bases of layers stacked twice have two leading axes."""

    def apply_fn(p, x):
        def outer(x, weights):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0], None

        return lax.scan(outer, x, p["w"])[0]

    params, x = {"w": random(2, 3, 4, 4)}, random(2, 4)
    bases = jnp.stack([orthonormal(4, 4, seed) for seed in range(6)]).reshape(2, 3, 4, 4)
    fast = lance_jax.compress(apply_fn, feature({"w": bases}))
    assert_close(gradients(fast)(params, x), gradients(apply_fn)(params, x))


def test_nested_scan_in_cond_in_remat_in_jit():
    @jax.jit
    def stack(params, x):
        def some(x):
            return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        return jax.checkpoint(lambda x: lax.cond(jnp.isfinite(x.sum()), some, jnp.sin, x))(x)

    params, x = {"w": random(3, 4, 4)}, random(2, 4)
    bases = jnp.stack([orthonormal(4, 2, seed) for seed in range(3)])
    fast = lance_jax.compress(stack, feature({"w": bases}))
    assert_equal(jax.jit(fast)(params, x), stack(params, x))

    def unrolled(p, x):
        for i in range(3):
            x = jnp.tanh(x @ p[f"w{i}"])
        return x

    flat = lance_jax.compress(unrolled, feature({f"w{i}": bases[i] for i in range(3)}))
    got, got_dx = gradients(fast)(params, x)
    want, want_dx = gradients(flat)({f"w{i}": params["w"][i] for i in range(3)}, x)
    assert_close(got["w"], jnp.stack([want[f"w{i}"] for i in range(3)]))
    assert_close(got_dx, want_dx)


def test_branches_with_different_layers():
    def apply_fn(p, index, x):
        branches = [lambda x: x @ p["a"], lambda x: jnp.sin(x @ p["b"]), lambda x: x[:, :3]]
        return lax.switch(index, branches, x)

    params, x, u = {"a": random(4, 3), "b": random(4, 3, seed=1)}, random(2, 4), orthonormal(4, 2)
    assert {layer.path for layer in lance_jax.layers(apply_fn, params, 0, x)} == {"a", "b"}
    fast = lance_jax.compress(apply_fn, feature({"a": u}))
    for index, path in ((0, "a"), (1, "b"), (2, None)):
        got, want = (
            jax.jit(jax.grad(lambda p, f=f, i=index: jnp.square(f(p, i, x)).sum()))(params)
            for f in (fast, apply_fn)
        )
        if path == "a":
            want["a"] = u @ u.T @ want["a"]
        assert_close(got, want)


def test_weight_as_left_operand_and_transposed():
    def apply_fn(p, x):
        return (
            jnp.einsum("oc,nc->on", p["w"], x)
            + (p["v"].T.reshape(3, 2, 2) @ x.reshape(-1, 2, 2).sum(0)).sum()
        )

    def left(p, x):
        return p["w"] @ x.T

    params, x, u = {"w": random(3, 4)}, random(5, 4), orthonormal(4, 2)
    fast = lance_jax.compress(left, feature({"w": u}))
    (got, got_dx), (want, want_dx) = (gradients(f)(params, x) for f in (fast, left))
    assert_close(got["w"], want["w"] @ u @ u.T)
    assert_close(got_dx, want_dx)


def test_attention_kernels():
    x = random(3, 7, 6)
    bases = {
        name: orthonormal(10 if name == "out" else 6, 3, i) for i, name in enumerate(ATTENTION)
    }
    fast = lance_jax.compress(attention, feature(bases))
    assert_equal(jax.jit(fast)(ATTENTION, x), jax.jit(attention)(ATTENTION, x))
    (got, got_dx), (want, want_dx) = (gradients(f)(ATTENTION, x) for f in (fast, attention))
    for name, u in bases.items():
        rows = want[name].reshape(len(u), -1)
        assert_close(got[name], (u @ u.T @ rows).reshape(want[name].shape))
    assert_close(got_dx, want_dx)


def test_weight_that_passes_a_framework_jit_comes_out_as_itself():
    """NNX returns a module's state from its transformations; its next use is the same weight."""

    @jax.jit
    def block(w, x):
        return w, jnp.tanh(x @ w)

    def apply_fn(p, x):
        w, x = block(p["w"], x)
        return x @ w

    params, x, u = {"w": random(4, 4)}, random(3, 4), orthonormal(4, 2)
    (layer,) = lance_jax.layers(apply_fn, params, x)
    assert layer.uses == 2
    fast = lance_jax.compress(apply_fn, feature({"w": u}))
    (got, _), (want, _) = (gradients(f)(params, x) for f in (fast, apply_fn))
    assert_close(got["w"], u @ u.T @ want["w"])


def test_closed_over_values_are_not_layers():
    constant = random(4, 4)

    def apply_fn(p, x):
        return (x @ constant) @ p["w"]

    params, x = {"w": random(4, 3)}, random(2, 4)
    assert [layer.path for layer in lance_jax.layers(apply_fn, params, x)] == ["w"]
    fast = lance_jax.compress(apply_fn, feature({"w": orthonormal(4, 4)}))
    assert_close(gradients(fast)(params, x), gradients(apply_fn)(params, x))
