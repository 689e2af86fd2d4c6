"""Tables of continual learning, and what its methods are to reach, from results/continual.jsonl.

Differences between methods are paired over tasks and seeds, with 95 % t intervals.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import continual, markdown, records
from benchmarks.continual import SEARCH_TASKS
from lance_jax.continual_config import METHODS

Results = dict[int, dict]  # seed -> result
Measured = dict[str, dict[str, Results]]  # benchmark -> method -> results

NAMES = {
    "digits": "Digits, 5 tasks of 2 classes, small residual network",
    "cifar100": "Split CIFAR-100, 10 tasks of 10 classes, AlexNet at half width, 10 epochs a task",
    "five_datasets": "Five data sets, narrow ResNet-18, 3 epochs a task, energy 0.9",
    "cifar100_long": "Split CIFAR-100, AlexNet at full width, 50 epochs a task, energy 0.9",
    "cifar100_84px": "Split CIFAR-100 at 84 pixels, narrow ResNet-18, 1 epoch a task",
}


def read(path: Path, split: str = "test") -> Measured:
    """The runs over all tasks; of a method whose configuration changed only those of the last."""
    measured: Measured = defaultdict(lambda: defaultdict(dict))
    for record in records.read(path):
        searched = split == "validation" and record["result"]["config"]["tasks"] == SEARCH_TASKS
        if record["split"] == split and not searched:
            found = measured[record["benchmark"]][record["method"]]
            if any(_fixed(result) != _fixed(record["result"]) for result in found.values()):
                found.clear()
            found[record["seed"]] = record["result"]
    return measured


def _fixed(result: dict) -> dict:
    return {**continual.relevant(result["config"]), "seed": None}


# --- statistics -----------------------------------------------------------------------------------


def at_the_end(result: dict) -> np.ndarray:
    """Accuracy of each task after the last one, in percent."""
    return 100 * np.asarray(result["accuracy_matrix"][-1])


def changes(result: dict) -> np.ndarray:
    """What later tasks did to each but the last, in percent: their mean is BWT."""
    matrix = 100 * np.asarray(result["accuracy_matrix"])
    return matrix[-1, :-1] - matrix.diagonal()[:-1]


def paired(
    ours: Results, theirs: Results, values: Callable[[dict], np.ndarray] = at_the_end
) -> tuple[float, float, float]:
    """Mean difference over the tasks of common seeds, and its 95 % t interval, in points."""
    seeds = sorted(ours.keys() & theirs.keys())
    difference = np.concatenate([values(ours[seed]) - values(theirs[seed]) for seed in seeds])
    return _interval(difference)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    mean = float(np.mean(values))
    if len(values) < 2 or not np.any(values != values[0]):
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return mean, float(low), float(high)


def ram(results: Results, count: str) -> float:
    """Bytes in RAM in the task that needs most, mean over seeds.

    Those kept for the backward pass (`count`: "layer_inputs" or "total"), with what a method holds.
    """
    return float(np.mean([max(_ram(task, count) for task in of(r)) for r in results.values()]))


def _ram(task: dict, count: str) -> float:
    return task["kept"][count] + held(task)


def held(task: dict) -> float:
    """Bytes of factors, projectors, penalties, replay or adapters while a task trains."""
    return sum(size for name, size in task["ram"].items() if name != "kept")


def of(result: dict) -> list[dict]:
    """The tasks of a result."""
    return result["tasks"]


def most(results: Results, value: Callable[[dict], float]) -> float:
    """Of the task for which it is greatest; mean over seeds."""
    return float(np.mean([max(map(value, of(result))) for result in results.values()]))


# --- tables ---------------------------------------------------------------------------------------

HEADER = ["method", "ACC, %", "to `gpm`", "BWT", "forgetting", "FWT", "inputs, kB", "held, kB"]
HEADER += ["inputs + held", "all kept + held", "stored, kB", "rate", "n"]


def in_order(methods: Iterable[str]) -> list[str]:
    order = [*METHODS, *continual.VARIANTS]
    return sorted(methods, key=order.index)


def table(found: dict[str, Results]) -> str:
    """A line for each method."""
    rows = [_row(method, found) for method in in_order(found) if found[method]]
    return markdown.table(HEADER, rows) if rows else markdown.NOTHING


def _row(method: str, found: dict[str, Results]) -> list[str]:
    results, gpm = found[method], found.get("gpm", {})
    common = results.keys() & gpm.keys() if method != "gpm" else set()
    last = [of(result)[-1] for result in results.values()]
    return [
        f"`{method}`",
        _spread([100 * result["acc"] for result in results.values()]),
        markdown.difference(*paired(results, gpm)) if common else "",
        *(
            _spread([100 * r[name] for r in results.values() if r[name] is not None], "+")
            for name in ("bwt", "forgetting", "fwt")
        ),
        f"{most(results, lambda task: task['kept']['layer_inputs']) / 1e3:,.0f}",
        f"{most(results, held) / 1e3:,.0f}",
        f"{ram(results, 'layer_inputs') / 1e3:,.0f}",
        f"{ram(results, 'total') / 1e3:,.0f}",
        f"{np.mean([sum(task['storage'].values()) for task in last]) / 1e3:,.0f}",
        ", ".join({f"{_rate(result):g}": None for result in results.values()}),
        str(len(results)),
    ]


def _rate(result: dict) -> float:
    """The learning rate."""
    return result["config"]["learning_rate"][result["config"]["method"]]


def _spread(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):{sign}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def energies(measured: Measured) -> str:
    """Of runs on the validation split: a line for each energy of LANCE on Split CIFAR-100."""
    found = measured.get("cifar100", {})
    default = found.get("lance")
    rows = [
        [
            f"{next(iter(results.values()))['config']['energy']:g}",
            _spread([100 * result["acc"] for result in results.values()]),
            "" if default in (None, results) else markdown.difference(*paired(results, default)),
            f"{most(results, held) / 1e3:,.0f}",
            str(len(results)),
        ]
        for results in found.values()
    ]
    if not rows:
        return markdown.NOTHING
    header = ["energy", "ACC, %", "to the default", "held, kB", "n"]
    return markdown.table(header, sorted(rows, reverse=True))


def tables(measured: Measured) -> str:
    """A headed table for each benchmark that was measured."""
    parts = [f"**{NAMES[name]}**\n\n{table(measured[name])}" for name in NAMES if name in measured]
    return "\n\n".join(parts) or markdown.NOTHING


# --- targets --------------------------------------------------------------------------------------


def targets(measured: Measured) -> str:
    """What the methods are to reach on Split CIFAR-100 at half width, and whether they do."""
    found = measured.get("cifar100", {})
    rows = [*_accuracy_targets(found), *_byte_targets(measured)]
    if not rows:
        return markdown.NOTHING
    return markdown.table(["target", "measured", ""], [list(row) for row in rows])


def _accuracy_targets(found: dict[str, Results]) -> Iterable[tuple[str, str, str]]:
    def difference(ours: str, theirs: str, least: float, told: str, values=at_the_end):
        if found.get(ours) and found.get(theirs):
            mean, low, high = paired(found[ours], found[theirs], values)
            seeds = len(found[ours].keys() & found[theirs].keys())
            verdict = "" if least == -np.inf else _verdict(mean >= least)
            yield told, f"{markdown.difference(mean, low, high)}; n = {seeds}", verdict

    yield from difference("gpm", "finetune", 5.0, "`gpm` ahead of `finetune` by 5 of BWT", changes)
    yield from difference("lance", "gpm", -0.5, "`lance` at most 0.5 behind `gpm`")
    if found.get("lance"):
        values = np.concatenate([changes(result) for result in found["lance"].values()])
        mean, low, high = _interval(values)
        told = f"{markdown.difference(mean, low, high)}; n = {len(found['lance'])}"
        yield "`lance`: BWT no worse than -1", told, _verdict(mean >= -1)
    yield from difference("lance_scaled", "gpm", 1.0, "`lance_scaled` 1 ahead of `gpm`")
    yield from difference("lance_scaled", "sgp", -1.0, "`lance_scaled` at most 1 behind `sgp`")
    yield from difference("lance", "gpm_int4", -np.inf, "`lance` beside `gpm_int4` (no target)")


def _byte_targets(measured: Measured) -> Iterable[tuple[str, str, str]]:
    found = measured.get("cifar100", {})
    if found.get("lance"):
        share = [
            task["kept"]["layer_inputs_backprop"] / task["kept"]["layer_inputs"]
            for result in found["lance"].values()
            for task in of(result)
        ]
        told = "inputs kept at most 1/7, bounds counted, in every task"
        yield told, f"1/{min(share):.2f}", _verdict(min(share) >= 7)
    for name, most_of_gpm, told in (
        ("cifar100", 0.75, "AlexNet"),
        ("cifar100_84px", 0.25, "narrow ResNet-18 at 84 pixels"),
    ):
        here = measured.get(name, {})
        for method, count, kept in (
            ("lance", "layer_inputs", "inputs kept"),
            ("lance", "total", "all that is kept"),
            ("lance_blocks", "total", "all that is kept by blocks"),
        ):
            if here.get(method) and here.get("gpm"):
                share = ram(here[method], count) / ram(here["gpm"], count)
                wanted = f"{told}: {kept} + factors at most {most_of_gpm:g} of `gpm`'s"
                yield wanted, f"{share:.3f}", _verdict(share <= most_of_gpm)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


# --- a sentence -----------------------------------------------------------------------------------


def summary(measured: Measured) -> str:
    """What LANCE adds over gradient projection with int4 inputs, in one sentence."""
    found: dict[str, Any] = measured.get("cifar100", {})
    if not all(found.get(method) for method in ("lance", "gpm", "gpm_int4")):
        return markdown.NOTHING
    to_gpm = markdown.difference(*paired(found["lance"], found["gpm"]))
    to_int4 = markdown.difference(*paired(found["lance"], found["gpm_int4"]))
    factors, bases = most(found["lance"], held) / 1e6, most(found["gpm_int4"], held) / 1e6
    last = {
        method: float(np.mean([held(of(result)[-1]) for result in found[method].values()])) / 1e6
        for method in ("lance", "gpm_int4")
    }
    return (
        f"On Split CIFAR-100 (10 tasks, AlexNet at half width) LANCE is {to_gpm} points beside "
        f"gradient projection memory, and {to_int4} beside the same with inputs kept in int4. "
        f"While it trains it holds at most {factors:.1f} MB of factors, and {last['lance']:.1f} MB "
        f"in the last task; the projection at most {bases:.1f} MB of bases, and "
        f"{last['gpm_int4']:.1f} MB in the last task."
    )
