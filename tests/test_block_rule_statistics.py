"""Blocks with keys, masks and statistics: drawn again as they were, updated once."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close, assert_equal, orthonormal, random
from jax import lax

import lance_jax
from lance_jax import Factors, LayerFactors

W = random(5, 5) / 3


def with_dropout(params, x, key, ids, training):
    """Two blocks with a key, integers, a mask of booleans and an auxiliary output."""
    statistics = {}
    for i, name in enumerate(("block0", "block1")):

        def block(w, x, key, mask, mean, i=i):
            h = jnp.where(mask[:, None], jnp.sin(x @ w), 0.0) + mean
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, h.shape)
            return jnp.where(kept, h * 2, 0.0), 0.9 * mean + 0.1 * h.mean(0)

        x, statistics[name] = jax.checkpoint(block)(
            params[name], x, key, ids > 1, params["mean"][name]
        )
    return x.sum(), statistics


AUX = {"block0": W, "block1": W + 1, "mean": {name: random(5) for name in ("block0", "block1")}}


def test_keys_masks_and_statistics():
    x, key, ids = random(4, 5), jax.random.key(3), jnp.arange(4)
    found = lance_jax.layers(with_dropout, AUX, x, key, ids, True)
    names = [layer.path for layer in found if layer.kind == "block"]
    assert len(names) == 2
    assert [layer.inputs for layer in found if layer.kind == "block"] == [(), ((4, 5),)]

    def run(apply):
        def loss(params):
            return apply(params, x, key, ids, True)

        return jax.value_and_grad(loss, has_aux=True)(AUX)

    (value, statistics), grads = run(with_dropout)
    whole = Factors({name: LayerFactors({}) for name in names})
    (got, got_statistics), got_grads = run(lance_jax.compress(with_dropout, whole))
    assert_equal((got, got_statistics), (value, statistics))
    assert_close(got_grads, grads)
    # statistics are those of the true forward pass, whatever is kept
    coarse = Factors({names[1]: LayerFactors({"feature": orthonormal(5, 1)})})
    (got, got_statistics), got_grads = run(lance_jax.compress(with_dropout, coarse))
    assert_equal((got, got_statistics), (value, statistics))
    assert not np.allclose(got_grads["block1"], grads["block1"])


def scanned_dropout(params, x, key):
    """A scan whose steps have a key, a mask and an auxiliary output each."""

    def step(x, one):
        w, key, mean = one

        def block(w, x, key, mean):
            h = jnp.sin(x @ w) + mean
            kept = jax.random.bernoulli(key, 0.5, h.shape)
            return jnp.where(kept, h * 2, 0.0), 0.9 * mean + 0.1 * h.mean(0)

        return jax.checkpoint(block)(w, x, key, mean)

    x = jnp.cos(x @ params["stem"])
    w, mean = params["blocks"]["w"], params["blocks"]["mean"]
    x, means = lax.scan(step, x, (w, jax.random.split(key, 3), mean))
    return jnp.sin(x).sum(), means


def test_a_scan_with_keys_and_statistics():
    params = {"stem": W, "blocks": {"w": random(3, 5, 5), "mean": random(3, 5)}}
    x, key = random(4, 5), jax.random.key(3)
    uncut = jnp.stack([jnp.eye(5)] * 3)
    cut = jnp.stack([orthonormal(5, 2, seed) for seed in range(3)])
    exact = jax.value_and_grad(scanned_dropout, has_aux=True)(params, x, key)
    for u in (None, uncut, cut):
        own = {"blocks": LayerFactors({} if u is None else {"feature": u})}
        fast = lance_jax.compress(scanned_dropout, own)
        got = jax.jit(jax.value_and_grad(fast, has_aux=True))(params, x, key)
        assert_close(got[0], exact[0])  # the value, and the statistics of the true forward pass
        if u is not cut:
            assert_close(got[1], exact[1], rtol=1e-4, atol=1e-4)
    # with the same masks at x U U^T: a step at a time, in the place of the scan
    want = unrolled(params, x, key, cut)
    assert_close(got[1]["blocks"]["w"], want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(want, exact[1]["blocks"]["w"], rtol=0.01)


def unrolled(params, x, key, bases):
    """The gradients of the three steps of `scanned_dropout`, each at its projected input."""
    keys, vjps, x = jax.random.split(key, 3), [], jnp.cos(x @ params["stem"])
    steps = params["blocks"]["w"], keys, params["blocks"]["mean"], bases
    for w, key, mean, u in zip(*steps, strict=True):

        def step(w, x, key=key, mean=mean):
            h = jnp.sin(x @ w) + mean
            return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h * 2, 0.0)

        vjps.append(jax.vjp(step, w, x @ u @ u.T)[1])
        x = step(w, x)
    dx, grads = jnp.cos(x), []
    for vjp in reversed(vjps):
        dw, dx = vjp(dx)
        grads.insert(0, dw)
    return jnp.stack(grads)
