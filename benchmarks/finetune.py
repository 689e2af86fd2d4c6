"""Accuracy of every method: `python -m benchmarks.finetune --data digits cifar10 pets`.

For each method first the learning rate, doubled and halved from 0.05 until neither neighbour is
better, by held-out accuracy on a validation split and one seed; then, with that rate, the test
accuracy of five seeds. A finished cell is a line of results/finetune.jsonl, so the same command
goes on where it was stopped.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_collections

from benchmarks import records, tasks
from lance_jax import train

SEARCH_SEED = 100  # none of the test runs'
SEEDS = range(5)
METHODS = {
    "head": {"method": "head"},
    "bias": {"method": "bias"},
    "backprop": {"method": "backprop"},
    "lance": {"method": "lance"},
    "paper": {"method": "lance", "modes": "paper", "energy": 0.7, "core_dtype": ""},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=tasks.DATA, default=list(tasks.DATA))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    for data in arguments.data:
        for method in arguments.methods:
            measure(data, method, records.RESULTS / "finetune.jsonl")


def measure(data: str, method: str, path: Path, seeds=SEEDS, **settings) -> None:
    """Appends all missing cells of one data set and method; `settings` replace config fields."""

    def accuracy(rate: float) -> float:
        record = cell(data, method, "validation", rate, SEARCH_SEED, path, **settings)
        return record["result"]["validation_accuracy"]

    rate = search(accuracy)
    for seed in seeds:
        cell(data, method, "test", rate, seed, path, **settings)


def search(accuracy: Callable[[float], float], start: float = 0.05) -> float:
    """The rate none of whose neighbours (half, double) is better, by hill climbing."""
    best, scores = start, {}
    while True:
        for rate in (best, best / 2, best * 2):
            if rate not in scores:
                scores[rate] = accuracy(rate)
        highest = max(scores, key=lambda rate: (scores[rate], rate == best))
        if highest == best:
            return best
        best = highest


def cell(
    data: str, method: str, split: str, rate: float, seed: int, path: Path, **settings
) -> dict:
    """The record of one run: from the file if its configuration is there, else run and appended."""
    key = {"data": data, "method": method, "split": split, "learning_rate": rate, "seed": seed}
    config = tasks.config(data, **METHODS[method], eval_split=split, seed=seed, **settings)
    name = METHODS[method]["method"]
    config.learning_rate = ml_collections.ConfigDict({name: rate})
    for record in records.read(path):
        if key.items() <= record.items() and record["result"]["config"] == config.to_dict():
            return record
    workdir = tasks.RUNS / "-".join(str(part) for part in key.values())
    record = {**key, "result": train.run(config, workdir, name)}
    records.append(path, record)
    shutil.rmtree(workdir)  # a killed run goes on in it, a finished one leaves only its record
    print(f"{key} {record['result'][f'{split}_accuracy']:.4f}", flush=True)
    return record


if __name__ == "__main__":
    main()
