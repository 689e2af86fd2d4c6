"""What README and docs/results.md say of accuracy and bytes."""

import numpy as np

from benchmarks import grid, markdown
from benchmarks.grid import BACKPROP, Cell, Entry, Measured


def sentence(measured: Measured) -> str:
    """The claim, over all measured cells of the grid; at another energy until the default's are."""
    entries = {e for cell in grid.JUDGED for e in measured.get(cell, {}) if e.method == "lance"}
    if not entries:
        return markdown.NOTHING
    lance = grid.in_order(entries)[0]
    cells = [cell for cell in grid.JUDGED if lance in measured.get(cell, {})]
    energy = "" if lance == grid.lance() else f" (energy {lance.energy:g})"
    models = list(dict.fromkeys(grid.MODELS[model] for model, _ in cells))
    data = list(dict.fromkeys(grid.DATA[name] for _, name in cells))
    if len(cells) == len(models) * len(data):
        place = f"{' and '.join(models)} on {' and '.join(data)}"
    else:
        place = ", ".join(f"{grid.MODELS[model]} on {grid.DATA[name]}" for model, name in cells)
    fewer = markdown.span(
        [grid.gain(measured[cell][lance], measured[cell][BACKPROP]) for cell in cells]
    )
    differences = [
        grid.paired(measured[cell][lance], measured[cell][BACKPROP])[0] for cell in cells
    ]
    seeds = min(len(measured[cell][lance]) for cell in cells)
    over = f"{seeds} seeds"
    if len(cells) > 1:
        over = (
            f"{min(differences):+.1f} to {max(differences):+.1f} by network and data, {over} each"
        )
    return (
        f"Fine-tuning {place}, LANCE{energy} keeps {fewer} times fewer bytes for the backward pass "
        f"than plain backprop, at a difference in test accuracy of {np.mean(differences):+.1f} "
        f"points ({over})."
    )


def main_table(measured: Measured, counted: Measured) -> str:
    """One row a method, one column a cell: accuracy and difference to backprop."""
    cells = [cell for cell in grid.JUDGED if cell in measured]
    if not cells:
        return markdown.NOTHING
    entries = {e for cell in cells for e in (*measured[cell], *counted.get(cell, {}))}
    # of a method with several energies the program's, or else the first
    by_method = {e.method: e for e in reversed(grid.in_order(entries))}

    def row(entry: Entry) -> list[str]:
        runs = {cell: {**counted.get(cell, {}), **measured[cell]}.get(entry) for cell in cells}
        found = [(one, measured[cell][BACKPROP]) for cell, one in runs.items() if one]
        fewer = markdown.span([grid.gain(*both) for both in found])
        if any(grid.transient(one) for one, _ in found):
            fewer += f"; {markdown.span([grid.peak_gain(*both) for both in found])} at its peak"
        shown = (accuracy(cell, entry, measured) for cell in cells)
        return [entry.name, *shown, fewer]

    def accuracy(cell: Cell, entry: Entry, measured: Measured) -> str:
        if entry.method in grid.EXACT:
            return "as plain backprop"
        if entry not in measured[cell]:
            return ""
        runs = measured[cell][entry]
        mean, deviation = grid.spread(grid.accuracies(runs))
        if entry == BACKPROP:
            return f"{mean:.1f} ± {deviation:.1f}"
        return (
            f"{mean:.1f} ± {deviation:.1f} ({grid.paired(runs, measured[cell][BACKPROP])[0]:+.1f})"
        )

    return markdown.table(
        ["kept for the backward pass", *map(grid.cell_name, cells), "times fewer bytes"],
        [row(entry) for entry in grid.in_order(by_method.values())],
    )


def cell_tables(
    measured: Measured, counted: Measured, milliseconds: dict[tuple[Cell, Entry], float]
) -> str:
    """Every cell with all of its methods."""
    found = [
        f"**{title(cell, measured)}**\n\n"
        + accuracy_table(cell, measured[cell], counted.get(cell, {}), milliseconds)
        for cell in measured
    ]
    return "\n\n".join(found) or markdown.NOTHING


def title(cell: Cell, measured: Measured) -> str:
    config = next(iter(measured[cell][BACKPROP].values()))["result"]["config"]
    names = config["classes"]
    classes = f"{len(names.split(','))} of its classes" if names else "all classes"
    layers = "convolutions" if cell[0] == "digits" else "pointwise convolutions"
    return f"{grid.cell_name(cell)}: last {config['trainable_layers']} {layers}, {classes}"


def accuracy_table(
    cell: Cell,
    found: dict[Entry, grid.Runs],
    counted: dict[Entry, grid.Runs],
    milliseconds: dict[tuple[Cell, Entry], float],
) -> str:
    """One row a method: accuracy, difference to backprop, training loss, bytes, time of a step."""
    header = [
        "kept for the backward pass",
        "learning rate",
        "test accuracy, %",
        "minus backprop (95 % interval)",
        "training loss",
        "kept, kB: layer inputs / all",
        "times fewer, all",
        "ms a step",
    ]

    def row(entry: Entry) -> list[str]:
        if entry in found:
            cells = accuracy_columns(entry, found)
        else:
            cells = ["", "equals plain backprop", "0", ""]
        cells += bytes_columns({**counted, **found}[entry], found[BACKPROP])
        time = milliseconds.get((cell, entry))
        return [entry.name, *cells, "" if time is None else f"{time:.0f}"]

    return markdown.table(header, [row(entry) for entry in grid.in_order([*found, *counted])])


def accuracy_columns(entry: Entry, found: dict[Entry, grid.Runs]) -> list[str]:
    runs = found[entry]
    mean, deviation = grid.spread(grid.accuracies(runs))
    rates = dict.fromkeys(f"{run['learning_rate']:g}" for run in runs.values())
    loss = np.mean([run["result"]["loss"] for run in runs.values()])
    against = "0" if entry == BACKPROP else markdown.difference(*grid.paired(runs, found[BACKPROP]))
    return [
        ", ".join(rates),
        f"{mean:.1f} ± {deviation:.1f}, n = {len(runs)}",
        against,
        f"{loss:.3f}",
    ]


def bytes_columns(runs: grid.Runs, backprop: grid.Runs) -> list[str]:
    total = f"{grid.kept(runs) / 1000:,.0f}"
    fewer = f"{grid.gain(runs, backprop):.1f}"
    extra = grid.transient(runs)
    if extra:  # counted as a whole
        peak = f"{(grid.kept(runs) + extra) / 1000:,.0f}"
        fewer += f", {grid.peak_gain(runs, backprop):.1f} at its peak"
        return [f"– / {total}, {peak} at its peak", fewer]
    return [f"{grid.kept(runs, 'layer_inputs') / 1000:,.0f} / {total}", fewer]
