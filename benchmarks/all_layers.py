"""All layers of MCUNet trained on CIFAR-10, by plain backprop and by blocks; one seed.

    python -m benchmarks.all_layers

The same epochs for each method, at the learning rate that is best on a validation split, searched
from 0.0125 for each by halving and doubling. All but the depthwise convolutions train. A finished
run is a line of results/all_layers.jsonl; the same command goes on where it was stopped.
"""

import argparse

from benchmarks import arguments, finetune, records, tasks

METHODS = ("backprop", "blocks", "blocks_99")
SETTINGS = {"trainable_layers": 28, "epochs": 5}
FIRST_RATE = 0.0125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given = parser.parse_args()
    tasks.cache_compilations()
    path = records.RESULTS / "all_layers.jsonl"
    for method in given.methods:
        finetune.measure(
            "mcunet", "cifar10", method, path, seeds=[0], first_rate=FIRST_RATE, **SETTINGS
        )


if __name__ == "__main__":
    arguments.run(main)
