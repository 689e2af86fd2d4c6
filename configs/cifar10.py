"""CIFAR-10: MCUNet pretrained on ImageNet, its last 4 pointwise convolutions fine-tuned.

Two CPU cores; the frozen features (minutes, once) are cached, an epoch of 39 steps takes seconds:
    python -m lance_jax.main --config configs/cifar10.py --workdir workdir/cifar10 \
        --config.data_dir=DIR --config.weights=DIR/mcunet-5fps.safetensors
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "cifar10"
    config.epochs = 15
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.0125, "bias": 0.1, "backprop": 0.05, "lance": 0.05}
    )
    return config
