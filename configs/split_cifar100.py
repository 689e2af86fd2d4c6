"""Split CIFAR-100: ten tasks of ten classes for the AlexNet of the literature, from scratch.

    python -m lance_jax.main --config configs/split_cifar100.py --config.data_dir=DIR

Published, in percent, mean of five runs, all with 500 training pictures a class, 200 epochs with a
falling learning rate, and the test batch's own statistics in batch norm (--config.bn_eval=batch):

    method      ACC            BWT
    multitask   79.6           -
    EWC         68.8           -2
    ER          71.7           -6
    GPM         72.5           -0.9
    TRGP        74.5           -0.9
    CUBER       75.5           +0.1
    CODE-CL     77.2           -
    LANCE       71.5           -

(Table 1 of CUBER, arXiv 2211.00789; CODE-CL and LANCE as their authors report.) Others measure GPM
at 71 to 72: differences below a point need runs in one harness, as these methods have it here.
Network, order, batches and threshold are those of the code of gradient projection memory (arXiv
2103.09762). Not so the learning rate, the epochs and the cosine schedule; pictures from -1 to 1,
where it standardises them; all of a task's pictures, where it protects by 125; no validation split.
"""

import ml_collections

from lance_jax import continual_config

# by the search of benchmarks/continual.py, on a validation split and at half the width
RATES = {**dict.fromkeys(continual_config.METHODS, 0.2), "finetune": 0.1, "er": 0.1}


def get_config() -> ml_collections.ConfigDict:
    config = continual_config.continual()  # all fields and their defaults
    config.method = "gpm,lance"
    config.datasets = "cifar100"
    config.learning_rate = ml_collections.ConfigDict(RATES)
    config.width = 64  # 32 for half the width, and a quarter of the time
    return config
