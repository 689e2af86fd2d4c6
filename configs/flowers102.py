"""Oxford Flowers-102: MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned.

The learning rates and epochs are CIFAR-10's: they were not tuned for this data set.
The published protocol trains on the train and the validation split (1020 pictures each) and tests
on the test split (6149), and so does this; config.eval_split=validation holds out of the former.
    python -m lance_jax.main --config configs/flowers102.py --config.data_dir=DIR
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.pretrained()  # all fields and their defaults
    config.dataset = "oxford_flowers102"
    return config
