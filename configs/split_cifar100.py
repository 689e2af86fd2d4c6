"""Split CIFAR-100."""

import ml_collections

from lance_jax import continual_config


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.continual()  # all fields and their defaults
    config.datasets = "cifar100"
    return config
