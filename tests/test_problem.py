"""What is trained of a network, and in what order a problem is prepared."""

import pytest
from settings import settings

from lance_jax.models import weights
from lance_jax.models.resnet import ResNet
from lance_jax.problem import prepare, trained_layers


@pytest.mark.parametrize(
    ("name", "n", "layers", "block"),
    [
        (
            "resnet18",
            4,
            ["blocks_6/conv2", "blocks_6/shortcut", "blocks_7/conv1", "blocks_7/conv2"],
            6,
        ),
        ("resnet18", 1, ["blocks_7/conv2"], 7),
        ("deit_tiny_patch16_224", 2, ["blocks_11/fc1", "blocks_11/fc2"], 11),
        ("mobilenetv2_100", 1, ["features"], 17),
        ("mobilenetv2_100", 2, ["blocks_16/conv3", "features"], 16),
        ("alexnet", 2, ["blocks_3/dense", "blocks_4/dense"], 3),
    ],
)
def test_the_last_layers(name, n, layers, block):
    assert trained_layers(weights.MODELS[name], n) == (layers, block)


def test_all_layers_begin_at_the_stem():
    net = ResNet(resolution=8, stages=(1, 2), width=4, small=True)
    layers, block = trained_layers(net, 8)
    assert layers[0] == "stem" and block == 0
    with pytest.raises(ValueError, match="config.trainable_layers is 9: .*the 8 that are neither"):
        trained_layers(net, 9)


def test_a_folder_that_is_none_is_told_before_weights_are_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="config.folder is 'nowhere', which is no folder"):
        prepare(settings("folder", folder="nowhere"), tmp_path)
