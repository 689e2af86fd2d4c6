"""Scikit-learn's digits: a small network pretrained on 0-4, fine-tuned on 5-9. The default.

Two CPU cores, offline, about a minute:
    python -m lance_jax.main
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.digits()  # all fields and their defaults
    config.method = "head,bias,backprop,lance"
    config.classes = "5,6,7,8,9"
    config.epochs = 20
    config.batch_size = 64
    config.micro_batch = 64  # nothing to choose: the same numbers in every run
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.2, "bias": 0.2, "backprop": 0.05, "lance": 0.05}
    )
    config.checkpoint_every = 10  # windows
    return config
