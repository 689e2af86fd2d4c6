"""CIFAR-10: MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned.

The weights come from the Hugging Face hub, or with --config.weights=FILE from a file. The learning
rates were chosen with MCUNet (--config.weights=mcunet-5fps.safetensors). The frozen features are
computed once (minutes on two CPU cores) and cached; an epoch of 39 steps then takes seconds:
    python -m lance_jax.main --config configs/cifar10.py --config.data_dir=DIR
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "cifar10"
    config.resolution = 128  # 4 times the pictures' own; a third of the multiplications of 224
    return config
