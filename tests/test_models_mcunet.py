"""MCUNet, with batch norm folded and not, from a state dict against plain float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lance_jax.models import weights
from lance_jax.models.layers import Block
from lance_jax.problem import trained_layers
from tests.pretrained import Reference, pictures, relu6
from tests.real_data import WEIGHTS, needs_real_data
from tests.tolerances import assert_close

# (kernel, stride, in, hidden, out, expand, residual); odd sides show where padding is uneven
BLOCKS = [
    (3, 1, 4, 4, 6, False, False),
    (5, 2, 6, 12, 8, True, False),
    (7, 1, 8, 16, 8, True, True),
    (3, 2, 8, 16, 8, True, False),
]
ARCHITECTURE = {
    "resolution": 18,
    "stem": {"kernel": 3, "stride": 2, "out_channels": 4},
    "blocks": [dict(zip(Block._fields, block, strict=True)) for block in BLOCKS],
}


def reference(file, x, layer, classifier):
    """Logits of 7 classes; `layer(x, name, ...)` is a convolution with what goes with it."""
    x = relu6(layer(x, "stem", 4, 3, 2))
    for i, (kernel, stride, _, hidden, out, expand, residual) in enumerate(BLOCKS):
        y = relu6(layer(x, (i, 1), hidden, 1)) if expand else x
        y = relu6(layer(y, (i, 2), hidden, kernel, stride, groups=hidden))
        y = layer(y, (i, 3), out, 1)
        x = x + y if residual else y
    return classifier(x.mean((1, 2), keepdims=True))[:, 0, 0]


def folded(file, x):
    """In the layout of the files whose batch norm is folded."""

    def layer(x, name, *sizes, **options):
        name = name if name == "stem" else "blocks.{}.conv{}".format(*name)
        return file.conv(x, name, *sizes, bias=True, **options)

    return reference(file, x, layer, lambda x: file.conv(x, "classifier", 7, 1, bias=True))


PARTS = {1: "inverted_bottleneck", 2: "depth_conv", 3: "point_linear"}


def with_norm(file, x):
    """In the layout of MIT's repository."""

    def layer(x, name, *sizes, **options):
        if name == "stem":
            name = "first_conv"
        else:
            name = f"blocks.{name[0]}.mobile_inverted_conv.{PARTS[name[1]]}"
        return file.norm(file.conv(x, f"{name}.conv", *sizes, **options), f"{name}.bn", 1e-3)

    return reference(file, x, layer, lambda x: file.dense(x, "classifier.linear", 7))


@pytest.mark.parametrize(
    ("forward", "options"), [(folded, {}), (with_norm, {"kind": "mcunet", "epsilon": 1e-3})]
)
def test_logits_equal_the_reference(tmp_path, forward, options, exact_products):
    file, x = Reference(), pictures(2, 18)
    logits = forward(file, x)
    network, variables = weights.load(
        file.save(tmp_path / "file.safetensors", **ARCHITECTURE, **options)
    )
    assert_close(jax.jit(network.apply)(variables, x), logits)
    assert set(weights.keys(network)) == set(file.tensors)


@needs_real_data
@pytest.mark.parametrize("name", ["mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3"])
def test_published_weights_load(name):
    network, variables = weights.load(WEIGHTS / f"{name}.safetensors")
    x = jnp.zeros((1, *network.picture))
    assert network.picture == (128, 128, 3) and network.classes == 1000
    features = jax.eval_shape(network.clone(classes=None).apply, variables, x)
    assert features.shape == (1, 4, 4, network.blocks[-1].out_channels)
    assert np.isfinite(jax.jit(network.apply)(variables, x)).all()


@needs_real_data
def test_the_layers_that_are_trained_by_default():
    network, _ = weights.load(WEIGHTS / "mcunet-5fps.safetensors")
    layers = ["blocks_12/conv1", "blocks_12/conv3", "blocks_13/conv1", "blocks_13/conv3"]
    assert trained_layers(network, 4) == (layers, 12)
