"""Oxford-IIIT Pet: MCUNet pretrained on ImageNet, last 4 pointwise convolutions fine-tuned.

Two CPU cores; the frozen features are computed once and cached:
    python -m lance_jax.main --config configs/pets.py --workdir workdir/pets \
        --config.data_dir=DIR --config.weights=DIR/mcunet-5fps.safetensors \
        --config.classes=Abyssinian,american_bulldog,Bengal
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "oxford_iiit_pet"
    config.epochs = 30
    config.log_every = 5
    config.learning_rate = ml_collections.ConfigDict(
        {"head": 0.1, "bias": 0.05, "backprop": 0.025, "lance": 0.1}
    )
    return config
