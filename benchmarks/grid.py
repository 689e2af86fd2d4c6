"""The measured cells of the grid by network, data and method, and their statistics."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks import finetune, records
from benchmarks.step_time import PLAIN
from lance_jax import config

MODELS = {
    "digits": "Small residual network",
    "mcunet": "MCUNet",
    "mobilenetv2": "MobileNetV2-0.35",
}
DATA = {
    "digits": "digits",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "pets": "Oxford-IIIT Pet",
}
METHODS = {
    "head": "head only",
    "bias": "head and biases",
    "backprop2": "plain backprop, last 2 layers",
    PLAIN: "plain backprop, one `jax.jit`",
    "backprop": "plain backprop",
    "checkpoint": "`jax.checkpoint` of blocks",
    "accumulate8": "micro-batches of 8",
    "accumulate1": "micro-batches of 1",
    "lance": "LANCE",
    "lance_micro": "LANCE, micro-batches of 8",
    "blocks": "LANCE, blocks in int4",
    "blocks_99": "LANCE, blocks, energy 0.99",
    "blocks_90": "LANCE, blocks, energy 0.9",
    "paper": "LANCE, `paper` modes",
    "int8": "int8 inputs",
    "int4": "int4 inputs",
    "hosvd": "HOSVD in each step",
}
EXACT = tuple(finetune.EXACT)  # these equal plain backprop by construction
# what LANCE is judged by; the digits and the breeds are shown beside them
JUDGED = tuple(itertools.product(("mcunet", "mobilenetv2"), ("cifar10", "cifar100")))


class Entry(NamedTuple):
    """A row of a table. Methods without an energy have None."""

    method: str
    energy: float | None = None

    @property
    def name(self) -> str:
        other = self.energy not in (None, default_energy())
        return METHODS[self.method] + (f", energy {self.energy:g}" if other else "")


# fields of a configuration in which methods differ
OF_METHODS = {"seed", "learning_rate"}.union(*finetune.METHODS.values(), ("energy",))

Cell = tuple[str, str]  # model and data
Runs = dict[int, dict]  # seed -> record
Measured = dict[Cell, dict[Entry, Runs]]

BACKPROP, BIAS = Entry("backprop"), Entry("bias")


def default_energy() -> float:
    """The program's."""
    found: config.Config = config.base()
    return found.energy


def lance() -> Entry:
    """The one recipe that LANCE is judged by."""
    return Entry("lance", default_energy())


def entry(method: str, settings: Any) -> Entry:
    return Entry(method, settings["energy"] if method in finetune.HAVE_ENERGY else None)


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """As in `METHODS`, the default energy before others."""
    methods = list(METHODS)
    found = set(entries)
    return sorted(
        found,
        key=lambda e: (methods.index(e.method), e.energy not in (None, default_energy()), e),
    )


# --- reading --------------------------------------------------------------------------------------


def read(path: Path) -> tuple[Measured, Measured]:
    """The test runs, and of the methods that equal backprop the bytes, at seed 0, by cell.

    Of a grid that is not finished, the methods that have all of backprop's seeds, two at least, and
    its task. A method whose configuration changed has only the runs of the last.
    """
    runs: Measured = defaultdict(lambda: defaultdict(dict))
    counted: Measured = defaultdict(dict)
    for record in records.read(path):
        settings = record["result"]["config"]
        cell = record["model"], record["data"]
        if record["split"] == "bytes":
            counted[cell][Entry(record["method"])] = {0: record}
        elif record["split"] == "test":
            found = runs[cell][entry(record["method"], settings)]
            if any(_fixed(run) != _fixed(record) for run in found.values()):
                found.clear()
            found[record["seed"]] = record
    complete = {cell: _complete(runs[cell]) for cell in sorted(runs, key=cell_order)}
    return {cell: found for cell, found in complete.items() if found}, counted


def _fixed(record: dict) -> dict:
    """What the runs of one entry have in common."""
    return {**finetune.config_of(record), "seed": None}


def _complete(found: dict[Entry, Runs]) -> dict[Entry, Runs]:
    """The methods that can be paired with backprop: all its seeds, and the same task."""
    reference = found.get(BACKPROP, {})
    if len(reference) < 2:
        return {}
    task = _task(reference)
    return {
        entry: runs
        for entry, runs in found.items()
        if reference.keys() <= runs.keys() and _task(runs) == task
    }


def _task(runs: Runs) -> dict:
    """The configuration but for what is the method's own."""
    config = finetune.config_of(next(iter(runs.values())))
    return {name: value for name, value in config.items() if name not in OF_METHODS}


def newest(rows: list[dict], *keys: str) -> list[dict]:
    """The last written of the rows that agree in all keys."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def cell_order(cell: Cell) -> tuple[bool, str, str]:
    """For sorting: those that LANCE is judged by come first."""
    return cell not in JUDGED, *cell


def cell_name(cell: Cell) -> str:
    return f"{MODELS[cell[0]]}, {DATA[cell[1]]}"


# --- statistics -----------------------------------------------------------------------------------


def accuracies(runs: Runs) -> list[float]:
    """In percent."""
    return [100 * record["result"]["test_accuracy"] for record in runs.values()]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


def paired(runs: Runs, reference: Runs) -> tuple[float, float, float]:
    """Mean difference in test accuracy over common seeds, and its 95 % t interval, in points."""
    seeds = sorted(runs.keys() & reference.keys())
    ours, theirs = (accuracies({seed: of[seed] for seed in seeds}) for of in (runs, reference))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    return float(np.mean(ours) - np.mean(theirs)), float(interval.low), float(interval.high)


def kept(runs: Runs, count: str = "total") -> float:
    """Bytes kept for one batch, mean over seeds; `count` is layer_inputs or total."""
    return float(np.mean([record["result"]["saved_bytes"][count] for record in runs.values()]))


def gain(runs: Runs, backprop: Runs) -> float:
    """Times fewer bytes kept in all than by plain backprop of all the trained layers."""
    return kept(backprop) / kept(runs)


def peak_gain(runs: Runs, backprop: Runs) -> float:
    """The same while a checkpointed block is run again."""
    return kept(backprop) / (kept(runs) + transient(runs))


def transient(runs: Runs) -> float:
    """Bytes that come on top while a checkpointed block is run again; 0 for other methods."""
    return max(record["result"]["saved_bytes"].get("transient", 0) for record in runs.values())
