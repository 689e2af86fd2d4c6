"""`compress` inside and outside of transformations, its compilations, and shardings."""

import re

import chex
import jax
import jax.numpy as jnp
import networks
import pytest
from helpers import assert_close, assert_equal, feature, gradients, orthonormal, random, two_devices
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lance_jax
from lance_jax import Factors

pytestmark = pytest.mark.usefixtures("exact_products")


# --- compress inside and outside of transformations


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


MLP = {"a": random(4, 6), "b": random(6, 3, seed=1)}
MLP_BASES = {"a": orthonormal(4, 2), "b": orthonormal(6, 2)}


def mlp_fast(p, x):
    return lance_jax.compress(mlp, feature(MLP_BASES))(p, x)


def mlp_gradients(p, x):
    """The compressed gradients, written out."""
    hidden = x @ p["a"]
    ua, ub = MLP_BASES["a"], MLP_BASES["b"]
    dy = jnp.ones((len(x), 3))
    dh = jnp.where(hidden > 0, dy @ p["b"].T, 0)
    return {"a": ua @ (ua.T @ x.T @ dh), "b": ub @ (ub.T @ jax.nn.relu(hidden).T @ dy)}


def mlp_loss(p, x):
    return mlp_fast(p, x).sum()


def test_inside_grad():
    x = random(5, 4)
    want = mlp_gradients(MLP, x)
    assert_close(jax.grad(mlp_loss)(MLP, x), want)
    assert_close(jax.jit(jax.grad(mlp_loss))(MLP, x), want)
    _, vjp = jax.vjp(jax.jit(mlp_fast), MLP, x)
    assert_close(vjp(jnp.ones((5, 3)))[0], want)


def test_inside_vmap():
    xs = random(3, 5, 4)
    got = jax.jit(jax.vmap(jax.grad(mlp_loss), (None, 0)))(MLP, xs)
    assert_close(got, jax.vmap(lambda x: mlp_gradients(MLP, x))(xs))
    got = jax.jit(jax.grad(lambda p: jax.vmap(mlp_loss, (None, 0))(p, xs).sum()))(MLP)
    assert_close(got, mlp_gradients(MLP, xs.reshape(15, 4)))


def test_inside_vmap_over_parameters():
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a, -a]), MLP)
    x = random(5, 4)
    got = jax.jit(jax.vmap(jax.grad(mlp_loss), (0, None)))(members, x)
    assert_close(got, jax.vmap(lambda p: mlp_gradients(p, x))(members))


def test_inside_scan_and_remat():
    xs = random(3, 5, 4)

    @jax.jit
    def train(params):
        def step(params, x):
            grads = jax.grad(jax.checkpoint(mlp_loss))(params, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

        return lax.scan(step, params, xs)[0]

    want = MLP
    for x in xs:
        want = jax.tree.map(lambda p, g: p - 0.1 * g, want, mlp_gradients(want, x))
    assert_close(train(MLP), want)


def test_accumulation_over_a_scan_in_the_loss():
    xs = random(3, 5, 4)

    def loss(params):
        return lax.scan(lambda s, x: (s + mlp_loss(params, x), None), jnp.float32(0), xs)[0]

    assert_close(jax.jit(jax.grad(loss))(MLP), mlp_gradients(MLP, xs.reshape(15, 4)))


def test_inside_cond():
    def loss(p, x):
        return lax.cond(x.sum() > -1e9, mlp_loss, lambda p, x: jnp.float32(0), p, x)

    x = random(5, 4)
    assert_close(jax.jit(jax.grad(loss))(MLP, x), mlp_gradients(MLP, x))


def test_composing():
    x = random(5, 4)
    fast = lance_jax.compress(mlp, feature({"a": MLP_BASES["a"]}))
    fast = lance_jax.compress(fast, feature({"b": MLP_BASES["b"]}))
    assert_equal(jax.jit(fast)(MLP, x), jax.jit(mlp)(MLP, x))
    got = jax.jit(jax.grad(lambda p: fast(p, x).sum()))(MLP)
    assert_close(got, mlp_gradients(MLP, x))


def test_calling_twice():
    fast = lance_jax.compress(mlp, feature(MLP_BASES))
    for x in (random(5, 4), random(5, 4, seed=1), random(2, 4)):
        assert_close(jax.grad(lambda p, x=x: fast(p, x).sum())(MLP), mlp_gradients(MLP, x))


def test_nothing_to_do_is_no_change():
    x = random(5, 4)
    same = lance_jax.compress(mlp, Factors({}), masks=False)
    assert str(jax.make_jaxpr(same)(MLP, x)) == str(jax.make_jaxpr(mlp)(MLP, x))


# --- retraces and lowering


def test_new_factor_values_do_not_retrace():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def grads(params, x, factors):
        return jax.grad(lambda p: lance_jax.compress(mlp, factors)(p, x).sum())(params)

    x = random(5, 4)
    for seed in (0, 1):
        bases = {"a": orthonormal(4, 2, seed), "b": orthonormal(6, 2, seed)}
        got = grads(MLP, x, feature(bases))
        u = bases["a"]
        plain = jax.grad(lambda p: mlp(p, x).sum())(MLP)
        assert_close(got["a"], u @ u.T @ plain["a"])


def test_traced_factors_in_scan_and_jit():
    bases = networks.bases(0.5)
    net = networks.network("raw", "scan")
    x, target = networks.batch()
    params = net.pack(networks.weights())

    def grads(params, factors):
        fast = lance_jax.compress(net.apply, factors)
        return jax.grad(lambda p: (fast(p, x) * target).sum())(params)

    factors = net.factors(bases)
    got = net.unpack(jax.jit(grads)(params, factors))
    want = jax.jit(jax.grad(lambda p: (networks.reference(bases, p, x) * target).sum()))
    assert_close(got, want(networks.weights()))


def test_factors_are_arguments_of_the_program_not_constants():
    """A closed-over basis must not be baked in: its text would be in the program."""
    basis = orthonormal(64, 32)
    params, x = {"w": random(64, 3)}, random(2, 64)

    def grads(params, x, factors):
        return jax.grad(lambda p: lance_jax.compress(lambda p, x: x @ p["w"], factors)(p, x).sum())(
            params
        )

    text = jax.jit(grads).lower(params, x, feature({"w": basis})).as_text()
    assert not re.search(r"dense<.{200,}> : tensor<(64x32|32x64)xf32>", text)


@pytest.mark.parametrize("length", [4])
def test_a_jitted_block_is_lowered_once(length):
    @jax.jit
    def block(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    def apply_fn(params, x):
        for i in range(length):
            x = block(params[f"block{i}"], x)
        return x

    params = {
        f"block{i}": {"w": random(4, 6, seed=i), "v": random(6, 4, seed=i)} for i in range(length)
    }
    x = random(2, 4)
    bases = {}
    for i in range(length):
        bases[f"block{i}/w"] = orthonormal(4, 2, seed=i)
        bases[f"block{i}/v"] = orthonormal(6, 3, seed=i)

    def count(f):
        return jax.jit(f).lower(params, x).as_text().count("stablehlo.dot_general")

    fast = lance_jax.compress(apply_fn, feature(bases))
    assert count(fast) == count(apply_fn) == 2

    # And each call still gets the factors of its own layer.
    (got, _), (want, _) = (gradients(f)(params, x) for f in (fast, apply_fn))
    for i in range(length):
        for name in "wv":
            u = bases[f"block{i}/{name}"]
            assert_close(got[f"block{i}"][name], u @ u.T @ want[f"block{i}"][name])


# --- shardings


def test_sharding_constraint_inside():
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))

    def apply_fn(p, x):
        x = lax.with_sharding_constraint(jax.nn.relu(x @ p["a"]), sharding)
        return lax.with_sharding_constraint(x @ p["b"], sharding)

    x = jax.device_put(random(4, 4), sharding)
    fast = lance_jax.compress(apply_fn, feature(MLP_BASES))
    got, want = jax.jit(fast)(MLP, x), jax.jit(apply_fn)(MLP, x)
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
    assert len({shard.device for shard in got.addressable_shards}) == 2
    assert_equal(got, want)
    got = jax.jit(jax.grad(lambda p, x: fast(p, x).sum()))(MLP, x)
    assert_close(got, mlp_gradients(MLP, x))


def test_jit_with_shardings_inside():
    """Kept where the body holds no layer; kept, or refused by name, where it does."""
    mesh = two_devices()
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    spread = jax.jit(jnp.sin, in_shardings=rows, out_shardings=rows)
    product = jax.jit(lambda w, x: x @ w, in_shardings=(everywhere, rows), out_shardings=everywhere)

    def untouched(p, x):
        return spread(x @ p["w"])

    def rebuilt(p, x):
        return product(p["w"], x)

    params, x = {"w": random(4, 6)}, random(4, 4)
    fast = lance_jax.compress(untouched, feature({"w": orthonormal(4, 2)}))
    got = jax.jit(fast)(params, x)
    assert got.sharding.is_equivalent_to(rows, got.ndim)

    fast = lance_jax.compress(rebuilt, feature({"w": orthonormal(4, 2)}))
    try:
        got = jax.jit(fast)(params, x)
    except ValueError as error:
        assert "sharding" in str(error)
    else:
        assert got.sharding.is_equivalent_to(everywhere, got.ndim)


def test_sharded_batch_gives_the_same_gradients():
    sharding = NamedSharding(two_devices(), PartitionSpec("data"))
    x = random(4, 4)
    got = jax.jit(jax.grad(mlp_loss))(MLP, jax.device_put(x, sharding))
    assert_close(got, mlp_gradients(MLP, x))
