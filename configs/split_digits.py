"""Scikit-learn's digits, two at a time: five tasks for a small network that begins untrained.

Offline, about a minute on two CPU cores:
    python -m lance_jax.main --config configs/split_digits.py
"""

import ml_collections

from lance_jax import continual_config


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.continual()  # all fields and their defaults
    config.method = "finetune,gpm,lance"
    config.datasets = "digits"
    config.model = "digits"
    config.tasks = 5
    config.task_classes = 2
    config.epochs = 10
    config.batch_size = 32
    return config
