"""Oxford-IIIT Pet: MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned.

The weights come from the Hugging Face hub, or with --config.weights=FILE from a file. The learning
rates were chosen with MCUNet (--config.weights=mcunet-5fps.safetensors --config.resolution=0) on
seven breeds. The frozen features are computed once and cached:
    python -m lance_jax.main --config configs/pets.py --config.data_dir=DIR \
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
        {"head": 0.1, "bias": 0.05, "backprop": 0.05, "lance": 0.025}
    )
    return config
