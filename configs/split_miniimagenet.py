"""Split MiniImageNet: twenty tasks of five classes for a narrow ResNet-18, from scratch.

Of a folder with a folder of pictures for each of the 100 classes, or train/ and test/ with such:

    python -m lance_jax.main --config configs/split_miniimagenet.py --config.folder=DIR

Published, in percent, mean of five runs, 500 training pictures a class, 100 epochs or more with a
falling learning rate, and the test batch's own statistics (--config.bn_eval=batch):

    method      ACC            BWT
    multitask   69.5           -
    EWC         52.0           -12
    ER          58.9           -7
    GPM         60.4           -0.7
    TRGP        61.8           -0.5
    CUBER       62.7           +0.2
    CODE-CL     68.8           -

(Table 1 of CUBER, arXiv 2211.00789; CODE-CL as its authors report.) Not run here, where the
pictures are not at hand. Published splits differ in their classes' order, which `class_seed` draws.
"""

import ml_collections

from lance_jax import continual_config


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.continual()  # all fields and their defaults
    config.method = "gpm,lance"
    config.datasets = "folder"
    config.folder = ""
    config.tasks = 20
    config.task_classes = 5
    config.class_seed = 1234
    config.model = "resnet18_narrow"
    config.width = 20
    config.resolution = 84
    config.threshold = 0.985
    config.threshold_step = 0.0
    return config
