"""A folder of your own pictures, one folder for each class: DIR/CLASS/*.jpg and so on.

MobileNetV2 pretrained on ImageNet, its last 4 layers fine-tuned. A fifth of every class is drawn
for the test by the seed, unless there are DIR/train/CLASS and DIR/test/CLASS. The learning rates
and epochs are CIFAR-10's: they were not tuned for your pictures, nor for batches of 32.
    python -m lance_jax.main --config configs/folder.py --config.folder=DIR
"""

import ml_collections

import lance_jax.config


def get_config() -> ml_collections.ConfigDict:
    config = lance_jax.config.folder()  # all fields and their defaults
    return config
