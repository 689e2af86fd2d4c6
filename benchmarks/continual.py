"""Every method of continual learning on every benchmark: `python -m benchmarks.continual`.

First the learning rate, doubled and halved from 0.1 until neither neighbour is better, by held-out
accuracy over the first two tasks of one seed; the methods that project gradients have that of
`gpm`. Then the seeds. A finished cell is a line of results/continual.jsonl, and one that was
stopped goes on inside its task, so the same command goes on where it was stopped. Two processes may
measure different parts of the grid side by side, but not methods that share a learning rate; each
needs one core:

    taskset -c 0 python -m benchmarks.continual --benchmarks cifar100 --methods gpm lance
    taskset -c 1 python -m benchmarks.continual --benchmarks cifar100 --methods finetune joint
"""

import argparse
import hashlib
import importlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from benchmarks import arguments, records, tasks
from benchmarks.finetune import SEARCH_SEED, search
from lance_jax import continual_train
from lance_jax.config import EVAL_SPLITS, Config
from lance_jax.continual_config import METHODS

FIRST = METHODS[:8]  # those that have five seeds
SEARCH_START = 0.1
SEARCH_TASKS = 2
VALIDATION_SEEDS = 3
# methods that have another's learning rate: they differ from it in what they project out or keep
RATE_OF: dict[str, str] = dict.fromkeys(
    ("gpm_int4", "sgp", "lance", "lance_scaled", "lance_authors"), "gpm"
)
# the only methods whose results depend on a field
ONLY = {"energy": ("lance", "lance_scaled"), "authors_energy": ("lance_authors",)}
# methods under settings that are not the default
VARIANTS: dict[str, dict[str, Any]] = {
    "lance_blocks": {"method": "lance", "keep": "blocks"},
    "lance_energy98": {"method": "lance", "energy": 0.98},
    "lance_energy90": {"method": "lance", "energy": 0.9},
    "lance_energy70": {"method": "lance", "energy": 0.7},
    "finetune_batch": {"method": "finetune", "bn_eval": "batch"},
    "gpm_batch": {"method": "gpm", "bn_eval": "batch"},
    "lance_batch": {"method": "lance", "bn_eval": "batch"},
    "gpm_frozen": {"method": "gpm", "bn_eval": "frozen"},
}


class Benchmark(NamedTuple):
    """A configuration, what is changed in it, and the number of seeds of each method."""

    config: str
    changes: Mapping[str, Any]
    seeds: Mapping[str, int]
    rates: str | None = None  # the benchmark whose learning rates it has


_DATA = {"data_dir": str(Path(tasks.WEIGHTS).parent / "tfds")}
_SEEDS = {method: 5 if method in FIRST else 3 for method in METHODS}
_ENERGIES = {"lance_energy98": 5, "lance_energy90": 5, "lance_energy70": 0}
BENCHMARKS = {
    "digits": Benchmark("split_digits", {}, dict.fromkeys((*METHODS, "lance_blocks"), 5)),
    "cifar100": Benchmark(
        "split_cifar100", {**_DATA, "width": 32}, _SEEDS | dict.fromkeys(VARIANTS, 3) | _ENERGIES
    ),
    "five_datasets": Benchmark(
        "five_datasets",
        {**_DATA, "epochs": 3, "energy": 0.9},
        dict.fromkeys(METHODS, 1),
        "cifar100",
    ),
    # whether the order holds where the network is as published, and trained five times as long
    "cifar100_long": Benchmark(
        "split_cifar100",
        {**_DATA, "epochs": 50, "energy": 0.9},
        dict.fromkeys(("gpm", "sgp", "lance", "lance_scaled"), 1),
        "cifar100",
    ),
    # for the bytes alone: larger pictures, whose activations are most of what is held
    "cifar100_84px": Benchmark(
        "split_cifar100",
        {**_DATA, "model": "resnet18_narrow", "width": 20, "resolution": 84, "epochs": 1},
        dict.fromkeys(("gpm", "gpm_int4", "lance", "lance_energy90", "lance_blocks"), 1),
        "cifar100",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    known = [*METHODS, *VARIANTS]
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--seeds", nargs="+", type=arguments.seed, help="of those of the benchmark")
    parser.add_argument(
        "--split",
        choices=EVAL_SPLITS,
        default="test",
        help="validation: to choose a setting by, with seeds and pictures that no test run has",
    )
    given = parser.parse_args()
    tasks.cache_compilations()
    path = records.RESULTS / "continual.jsonl"
    for name in given.benchmarks:
        for method in given.methods:
            measure(name, method, path, given.seeds, given.split)


def measure(
    name: str,
    method: str,
    path: Path,
    seeds: Iterable[int] | None = None,
    split: str = "test",
    **settings: Any,
) -> None:
    """Appends all missing cells of a method on a benchmark; `settings` replace config fields."""
    benchmark = BENCHMARKS[name]
    count = VALIDATION_SEEDS if split == "validation" else benchmark.seeds.get(method, 0)
    wanted = [seed for seed in range(count) if seeds is None or seed in seeds]
    if wanted:
        rate = learning_rate(benchmark.rates or name, method, path, **settings)
        for seed in wanted:
            seed += SEARCH_SEED if split == "validation" else 0
            cell(name, method, split, rate, seed, path, **settings)


def learning_rate(name: str, method: str, path: Path, **settings: Any) -> float:
    """The rate that the search finds for a method, or for the one that it shares it with."""
    searched: str = VARIANTS.get(method, {}).get("method", method)
    searched = RATE_OF.get(searched, searched)

    def accuracy(rate: float) -> float:
        few = {**settings, "tasks": SEARCH_TASKS}
        return cell(name, searched, "validation", rate, SEARCH_SEED, path, **few)["acc"]

    return search(accuracy, SEARCH_START)


def cell(
    name: str, method: str, split: str, rate: float, seed: int, path: Path, **settings: Any
) -> dict[str, Any]:
    """The result of one run: from the file if its configuration is there, else run and appended."""
    config = config_of(name, method, split, rate, seed, **settings)
    key = {"benchmark": name, "method": method, "split": split, "seed": seed}
    for record in records.read(path):
        known = record["result"]["config"]
        if key.items() <= record.items() and relevant(known) == relevant(config.to_dict()):
            return record["result"]
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()
    workdir = tasks.RUNS / "continual" / digest[:16]
    result = continual_train.run(config, workdir, config.method)
    records.append(path, {**key, "result": result})
    shutil.rmtree(workdir)
    print(key, rate, result["acc"], result["bwt"], flush=True)
    return result


def relevant(config: dict[str, Any]) -> dict[str, Any]:
    """What a cell's result depends on; three fields came when most were measured.

    Not on how often it is saved.
    """
    new = {"keep": "layers", "classes": "", "authors_energy": config["energy"]}
    others = {field: None for field, methods in ONLY.items() if config["method"] not in methods}
    return {**new, **config, "checkpoint_every": None, **others}


def config_of(
    name: str, method: str, split: str, rate: float, seed: int, **settings: Any
) -> Config:
    """The program's configuration of a cell."""
    benchmark = BENCHMARKS[name]
    config: Any = importlib.import_module(f"configs.{benchmark.config}").get_config()
    own = VARIANTS.get(method, {"method": method})
    config.update({**benchmark.changes, **own, "eval_split": split, "seed": seed, **settings})
    config.learning_rate = ml_collections.ConfigDict({config.method: rate})
    return config


if __name__ == "__main__":
    arguments.run(main)
