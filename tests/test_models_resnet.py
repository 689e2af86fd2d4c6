"""ResNets from a state dict in torchvision's and timm's layout against plain float64."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lance_jax.models import weights
from lance_jax.models.network import shapes
from lance_jax.models.resnet import ResNet
from tests.pretrained import Reference, imagenet_normalized, pictures, relu
from tests.tolerances import assert_close


def block(file, x, name, channels, stride):
    y = relu(file.norm(file.conv(x, f"{name}.conv1", channels, 3, stride), f"{name}.bn1"))
    y = file.norm(file.conv(y, f"{name}.conv2", channels, 3), f"{name}.bn2")
    if x.shape != y.shape:
        x = file.norm(
            file.conv(x, f"{name}.downsample.0", channels, 1, stride), f"{name}.downsample.1"
        )
    return relu(x + y)


def pool3(x):
    """Max-pool of 3x3 at stride 2 with one pixel around."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    return windows[:, ::2, ::2].max((-1, -2))


def reference(file, x, stages, width, small=False):
    """Logits of 7 classes."""
    if small:
        x = relu(file.norm(file.conv(x, "conv1", width, 3), "bn1"))
    else:
        x = file.conv(imagenet_normalized(x), "conv1", width, 7, 2)
        x = pool3(relu(file.norm(x, "bn1")))
    for s, n in enumerate(stages):
        for j in range(n):
            stride = 2 if s > 0 and j == 0 else 1
            x = block(file, x, f"layer{s + 1}.{j}", width * 2**s, stride)
    if not small:
        return file.dense(x.mean((1, 2)), "fc", 7)
    n, h, w, c = x.shape
    pooled = x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))
    return file.dense(pooled.transpose(0, 3, 1, 2).reshape(n, -1), "fc", 7, bias=False)


FORMS = {
    "resnet18": {"stages": [2, 2, 2, 2], "width": 4, "resolution": 33},
    "resnet34": {"stages": [3, 4, 6, 3], "width": 2, "resolution": 32},
    "narrow": {"stages": [2, 2, 2, 2], "width": 3, "resolution": 32, "small": True},
}


def loaded(tmp_path, form, trained=False):
    """(network, variables, pictures, the logits in float64, the state dict)."""
    file, spec = Reference(trained=trained), FORMS[form]
    x = pictures(3, spec["resolution"])
    logits = reference(file, x, spec["stages"], spec["width"], spec.get("small", False))
    path = file.save(tmp_path / "file.safetensors", kind="resnet", **spec)
    return *weights.load(path), x, logits, file


@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_the_reference(tmp_path, form, exact_products):
    network, variables, x, logits, file = loaded(tmp_path, form)
    assert_close(jax.jit(network.apply)(variables, x), logits)
    assert set(weights.keys(network)) == set(file.tensors)


def test_trained_statistics_follow_the_batch(tmp_path, exact_products):
    """Momentum 0.1 as torch; the variance that is averaged is Flax's, the biased one."""
    network, variables, x, logits, file = loaded(tmp_path, "narrow", trained=True)
    network = network.clone(batch_stats="trained")
    got, new = jax.jit(lambda v, x: network.apply(v, x, mutable=["batch_stats"]))(variables, x)
    assert_close(got, logits)
    found, paths = flatten_dict(new, sep="/"), weights.keys(network)
    assert {paths[name] for name in file.updated} == set(found)
    for name, value in file.updated.items():
        assert_close(found[paths[name]], value, scale=1 + np.abs(value).max(), what=name)


def test_the_published_sizes():
    """Parameters of torchvision's resnet18 and resnet34 with 1000 classes."""
    for name, count in {"resnet18": 11_689_512, "resnet34": 21_797_672}.items():
        shapes = weights.network.shapes(weights.MODELS[name].clone(classes=1000))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_a_stem_of_stride_2_for_pictures_of_84_pixels():
    """As published: 1440 features, of 3x3 places (11 pixels by 2, an odd line left out, by 2)."""
    network = ResNet(small=True, width=20, resolution=84, stem_stride=2, classes=5)
    assert shapes(network)["params"]["head"]["kernel"].shape == (1440, 5)
