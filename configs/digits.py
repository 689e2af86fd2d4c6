"""Scikit-learn's digits: a small network pretrained on 0-4, fine-tuned on 5-9. The default.

Two CPU cores, offline, under two minutes:
    python -m lance_jax.main
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.method = "head,bias,backprop,lance"  # one or more of these
    config.seed = 0

    # The task. `classes` are names; "" means all of them.
    config.dataset = "digits"
    config.classes = "5,6,7,8,9"
    config.flip = False  # mirrored pictures as further training examples
    config.eval_split = "test"  # or "validation", held out of the training pictures
    config.validation_fraction = 0.2

    # The network: frozen but for its last convolutions and a new head.
    config.model = "digits"
    config.trainable_layers = 4
    config.pretrain = ml_collections.ConfigDict(
        {"classes": "0,1,2,3,4", "epochs": 10, "learning_rate": 0.1}
    )

    # Training: SGD, cosine schedule. Learning rates are chosen on a validation split.
    config.epochs = 20
    config.batch_size = 64
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.1, "bias": 0.1, "backprop": 0.1, "lance": 0.1}
    )
    config.momentum = 0.9
    config.clip = 2.0  # global norm of the gradient

    # LANCE. `modes`: "" for the default, "paper", "none" for whole inputs, or "channel,height".
    config.calibration_batches = 8
    config.energy = 0.98
    config.modes = ""
    config.core_dtype = "int4"  # "bfloat16", "int8", or "" for the activation's own

    # A line of metrics every `log_every` steps and at an epoch's end: a window.
    config.log_every = 10
    config.checkpoint_every = 10  # windows
    return config
