"""CIFAR-100: MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned.

The learning rates and epochs are CIFAR-10's: they were not tuned for this data set.
    python -m lance_jax.main --config configs/cifar100.py --config.data_dir=DIR
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "cifar100"
    config.resolution = 128  # 4 times the pictures' own; a third of the multiplications of 224
    return config
