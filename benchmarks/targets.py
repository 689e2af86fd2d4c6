"""What LANCE is to reach, and whether it does, computed from the results.

Accuracy is judged where weight gradients pay: in the cells in which plain backprop is ahead of
training head and biases alone by `WORTH` points of test accuracy. Times on a CPU are judged for the
small networks and a batch of `CPU_BATCH`.
"""

import itertools
from collections.abc import Callable

import numpy as np

from benchmarks import finetune, grid, markdown, time_tables
from benchmarks.grid import BACKPROP, BIAS, Cell, Entry, Measured, Runs

WORTH = 1.0  # points
DIFFERENCE = -0.5  # points, mean over the cells
INTERVAL = -1.5  # points: no cell's interval is wholly below
FEWER = 13.0  # times
SLOWER = 20.0  # times
CPU_OTHERS = {"jax": "plain JAX", "torch": "PyTorch"}
CPU_BATCH = 32
CPU_SMALL = ("mcunet-5fps", "mbv2-w0.35")
CPU_FASTER = {  # times, than plain JAX and than PyTorch
    ("forward", "lance_jax"): (5.0, 2.0),
    ("last4", "lance_jax LANCE"): (5.0, 2.5),
    ("all", "lance_jax backprop"): (2.5, 1.0),
    ("all", "lance_jax LANCE"): (2.5, 1.0),
}

Row = tuple[str, str, str]  # target, what was measured, verdict


def judged(measured: Measured) -> dict[Cell, dict[Entry, Runs]]:
    """The cells in which LANCE is judged."""
    needed = {BACKPROP, BIAS, grid.lance()}
    return {
        cell: measured[cell]
        for cell in grid.JUDGED
        if needed <= measured.get(cell, {}).keys()
        and grid.paired(measured[cell][BACKPROP], measured[cell][BIAS])[0] >= WORTH
    }


def _not_judged(measured: Measured) -> str:
    """The other cells, with what sets LANCE apart there."""
    found = []
    for cell in grid.JUDGED:
        runs = measured.get(cell, {})
        if cell not in judged(measured) and {BACKPROP, BIAS, grid.lance()} <= runs.keys():
            ahead = grid.paired(runs[BACKPROP], runs[BIAS])[0]
            ours, low, high = grid.paired(runs[grid.lance()], runs[BIAS])
            found.append(
                f"{grid.cell_name(cell)} (plain backprop {ahead:+.2f}, LANCE "
                f"{markdown.difference(ours, low, high)} beside head and biases)"
            )
    return "; ".join(found)


def finished(measured: Measured) -> bool:
    """Whether all cells have all seeds of what decides if LANCE is judged in them."""

    def complete(cell: Cell) -> bool:
        runs = measured.get(cell, {})
        return all(
            set(finetune.SEEDS) <= runs.get(entry, {}).keys()
            for entry in (BACKPROP, BIAS, grid.lance())
        )

    return all(map(complete, grid.JUDGED))


def rows(measured: Measured, decompositions: list[dict]) -> list[Row]:
    cells = judged(measured)
    over = bool(cells) and finished(measured)
    found = [
        _difference(cells, over),
        _interval(cells, over),
        _bytes(cells, over),
        *(_ahead(Entry(m), cells, over) for m in ("paper", "bias", "backprop2")),
        _quantised(cells, over),
    ]
    return [*found, _decomposition(decompositions)]


def _verdict(met: bool, finished: bool) -> str:
    return ("met" if met else "missed") + ("" if finished else ", so far")


def _difference(cells: Measured, finished: bool) -> Row:
    target = f"accuracy minus plain backprop's, mean of the judged cells: {DIFFERENCE} or better"
    if not cells:
        return target, "", "not measured"
    found = {c: grid.paired(runs[grid.lance()], runs[BACKPROP])[0] for c, runs in cells.items()}
    mean = float(np.mean(list(found.values())))
    worst = _extreme(min, found)
    return target, f"{mean:+.2f}; least {worst}", _verdict(mean >= DIFFERENCE, finished)


def _interval(cells: Measured, finished: bool) -> Row:
    target = f"no judged cell's 95 % interval of that difference wholly below {INTERVAL}"
    if not cells:
        return target, "", "not measured"
    upper = {c: grid.paired(runs[grid.lance()], runs[BACKPROP])[2] for c, runs in cells.items()}
    met = min(upper.values()) >= INTERVAL
    return target, f"lowest upper end {_extreme(min, upper)}", _verdict(met, finished)


def _bytes(cells: Measured, finished: bool) -> Row:
    target = f"bytes kept in all: {FEWER:g} times fewer than plain backprop in every judged cell"
    if not cells:
        return target, "", "not measured"
    found = [grid.gain(runs[grid.lance()], runs[BACKPROP]) for runs in cells.values()]
    return target, markdown.span(found), _verdict(min(found) >= FEWER, finished)


def _ahead(rival: Entry, cells: Measured, finished: bool) -> Row:
    target = f"accuracy ahead of {rival.name} in every judged cell"
    both = {c: runs for c, runs in cells.items() if rival in runs}
    if not both:
        return target, "", "not measured"
    found = {c: grid.paired(runs[grid.lance()], runs[rival])[0] for c, runs in both.items()}
    mean = float(np.mean(list(found.values())))
    verdict = _verdict(min(found.values()) > 0, finished and len(both) == len(cells))
    return target, f"{mean:+.2f} on average; least {_extreme(min, found)}", verdict


def _quantised(cells: Measured, finished: bool) -> Row:
    rival = Entry("int4")
    target = (
        f"fewer bytes than {rival.name} at equal accuracy (the difference's interval is not wholly "
        "below 0) in every judged cell"
    )
    both = {c: runs for c, runs in cells.items() if rival in runs}
    if not both:
        return target, "", "not measured"
    more, differences = [], []
    for runs in both.values():
        more.append(grid.kept(runs[rival]) / grid.kept(runs[grid.lance()]))
        differences.append(grid.paired(runs[grid.lance()], runs[rival]))
    met = min(more) > 1 and all(high >= 0 for _, _, high in differences)
    text = f"{markdown.span(more)} times fewer; "
    text += "; ".join(markdown.difference(*found) for found in differences)
    return target, text, _verdict(met, finished and len(both) == len(cells))


def _decomposition(rows: list[dict]) -> Row:
    target = f"HOSVD of a step's layer inputs {SLOWER:g} times slower than LANCE's projection"
    rows = [row for row in rows if row["energy"] == grid.default_energy()]
    if not rows:
        return target, "", "not measured"
    ratios = [row["ratios"]["projection"] for row in rows]
    text = "; ".join(
        f"{grid.MODELS[row['model']]} {markdown.ratio(ratio)}"
        for row, ratio in zip(rows, ratios, strict=True)
    )
    whole = {row["model"] for row in rows} >= {model for model, _ in grid.JUDGED}
    return target, text, _verdict(min(ratio["median"] for ratio in ratios) >= SLOWER, whole)


def cpu_rows(rows: list[dict]) -> list[Row]:
    """Targets of the times of `benchmarks.cpu`."""
    found = []
    small = [r for r in rows if r["network"] in CPU_SMALL and r["batch_size"] == CPU_BATCH]
    for (kind, ours), factors in CPU_FASTER.items():
        name = time_tables.CPU_KINDS[kind] + (" by LANCE" if ours.endswith("LANCE") else "")
        of_kind = [row for row in small if row["kind"] == kind]
        finished = {row["network"] for row in of_kind} == set(CPU_SMALL)
        for (other, label), times in zip(CPU_OTHERS.items(), factors, strict=True):
            target = f"{name}, the small networks: {times:g} times as fast as {label}"
            found.append(_faster(target, of_kind, f"{other} / {ours}", times, finished))
    return [*found, _never_slower(rows)]


def _faster(target: str, rows: list[dict], name: str, times: float, finished: bool) -> Row:
    if not rows:
        return target, "", "not measured"
    text = "; ".join(
        f"{time_tables.CPU_NETWORKS[row['network']]} {markdown.ratio(row['ratios'][name])}"
        for row in rows
    )
    met = min(row["ratios"][name]["median"] for row in rows) >= times
    return target, text, _verdict(met, finished)


def _never_slower(rows: list[dict]) -> Row:
    """Over all networks, kinds of call and batch sizes."""
    target = "never slower than plain JAX"
    found = {
        (row["network"], row["kind"], row["batch_size"], name.removeprefix("jax / ")): ratio
        for row in rows
        for name, ratio in row["ratios"].items()
        if name.startswith("jax / ")
    }
    if not found:
        return target, "", "not measured"
    least = min(found, key=lambda key: found[key]["median"])
    network, kind, size, ours = least
    text = (
        f"least {markdown.ratio(found[least])}: {time_tables.CPU_NETWORKS[network]}, "
        f"{time_tables.CPU_KINDS[kind]}, batch {size}, {ours}"
    )
    wanted = itertools.product(time_tables.CPU_NETWORKS, time_tables.CPU_KINDS, (1, CPU_BATCH))
    finished = {(r["network"], r["kind"], r["batch_size"]) for r in rows} >= set(wanted)
    return target, text, _verdict(found[least]["median"] >= 1, finished)


def _extreme(choose: Callable, found: dict[Cell, float]) -> str:
    cell = choose(found, key=lambda c: found[c])
    return f"{found[cell]:+.2f} ({grid.cell_name(cell)})"


def table(measured: Measured, decompositions: list[dict], cpu: list[dict]) -> str:
    names = "; ".join(map(grid.cell_name, judged(measured))) or "none yet"
    text = f"Judged where plain backprop is ahead of head and biases by a point: {names}."
    if others := _not_judged(measured):
        text += f" Not judged: {others}."
    if not finished(measured):
        text += " Not all cells are measured."
    found = [list(row) for row in [*rows(measured, decompositions), *cpu_rows(cpu)]]
    return f"{text}\n\n{markdown.table(['target', 'measured', ''], found)}"
