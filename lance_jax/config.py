"""The settings that every run has, with their defaults; `configs/` state what differs."""

import ml_collections


def base() -> ml_collections.ConfigDict:
    """All fields but those of a data set and a network."""
    config = ml_collections.ConfigDict()
    config.method = "lance"  # one or more of head,bias,backprop,lance
    config.seed = 0

    # The task. `classes` are names; "" means all of them.
    config.dataset = ""
    config.classes = ""
    config.flip = False  # mirrored pictures as further training examples
    config.eval_split = "test"  # or "validation", held out of the training pictures
    config.validation_fraction = 0.2

    # The network: frozen but for its last (pointwise) convolutions and a new head.
    config.model = ""
    config.trainable_layers = 4

    # Training: SGD, cosine schedule. Learning rates are chosen on a validation split.
    config.epochs = 15
    config.batch_size = 128
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.05, "bias": 0.05, "backprop": 0.05, "lance": 0.05}
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
    config.checkpoint_every = 4  # windows
    return config


def mcunet() -> ml_collections.ConfigDict:
    """`base`, for an MCUNet pretrained on ImageNet and a data set of TensorFlow Datasets."""
    config = base()
    config.data_dir = "~/tensorflow_datasets"
    config.flip = True
    config.model = "mcunet"
    config.weights = "mcunet-5fps.safetensors"
    config.cache_dir = "~/.cache/lance_jax"  # of frozen features; "" for memory alone
    return config
