"""Accuracy of every method on every network and data set: `python -m benchmarks.finetune`.

For each method first the learning rate, doubled and halved from 0.05 until neither neighbour is
better, by held-out accuracy on a validation split and one seed; then, with that rate, the test
accuracy of five seeds. Of `EXACT`, which compute plain backprop's gradients, the bytes alone. A
finished cell is a line of results/finetune.jsonl, so the same command goes on where it was stopped.
Two processes may measure different parts of the grid side by side; each needs one core:

    taskset -c 0 python -m benchmarks.finetune --models mcunet
    taskset -c 1 python -m benchmarks.finetune --models mobilenetv2
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_collections

import lance_jax
from benchmarks import arguments, records, rivals, tasks
from lance_jax import loop, train
from lance_jax.config import Config, base
from lance_jax.problem import Problem, prepare

SEARCH_SEED = 100  # none of the test runs'
SEEDS = range(5)
# A run writes no checkpoints on its way: a killed cell is measured again.
FIXED = {"checkpoint_every": 1_000_000}
# What is set in the program's config. Their energy is that of the grid but where one is given.
METHODS = {
    "head": {"method": "head"},
    "bias": {"method": "bias"},
    "backprop": {"method": "backprop"},
    "backprop2": {"method": "backprop", "trainable_layers": 2},
    "lance": {"method": "lance"},
    "lance_micro": {"method": "lance", "micro_batch": 8},
    "blocks": {"method": "lance", "keep": "blocks", "modes": "none"},
    "blocks_99": {"method": "lance", "keep": "blocks", "energy": 0.99},
    "blocks_90": {"method": "lance", "keep": "blocks", "energy": 0.9},
    "paper": {"method": "lance", "modes": "paper", "energy": 0.7, "core_dtype": ""},
    "int8": {"method": "lance", "modes": "none", "core_dtype": "int8"},
    "int4": {"method": "lance", "modes": "none", "core_dtype": "int4"},
    "hosvd": {"method": "backprop", "modes": "batch,height,width,channel", "core_dtype": ""},
}
HAVE_ENERGY = ("lance", "lance_micro", "hosvd")
EXACT = {
    "checkpoint": {"method": "backprop"},
    "accumulate8": {"method": "backprop", "micro_batch": 8},
    "accumulate1": {"method": "backprop", "micro_batch": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=tasks.MODELS, default=["mcunet", "mobilenetv2"]
    )
    parser.add_argument("--data", nargs="+", choices=tasks.DATA, default=["cifar10", "cifar100"])
    methods = [*METHODS, *EXACT]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    energies = {"type": arguments.energy, "default": [base().energy]}
    parser.add_argument("--energies", nargs="+", **energies)
    parser.add_argument("--seeds", nargs="+", type=arguments.seed, default=list(SEEDS))
    given = parser.parse_args()
    if SEARCH_SEED in given.seeds:
        parser.error(f"--seeds: {SEARCH_SEED} is the seed of the search for learning rates")
    pairs = tasks.pairs(parser, given.models, given.data)
    tasks.cache_compilations()
    path = records.RESULTS / "finetune.jsonl"
    for model, data in pairs:
        for method in given.methods:
            if method in EXACT:
                count(model, data, method, path)
                continue
            for energy in given.energies if method in HAVE_ENERGY else [None]:
                measure(model, data, method, path, given.seeds, energy)


def measure(
    model: str,
    data: str,
    method: str,
    path: Path,
    seeds: Iterable[int] = SEEDS,
    energy: float | None = None,
    first_rate: float = 0.05,
    **settings,
) -> None:
    """Appends all missing cells of one method; `settings` replace config fields.

    The search for a learning rate begins at `first_rate`.
    """

    def measured(split: str, rate: float, seed: int) -> dict[str, Any]:
        key = {"model": model, "data": data, "method": method, "split": split}
        return cell({**key, "learning_rate": rate, "seed": seed}, path, energy, **settings)

    def accuracy(rate: float) -> float:
        return measured("validation", rate, SEARCH_SEED)["validation_accuracy"]

    rate = search(accuracy, first_rate)
    for seed in seeds:
        measured("test", rate, seed)


def search(accuracy: Callable[[float], float], start: float) -> float:
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


def cell(key: dict[str, Any], path: Path, energy: float | None, **settings) -> dict[str, Any]:
    """The result of one run: from the file if its configuration is there, else run and appended.

    key: model, data, method, split, learning_rate and seed.
    """
    of_method: dict[str, Any] = {
        **METHODS[key["method"]],
        **({} if energy is None else {"energy": energy}),
    }
    shared = {**FIXED, "eval_split": key["split"], "seed": key["seed"], **settings}
    config = tasks.config(key["model"], key["data"], **shared, **of_method)
    name: str = of_method["method"]
    config.learning_rate = ml_collections.ConfigDict({name: key["learning_rate"]})
    found = recorded(path, key, config)
    if found is not None:
        return found
    layers = {"trainable_layers": config.trainable_layers}
    problem = problem_of(tasks.config(key["model"], key["data"], **shared | layers))
    result = run(config, key["method"], problem)
    records.append(path, {**key, "result": result})
    print(key, result[f"{key['split']}_accuracy"], flush=True)
    return result


def count(model: str, data: str, method: str, path: Path, **settings) -> None:
    """Appends the bytes that one of `EXACT` keeps, if they are missing."""
    key = {"model": model, "data": data, "method": method, "split": "bytes"}
    shared = {**FIXED, **settings}
    config: Any = tasks.config(model, data, **shared, **EXACT[method])
    if recorded(path, key, config) is None:
        problem = problem_of(tasks.config(model, data, **shared))
        fitted = loop.Fitted(None, lance_jax.Factors(), 0.0, [], 0.0, config.micro_batch)
        saved, backprop = train.saved_bytes(config, config.method, problem, fitted)
        result = {
            "config": config.to_dict(),
            "saved_bytes": saved
            if method != "checkpoint"
            else rivals.checkpoint_bytes(config, problem),
            "saved_bytes_backprop": backprop,
            "versions": train.versions(),
        }
        records.append(path, {**key, "result": result})
        print(key, result["saved_bytes"], flush=True)


def recorded(path: Path, key: dict[str, Any], config: Config) -> dict[str, Any] | None:
    """The result under this key with this configuration."""
    for record in records.read(path):
        if key.items() <= record.items() and config_of(record) == config.to_dict():
            return record["result"]
    return None


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a record; what was measured before there were blocks kept layers."""
    return {"keep": "layers", **record["result"]["config"]}


def problem_of(config: Config) -> Problem:
    """The problem of a configuration, prepared once and kept."""
    return _prepared(json.dumps(config.to_dict(), sort_keys=True))


@functools.cache
def _prepared(config: str) -> Problem:
    with tempfile.TemporaryDirectory() as workdir:
        return prepare(ml_collections.ConfigDict(json.loads(config)), workdir)


def run(config: Config, method: str, problem: Problem) -> dict[str, Any]:
    """The result of the program, with the bytes of the decomposition, which is not its own."""
    with tempfile.TemporaryDirectory() as workdir:
        if method != "hosvd":
            return train.run(config, workdir, config.method, problem)
        compressed = problem._replace(train_fn=rivals.hosvd(config, problem))
        result = train.run(config, workdir, config.method, compressed)
        # The run is finished: this reads its end.
        end = train.fit_method(config, compressed, config.method, Path(workdir) / config.method)
    ranks = [
        one
        for params in (problem.params, end.params)
        for one in rivals.batch_ranks(config, problem, params, config.calibration_batches)
    ]
    saved = rivals.hosvd_bytes(config, problem, ranks)
    return {**result, "ranks": ranks[-1], "saved_bytes": saved}


if __name__ == "__main__":
    arguments.run(main)
