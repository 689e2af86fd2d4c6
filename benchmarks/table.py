"""Writes README's figures from the committed results: `python -m benchmarks.table [--check]`.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by what `blocks` says for
NAME. `--check` writes nothing and fails if README is not up to date.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks import records

README = Path(__file__).parents[1] / "README.md"
METHODS = {
    "head": "head only",
    "bias": "head and biases",
    "backprop": "plain backprop",
    "lance": "LANCE",
    "paper": "LANCE, `paper` modes",
}
DATA = {
    "digits": "Digits: small residual network, last {trainable_layers} convolutions, {classes}",
    "cifar10": "CIFAR-10: MCUNet, last {trainable_layers} pointwise convolutions, {classes}",
    "pets": "Oxford-IIIT Pet: MCUNet, last {trainable_layers} pointwise convolutions, {classes}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if README is not up to date")
    check = parser.parse_args().check
    old = README.read_text()
    new = fill(old, blocks(records.RESULTS))
    if check and new != old:
        sys.exit("README.md differs from benchmarks/results: run python -m benchmarks.table")
    if not check:
        README.write_text(new)


def blocks(results: Path) -> dict[str, str]:
    """Markdown text by block name, from the JSON lines under `results`."""
    finetune = by_method(records.read(results / "finetune.jsonl"))
    gradients = newest(records.read(results / "gradients.jsonl"), "data", "seed", "when", "energy")
    return {
        "sentence": sentence(finetune["cifar10"]),
        "finetune": "\n\n".join(
            f"**{title(data, finetune[data])}**\n\n{accuracy_table(finetune[data])}"
            for data in DATA
            if finetune[data]
        ),
        "gradients": gradient_table(gradients),
        "energy": energy_table(gradients),
        "step_time": step_table(
            newest(records.read(results / "step_time.jsonl"), "data", "baseline", "device")
        ),
    }


def fill(text: str, contents: dict[str, str]) -> str:
    """`text` with each marked block replaced; block names must match the markers exactly."""
    pattern = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)
    marked = [match[1] for match in pattern.finditer(text)]
    if sorted(marked) != sorted(contents):
        raise ValueError(f"README marks {sorted(marked)}, the results give {sorted(contents)}")
    return pattern.sub(
        lambda match: f"<!-- begin {match[1]} -->\n{contents[match[1]]}\n<!-- end {match[1]} -->",
        text,
    )


def newest(rows: list[dict], *keys: str) -> list[dict]:
    """The last written of the rows that agree in all keys."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def by_method(cells: list[dict]) -> defaultdict[str, defaultdict[str, dict[int, dict]]]:
    """Test cells as data -> method -> seed -> cell, of the configuration last measured.

    Of a grid that is not finished, the methods that have all of backprop's seeds, two at least.
    """
    table = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        if cell["split"] == "test":
            runs = table[cell["data"]][cell["method"]]
            if any(settings(run) != settings(cell) for run in runs.values()):
                runs.clear()
            runs[cell["seed"]] = cell
    for runs in table.values():
        seeds = runs["backprop"].keys()
        for method in list(runs):
            if len(seeds) < 2 or not seeds <= runs[method].keys():
                del runs[method]
    return table


def settings(cell: dict) -> dict:
    """What the cells of one method have in common."""
    return {**cell["result"]["config"], "seed": None}


def title(data: str, runs: dict[str, dict[int, dict]]) -> str:
    config = next(iter(runs["backprop"].values()))["result"]["config"]
    names = config["classes"]
    classes = f"{len(names.split(','))} of its classes" if names else "all classes"
    return DATA[data].format(trainable_layers=config["trainable_layers"], classes=classes)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1))


def paired(runs: dict[int, dict], reference: dict[int, dict]) -> tuple[float, float, float]:
    """Mean difference in test accuracy over common seeds, and its 95 % t interval, in points."""
    seeds = sorted(runs.keys() & reference.keys())
    ours, theirs = (
        [100 * cells[seed]["result"]["test_accuracy"] for seed in seeds]
        for cells in (runs, reference)
    )
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    return float(np.mean(ours) - np.mean(theirs)), float(interval.low), float(interval.high)


def gain(result: dict, count: str) -> float:
    """Times fewer bytes kept than by plain backprop; `count` is layer_inputs or total."""
    return result["saved_bytes_backprop"][count] / result["saved_bytes"][count]


def sentence(runs: dict[str, dict[int, dict]]) -> str:
    """The claim, from the CIFAR-10 runs."""
    if not {"lance", "backprop"} <= runs.keys():
        return "(no results yet)"
    lance, backprop = runs["lance"], runs["backprop"]
    accuracy, plain = (
        np.mean([100 * cell["result"]["test_accuracy"] for cell in cells.values()])
        for cells in (lance, backprop)
    )
    difference, low, high = paired(lance, backprop)
    result = next(iter(lance.values()))["result"]
    return (
        f"Fine-tuning MCUNet on CIFAR-10, LANCE keeps {gain(result, 'total'):.1f} times fewer "
        "bytes for the backward pass than plain backprop "
        f"({gain(result, 'layer_inputs'):.0f} times fewer for the layers' inputs) "
        f"at {accuracy:.1f} % against {plain:.1f} % test accuracy "
        f"({len(lance)} seeds, paired difference {difference:+.1f} points, "
        f"95 % interval {low:+.1f} to {high:+.1f})."
    )


def accuracy_table(runs: dict[str, dict[int, dict]]) -> str:
    """One row a method: accuracy, difference to backprop, training loss, bytes."""
    rows = [accuracy_row(method, runs) for method in METHODS if method in runs]
    return markdown(
        [
            "kept for the backward pass",
            "learning rate",
            "test accuracy, %",
            "minus backprop (95 % interval)",
            "training loss",
            "kept, kB: layer inputs / all",
            "times fewer, all",
        ],
        rows,
    )


def accuracy_row(method: str, runs: dict[str, dict[int, dict]]) -> list[str]:
    cells = runs[method]
    results = [cell["result"] for cell in cells.values()]
    mean, deviation = spread([100 * result["test_accuracy"] for result in results])
    against = "0"
    if method != "backprop":
        difference, low, high = paired(cells, runs["backprop"])
        against = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
    saved = results[0]["saved_bytes"]
    return [
        METHODS[method],
        f"{next(iter(cells.values()))['learning_rate']:g}",
        f"{mean:.1f} ± {deviation:.1f}, n = {len(results)}",
        against,
        f"{np.mean([result['loss'] for result in results]):.3f}",
        f"{saved['layer_inputs'] / 1000:,.0f} / {saved['total'] / 1000:,.0f}",
        f"{gain(results[0], 'total'):.1f}",
    ]


def gradient_table(rows: list[dict]) -> str:
    """Cosine of LANCE's and plain backprop's weight gradients by layer, at the default energy."""
    cosines = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["energy"] == row["config"]["energy"]:
            for path, cosine in row["cosines"].items():
                cosines[path][row["when"]].append(cosine)
    return markdown(
        ["layer", "after calibration", "at the end of training"],
        [
            [f"`{path}`", *(mean_and_least(by_moment[when]) for when in ("calibration", "end"))]
            for path, by_moment in cosines.items()
        ],
    )


def energy_table(rows: list[dict]) -> str:
    """What each energy costs and gives, after calibration: the layer of the least cosine."""
    gains, cosines = defaultdict(list), defaultdict(list)
    for row in rows:
        if row["when"] == "calibration":
            gains[row["energy"]].append(row["times_fewer"])
            cosines[row["energy"]].append(min(row["cosines"].values()))
    return markdown(
        ["energy", "times fewer bytes, all", "worst layer's cosine"],
        [
            [f"{energy:g}", f"{np.mean(gains[energy]):.1f}", mean_and_least(cosines[energy])]
            for energy in sorted(gains)
        ],
    )


def mean_and_least(values: list[float]) -> str:
    return f"{np.mean(values):.3f} (least {min(values):.3f}, n = {len(values)})"


def step_table(rows: list[dict]) -> str:
    """Time of a LANCE step over that of plain backprop, steps interleaved in one process."""
    return markdown(
        ["data", "plain backprop", "its ms", "LANCE, ms", "ratio (95 % interval)", "device"],
        [
            [
                row["data"],
                row["baseline"],
                f"{1000 * row['seconds']['backprop']:.0f}",
                f"{1000 * row['seconds']['lance']:.0f}",
                f"{row['ratio']['median']:.2f} ({row['ratio']['low']:.2f} to "
                f"{row['ratio']['high']:.2f})",
                row["device"],
            ]
            for row in rows
        ],
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
