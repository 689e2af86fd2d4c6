"""The networks of the program against a naive float64 reference, and their division in two."""

import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lance_jax.models import digits, mcunet
from tests.reference import Conv
from tests.tolerances import assert_close

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"

# (kernel, stride, in, hidden, out, expand, residual); odd sides show where padding is uneven
BLOCKS = [
    (3, 1, 4, 4, 6, False, False),
    (5, 2, 6, 12, 8, True, False),
    (7, 1, 8, 16, 8, True, True),
    (3, 2, 8, 16, 8, True, False),
]
SIDE = 18


def tensors():
    """OIHW tensors as a weights file has them."""
    rng = np.random.default_rng(0)
    shapes = {"stem": (4, 3, 3, 3), "classifier": (7, 8, 1, 1)}
    for i, (kernel, _, inside, hidden, out, expand, _) in enumerate(BLOCKS):
        if expand:
            shapes[f"blocks.{i}.conv1"] = (hidden, inside, 1, 1)
        shapes[f"blocks.{i}.conv2"] = (hidden, 1, kernel, kernel)
        shapes[f"blocks.{i}.conv3"] = (out, hidden, 1, 1)
    found = {}
    for name, shape in shapes.items():
        scale = 1.5 / np.sqrt(np.prod(shape[1:]))
        found[f"{name}.weight"] = (scale * rng.standard_normal(shape)).astype(np.float32)
        found[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    return found


def architecture():
    fields = mcunet.Block._fields
    return {
        "resolution": SIDE,
        "stem": {"kernel": 3, "stride": 2, "out_channels": 4},
        "blocks": [dict(zip(fields, block, strict=True)) for block in BLOCKS],
    }


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(tensors(), path, {"architecture": json.dumps(architecture())})
    return path


def reference(x):
    """The last block's output, NHWC, in float64, straight from the file's tensors."""
    file = tensors()

    def conv(x, name, stride=1, groups=1):
        weight = file[f"{name}.weight"]
        side = (weight.shape[-1] - 1) // 2
        op = Conv(
            x.shape,
            weight.shape,
            ("NHWC", "OIHW", "NHWC"),
            (stride, stride),
            [(side, side)] * 2,
            groups=groups,
        )
        return op.forward(x, weight) + file[f"{name}.bias"]

    def relu6(x):
        return np.clip(x, 0, 6)

    x = relu6(conv(x, "stem", 2))
    for i, (_, stride, _, hidden, _, expand, residual) in enumerate(BLOCKS):
        y = relu6(conv(x, f"blocks.{i}.conv1")) if expand else x
        y = conv(relu6(conv(y, f"blocks.{i}.conv2", stride, hidden)), f"blocks.{i}.conv3")
        x = x + y if residual else y
    return x


def test_mcunet_equals_the_reference(weights, exact_products):
    found, params = mcunet.load(weights)
    x = np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    assert_close(jax.jit(mcunet.MCUNet(found).apply)({"params": params}, x), reference(x))


def assert_divides(network, variables, x, block):
    """Prefix, then suffix, is the whole network."""
    whole = jax.jit(network.apply)(variables, x)
    middle = jax.jit(network.clone(stop=block, classes=None).apply)(variables, x)
    assert_close(jax.jit(network.clone(start=block).apply)(variables, middle), whole)
    suffix = jax.eval_shape(network.clone(start=block).init, jax.random.key(0), middle)
    blocks = [name for name in variables["params"] if name.startswith("blocks_")]
    assert set(suffix["params"]) == {"head", *sorted(blocks)[block:]}


@pytest.mark.parametrize("block", [1, 3])
def test_mcunet_divides_in_two(weights, block, exact_products):
    found, params = mcunet.load(weights)
    network = mcunet.MCUNet(found, classes=5)
    params = {**params, "head": {"kernel": jnp.ones((8, 5)), "bias": jnp.arange(5.0)}}
    x = np.random.default_rng(1).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
    assert_divides(network, {"params": params}, x, block)


def test_last_pointwise(weights):
    found, _ = mcunet.load(weights)
    expected = [(1, "conv3"), (2, "conv1"), (2, "conv3"), (3, "conv1"), (3, "conv3")]
    assert mcunet.last_pointwise(found, 5) == expected
    assert mcunet.last_pointwise(found, 7)[0] == (0, "conv3")
    for n in (0, 8):
        with pytest.raises(ValueError, match=f"trainable_layers is {n}; .* 1 to 7"):
            mcunet.last_pointwise(found, n)


def bad_file(tmp_path, kind):
    path = tmp_path / "bad.safetensors"
    good, described = tensors(), architecture()
    if kind == "pickle":
        path.write_bytes(pickle.dumps(good))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no architecture":
        save_file(good, path)
    elif kind == "another network":
        save_file(good, path, {"architecture": json.dumps({"layers": 3})})
    elif kind in ("word for a size", "size of zero"):
        described["resolution"] = "large" if kind == "word for a size" else 0
        save_file(good, path, {"architecture": json.dumps(described)})
    elif kind == "residual between unlike channels":
        described["blocks"][1]["residual"] = True
        save_file(good, path, {"architecture": json.dumps(described)})
    elif kind == "flat kernel":
        good["stem.weight"] = good["stem.weight"].reshape(-1)
        save_file(good, path, {"architecture": json.dumps(described)})
    elif kind == "leaf for a module":
        good["blocks.0"] = good["stem.bias"]
        save_file(good, path, {"architecture": json.dumps(described)})
    elif kind == "missing tensor":
        del good["blocks.1.conv2.bias"]
        save_file(good, path, {"architecture": json.dumps(described)})
    elif kind == "wrong shape":
        described["blocks"][2]["hidden_channels"] = 24
        save_file(good, path, {"architecture": json.dumps(described)})
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("pickle", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("no architecture", "describes no MCUNet"),
        ("another network", "describes no MCUNet"),
        ("word for a size", "describes no MCUNet.*'large'"),
        ("size of zero", "describes no MCUNet.*below 1"),
        ("residual between unlike channels", "describes no MCUNet.*stride 2 from 6 to 8 channels"),
        ("flat kernel", r"'stem.weight' has shape \(\d+,\); .* \(out, in, height, width\)"),
        ("leaf for a module", "does not fit its architecture"),
        ("missing tensor", "does not fit its architecture.*blocks_1/conv2/bias"),
        ("wrong shape", "does not fit its architecture.*blocks_2/conv1"),
    ],
)
def test_bad_weights_file(tmp_path, kind, message):
    path = bad_file(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as error:
        mcunet.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="no ../shared/data/weights")
@pytest.mark.parametrize("name", ["mcunet-5fps", "mbv2-w0.35", "proxyless-w0.3"])
def test_published_weights_load(name):
    found, params = mcunet.load(WEIGHTS / f"{name}.safetensors")
    x = jnp.zeros((1, 128, 128, 3))
    features = jax.eval_shape(mcunet.MCUNet(found).apply, {"params": params}, x)
    assert features.shape == (1, 4, 4, found.blocks[-1].out_channels)
    if name == "mcunet-5fps":
        layers = [(12, "conv1"), (12, "conv3"), (13, "conv1"), (13, "conv3")]
        assert mcunet.last_pointwise(found, 4) == layers


def test_digits_network_divides_in_two(exact_products):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    network = digits.DigitsNet(classes=5)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda p: rng.normal(0, 0.1, p.shape).astype(np.float32), shapes)
    assert_divides(network, variables, x, 2)


def test_digits_last_convolutions():
    layers = [(2, "conv1"), (2, "conv2"), (3, "conv1"), (3, "conv2")]
    assert digits.last_convolutions(4) == layers
    with pytest.raises(ValueError, match="trainable_layers is 9"):
        digits.last_convolutions(9)
