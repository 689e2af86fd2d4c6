"""A small network with every kind of layer, ten samples, and its calibration."""

import functools

import jax.numpy as jnp
import numpy as np
import reference
from cases import inputs
from jax import lax
from reference import Conv, Dense
from tolerances import assert_close

import lance_jax

SAMPLES = 10
PATHS = ["conv/kernel", "depthwise/kernel", "mix/kernel", "head/kernel"]


def ops(samples: int = SAMPLES) -> dict[str, Conv | Dense]:
    return {
        "conv/kernel": Conv((samples, 5, 6, 3), (3, 3, 3, 4), padding="SAME"),
        "depthwise/kernel": Conv((samples, 5, 6, 4), (3, 2, 1, 4), groups=4),
        "mix/kernel": Dense("btf,fo->bto", (samples, 15, 4), (4, 5)),
        "head/kernel": Dense("bf,fo->bo", (samples, 5), (5, 3)),
    }


def network(params, x, record=lambda path, x: None):
    """A convolution, a depthwise one, a product over positions and a head."""

    def weight(path, x):
        record(path, x)
        return params[path.split("/")[0]]["kernel"]

    numbers = ("NHWC", "HWIO", "NHWC")
    w = weight("conv/kernel", x)
    x = jnp.tanh(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers))
    w = weight("depthwise/kernel", x)
    x = lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=4
    )
    x = jnp.tanh(x).reshape(len(x), 15, 4)
    x = jnp.tanh(x @ weight("mix/kernel", x)).mean(1)
    return x @ weight("head/kernel", x)


@functools.cache
def setting():
    """(params, ten samples, the input of every layer over all of them)."""
    generator = np.random.default_rng(0)
    params = {
        path.split("/")[0]: {"kernel": generator.normal(size=op.w_shape).astype(np.float32)}
        for path, op in ops().items()
    }
    x = inputs(generator, (SAMPLES, 5, 6, 3)).astype(np.float32)
    seen = {}
    network(params, jnp.asarray(x), lambda path, x: seen.update({path: np.asarray(x)}))
    return params, x, seen


def split(x, *sizes):
    return [jnp.asarray(part) for part in np.split(x, np.cumsum(sizes)[:-1])]


def calibrate(batches=None, params=None, apply=network, **options):
    default, x, _ = setting()
    batches = split(x, 4, 4, 2) if batches is None else batches
    return lance_jax.calibrate(apply, params or default, batches, **options)


def assert_bases(layer, grams, energy, dtype="float32") -> None:
    """The bases are those of the Gram matrices: (n, n), or stacked in front for one common rank.

    Orthonormal, of the smallest sufficient rank, and with the leading eigenvectors' energy:
    together that is the leading subspace, however close its eigenvalues are.
    """
    assert set(layer.bases) == set(grams)
    for mode, gram in grams.items():
        basis = np.asarray(layer.bases[mode])
        n = gram.shape[-1]
        stack = gram.reshape(-1, n, n)
        rank = max(reference.smallest_rank(one, energy) for one in stack)
        assert basis.shape == (*gram.shape[:-1], rank), mode
        for u, one in zip(basis.reshape(-1, n, rank).astype(np.float64), stack, strict=True):
            assert_close(u.T @ u, np.eye(rank), dtype, what=mode)
            leading = np.linalg.eigvalsh(one)[::-1][:rank].sum()
            assert_close(np.trace(u.T @ one @ u), leading, dtype, np.trace(one), mode)
