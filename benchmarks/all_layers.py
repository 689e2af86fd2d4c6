"""All layers of MCUNet trained on CIFAR-10, by plain backprop and by blocks; one seed.

    python -m benchmarks.all_layers

The same epochs for each method, at each of a few learning rates, which are not searched. All but
the depthwise convolutions train. A finished run is a line of results/all_layers.jsonl; the same
command goes on where it was stopped.
"""

import argparse
import itertools

from benchmarks import arguments, finetune, records, tasks

METHODS = ("backprop", "blocks", "blocks_90")
SETTINGS = {"trainable_layers": 28, "epochs": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0125, 0.003125])
    given = parser.parse_args()
    tasks.cache_compilations()
    for rate, method in itertools.product(given.rates, given.methods):
        key = {"model": "mcunet", "data": "cifar10", "method": method, "split": "test"}
        key |= {"learning_rate": rate, "seed": 0}
        finetune.cell(key, records.RESULTS / "all_layers.jsonl", None, **SETTINGS)


if __name__ == "__main__":
    arguments.run(main)
