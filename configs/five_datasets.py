"""Five data sets, one after another, for a narrow ResNet-18 from scratch.

    python -m lance_jax.main --config configs/five_datasets.py --config.data_dir=DIR

notMNIST is not in the catalogue of TensorFlow Datasets: DIR/notmnist must hold it in their layout.

Published, in percent, mean of five runs, all training pictures, 100 epochs with a falling learning
rate, and the test batch's own statistics (--config.bn_eval=batch):

    method      ACC            BWT
    multitask   91.5           -
    EWC         88.6           -4
    ER          88.3           -4
    GPM         91.2           -1
    TRGP        93.6           -0.0
    CUBER       93.5           0.0
    CODE-CL     93.3           -0.3

(Table 1 of CUBER, arXiv 2211.00789; CODE-CL as its authors report.)
"""

import ml_collections

from lance_jax import continual_config

# those of Split CIFAR-100
RATES = {**dict.fromkeys(continual_config.METHODS, 0.2), "finetune": 0.1, "er": 0.1}


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.continual()  # all fields and their defaults
    config.method = "gpm,lance"
    config.datasets = "cifar10,mnist,svhn_cropped,fashion_mnist,notmnist"
    config.tasks = 5
    config.learning_rate = ml_collections.ConfigDict(RATES)
    config.model = "resnet18_narrow"
    config.width = 20
    config.threshold = 0.965
    config.threshold_step = 0.0
    return config
