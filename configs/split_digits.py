"""Scikit-learn's digits, two at a time: five tasks for a small network that begins untrained.

Offline, under two minutes on two CPU cores:
    python -m lance_jax.main --config configs/split_digits.py
"""

import ml_collections

from lance_jax import continual_config

# by the search of benchmarks/continual.py, on a validation split
RATES = {**dict.fromkeys(continual_config.METHODS, 0.05), "er": 0.2}


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.digits()  # all fields and their defaults
    config.method = "finetune,gpm,lance"
    config.batch_size = 32
    config.learning_rate = ml_collections.ConfigDict(RATES)
    return config
