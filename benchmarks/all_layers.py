"""All layers of MCUNet trained at once, by plain backprop and by blocks.

    python -m benchmarks.all_layers

The same epochs and seeds for each method, and at each of a few learning rates: far below that of
the last four layers, at which plain backprop of all of them ends at chance. All but the depthwise
convolutions train. A finished run is a line of results/all_layers.jsonl; the same command goes on
where it was stopped.
"""

import argparse
import itertools

from benchmarks import arguments, finetune, records, tasks

METHODS = ("backprop", "lance", "blocks")
SETTINGS = {"trainable_layers": 28, "epochs": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=("cifar10", "cifar100"), default=["cifar10"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.003125])
    parser.add_argument("--seeds", nargs="+", type=arguments.seed, default=[0])
    given = parser.parse_args()
    tasks.cache_compilations()
    runs = itertools.product(given.data, given.rates, given.seeds, given.methods)
    for data, rate, seed, method in runs:
        key = {"model": "mcunet", "data": data, "method": method, "split": "test"}
        key |= {"learning_rate": rate, "seed": seed}
        finetune.cell(key, records.RESULTS / "all_layers.jsonl", None, **SETTINGS)


if __name__ == "__main__":
    arguments.run(main)
