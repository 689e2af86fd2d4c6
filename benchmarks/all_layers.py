"""All layers of MCUNet trained at once, by plain backprop and by blocks.

    python -m benchmarks.all_layers

The same epochs, learning rate and seeds for each method, and no search: at the rate that the grid
of `benchmarks.finetune` found for the last four layers, 0.05, plain backprop of all of them ends at
chance, so this is a quarter of it. All but the depthwise convolutions train. A finished run is a
line of results/all_layers.jsonl; the same command goes on where it was stopped.
"""

import argparse

from benchmarks import arguments, finetune, records, tasks

METHODS = ("backprop", "lance", "blocks")
SETTINGS = {"trainable_layers": 28, "epochs": 5}
LEARNING_RATE = 0.0125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=("cifar10", "cifar100"), default=["cifar10"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=arguments.seed, default=[0])
    given = parser.parse_args()
    tasks.cache_compilations()
    for data in given.data:
        for seed in given.seeds:
            for method in given.methods:
                key = {"model": "mcunet", "data": data, "method": method, "split": "test"}
                key |= {"learning_rate": LEARNING_RATE, "seed": seed}
                finetune.cell(key, records.RESULTS / "all_layers.jsonl", None, **SETTINGS)


if __name__ == "__main__":
    arguments.run(main)
