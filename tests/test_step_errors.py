"""Bad input to `value_and_grad`: one ValueError that names it."""

from typing import Any

import jax.numpy as jnp
import pytest
from losses import mlp, mlp_loss

import lance_jax


@pytest.mark.parametrize(
    ("trainable", "words"),
    [
        ("hiden/kernel", ["hiden/kernel", "hidden/kernel"]),
        (["head", "hiden/kernel"], ["hiden/kernel", "hidden/kernel"]),
        (lambda path: False, ["trainable"]),
        ([], ["trainable"]),
        ("(", ["("]),
        (3, ["3"]),
    ],
    ids=["matches nothing", "one of two", "callable", "empty", "no expression", "number"],
)
def test_bad_trainable(trainable, words):
    params, batch = mlp()
    with pytest.raises(ValueError) as caught:
        lance_jax.value_and_grad(mlp_loss, trainable=trainable)(params, *batch)
    for word in words:
        assert word in str(caught.value)


def test_bad_losses():
    params, batch = mlp()
    for loss, has_aux, words in (
        (lambda p, x, t: x @ p["hidden"]["kernel"], False, "(7, 13)"),
        (lambda p, x, t: (x * 0).astype(jnp.int32).sum(), False, "int32"),
        (lambda p, x, t: (p["head"]["bias"].sum(), 3), False, "has_aux"),
        (lambda p, x, t: p["head"]["bias"].sum(), True, "has_aux"),
        (lambda p, x, t: None, False, "NoneType"),
        (lambda p, x, t: "low", False, "str"),
    ):
        with pytest.raises(ValueError) as caught:
            lance_jax.value_and_grad(loss, has_aux=has_aux)(params, *batch)
        assert words in str(caught.value)


def test_saved_of_other_arguments():
    params, (x, target) = mlp()
    vg = lance_jax.value_and_grad(mlp_loss)
    _, saved = vg.forward(params, x, target)
    with pytest.raises(ValueError, match="saved"):
        vg.backward(saved, params, x[:3], target[:3])


def test_no_floating_parameter():
    with pytest.raises(ValueError, match="float"):
        lance_jax.value_and_grad(lambda p: jnp.float32(0))({"n": jnp.int32(3)})


@pytest.mark.parametrize("saved", [None, 3, (3,), [], {"a": jnp.ones(3)}], ids=str)
def test_saved_that_is_none(saved: Any):
    params, batch = mlp()
    with pytest.raises(ValueError, match="saved"):
        lance_jax.value_and_grad(mlp_loss).backward(saved, params, *batch)


def test_a_static_argument_that_cannot_be_hashed():
    params, batch = mlp()
    with pytest.raises(ValueError, match="hashable.*'set'"):
        lance_jax.value_and_grad(lambda p, *args: mlp_loss(p, *args[:2]))(params, *batch, {1, 2})
