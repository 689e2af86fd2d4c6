"""Bad input to `calibrate`: one ValueError that names it."""

import jax.numpy as jnp
import numpy as np
import pytest
from calibration import calibrate, setting, split

import lance_jax


def never():
    raise AssertionError("batches must not be read")
    yield


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 0}, ["energy", "0", "(0, 1]"]),
        ({"energy": -0.5}, ["energy", "-0.5", "(0, 1]"]),
        ({"energy": 1.5}, ["energy", "1.5", "(0, 1]"]),
        ({"energy": float("nan")}, ["energy", "nan", "(0, 1]"]),
        ({"energy": "0.9"}, ["energy", "'0.9'", "(0, 1]"]),
        ({"core_dtype": "int2"}, ["core_dtype", "int2", "int4", "int8", "bfloat16"]),
        ({"core_dtype": "float16"}, ["core_dtype", "float16", "int4"]),
        ({"modes": "papr"}, ["modes", "papr", "paper"]),
        ({"modes": "channel"}, ["modes", "channel", "tuple"]),
        ({"modes": 5}, ["modes", "5", "tuple"]),
    ],
)
def test_bad_options_are_refused_before_anything_is_read(options, words):
    with pytest.raises(ValueError) as error:
        calibrate(never(), **options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ("chanel",)}, ["chanel", "channel"]),
        ({"modes": ("height", "depth")}, ["depth", "height"]),
        ({"modes": ("channel",), "select": "head"}, ["channel", "feature"]),
        ({"modes": ("patch", "channel"), "select": "conv"}, ["patch", "channel", "conv/kernel"]),
        ({"select": "conw"}, ["conw", "conv/kernel"]),
        ({"select": ["conv", "nothing"]}, ["nothing", "conv/kernel"]),
        ({"select": []}, ["select", "conv/kernel"]),
        ({"select": lambda layer: False}, ["select", "conv/kernel"]),
        ({"select": 5}, ["select", "5"]),
        ({"batches": 3}, ["batches", "int", "iterable"]),
        ({"batches": []}, ["batches", "empty"]),
        ({"batches": iter(())}, ["batches", "empty"]),
    ],
)
def test_bad_requests(options, words):
    with pytest.raises(ValueError) as error:
        calibrate(**options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("n", [0, -1, 1.5, "2"])
def test_bad_last(n):
    with pytest.raises(ValueError, match="last"):
        calibrate(select=lance_jax.last(n))


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite(value, center):
    _, x, _ = setting()
    bad = x.copy()
    bad[6, 2, 3, 1] = value
    with pytest.raises(ValueError, match=r"conv/kernel.*(NaN|Inf)|(NaN|Inf).*conv/kernel"):
        calibrate(split(bad, 4, 4, 2), center=center)


def test_activations_that_are_all_zero():
    params, x, _ = setting()
    silent = {**params, "conv": {"kernel": np.zeros((3, 3, 3, 4), np.float32)}}
    with pytest.raises(ValueError, match=r"depthwise/kernel.*zero"):
        calibrate(params=silent)
    with pytest.raises(ValueError, match=r"conv/kernel.*zero"):
        calibrate(split(np.zeros_like(x), 4, 4, 2))


def test_a_network_without_layers():
    with pytest.raises(ValueError, match="layer"):
        calibrate(apply=lambda params, x: x.sum() * params["conv"]["kernel"].sum())


def test_samples_that_are_all_the_same():
    """About their mean there is nothing but rounding to project."""
    _, x, _ = setting()
    same = np.repeat(x[:1], 8, axis=0)
    with pytest.raises(ValueError, match="conv/kernel.*the same in all samples"):
        calibrate(split(same, 4, 4), center=True)
    assert calibrate(split(same, 4, 4)).keys() == {*calibrate()}


def test_batches_of_no_sample():
    _, x, _ = setting()
    with pytest.raises(ValueError, match="conv/kernel.*all zero"):
        calibrate([jnp.asarray(x[:0])])
    some = calibrate([jnp.asarray(x[:4]), jnp.asarray(x[:0])])
    assert [layer.ranks for layer in some.values()] == [
        layer.ranks for layer in calibrate([jnp.asarray(x[:4])]).values()
    ]


def test_a_skipped_layer_is_told_with_its_reason():
    def apply(params, x):
        return x @ (params["w"] + params["a"] @ params["b"])

    w = {"w": jnp.ones((4, 3)), "a": jnp.ones((4, 1)), "b": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match="'w' matches no layer; .*w.* is none: the weight is comp"):
        lance_jax.calibrate(apply, w, [jnp.ones((2, 4))], select="w")
