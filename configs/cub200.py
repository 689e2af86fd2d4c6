"""CUB-200-2011: MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned.

The learning rates and epochs are CIFAR-10's: they were not tuned for this data set.
TensorFlow Datasets numbers the classes: they are called 0 to 199.
    python -m lance_jax.main --config configs/cub200.py --config.data_dir=DIR
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "caltech_birds2011"
    return config
