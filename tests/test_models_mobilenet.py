"""MobileNetV2 from a state dict in timm's layout against plain float64."""

import jax
import pytest

from lance_jax.models import mobilenet, weights
from tests.pretrained import Reference, imagenet_normalized, pictures, relu6
from tests.tolerances import assert_close

# of stage and block: expansion, channels at width 1, stride
BLOCKS = {
    (0, 0): (1, 16, 1),
    (1, 0): (6, 24, 2),
    (1, 1): (6, 24, 1),
    (2, 0): (6, 32, 2),
    (2, 1): (6, 32, 1),
    (2, 2): (6, 32, 1),
    (3, 0): (6, 64, 2),
    (3, 1): (6, 64, 1),
    (3, 2): (6, 64, 1),
    (3, 3): (6, 64, 1),
    (4, 0): (6, 96, 1),
    (4, 1): (6, 96, 1),
    (4, 2): (6, 96, 1),
    (5, 0): (6, 160, 2),
    (5, 1): (6, 160, 1),
    (5, 2): (6, 160, 1),
    (6, 0): (6, 320, 1),
}
# of each stage at width 0.35
CHANNELS = {0: 8, 1: 8, 2: 16, 3: 24, 4: 32, 5: 56, 6: 112}


def block(file, x, name, expansion, channels, stride):
    hidden, y, count = x.shape[-1] * expansion, x, 1
    if expansion > 1:
        y = relu6(file.norm(file.conv(x, f"{name}.conv_pw", hidden, 1), f"{name}.bn1"))
        count = 2
    y = file.conv(y, f"{name}.conv_dw", hidden, 3, stride, groups=hidden)
    y = relu6(file.norm(y, f"{name}.bn{count}"))
    last = "conv_pwl" if expansion > 1 else "conv_pw"
    y = file.norm(file.conv(y, f"{name}.{last}", channels, 1), f"{name}.bn{count + 1}")
    return x + y if x.shape == y.shape else y


def reference(file, x, stem, channels):
    """Logits of 7 classes; `channels` of each stage."""
    x = file.conv(imagenet_normalized(x), "conv_stem", stem, 3, 2)
    x = relu6(file.norm(x, "bn1"))
    for (stage, j), (expansion, _, stride) in BLOCKS.items():
        x = block(file, x, f"blocks.{stage}.{j}", expansion, channels[stage], stride)
    x = relu6(file.norm(file.conv(x, "conv_head", 1280, 1), "bn2"))
    return file.dense(x.mean((1, 2)), "classifier", 7)


def test_logits_equal_the_reference(tmp_path, exact_products):
    file, x = Reference(), pictures(2, 33)
    logits = reference(file, x, 16, CHANNELS)
    path = file.save(tmp_path / "file.safetensors", kind="mobilenetv2", width=0.35, resolution=33)
    network, variables = weights.load(path)
    assert_close(jax.jit(network.apply)(variables, x), logits)
    assert set(weights.keys(network)) == set(file.tensors)


@pytest.mark.parametrize(("width", "count"), [(1.0, 3_504_872), (0.5, 1_968_680), (1.4, 6_108_776)])
def test_the_published_sizes(width, count):
    """Parameters of timm's mobilenetv2_100, _050 and _140 with 1000 classes."""
    network = mobilenet.MobileNetV2(width=width, classes=1000)
    params = weights.network.shapes(network)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_channels_at_width_1():
    found = [
        (b.hidden_channels // b.in_channels, b.out_channels, b.stride)
        for b in mobilenet.blocks(1.0)
    ]
    assert found == list(BLOCKS.values())
