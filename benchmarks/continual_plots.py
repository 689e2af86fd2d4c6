"""Plots of continual learning, as SVG: accuracy matrices, accuracy over time, free dimensions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.continual_tables import Results, in_order, of

MATRICES = "docs/continual-matrices.svg"
OVER_TIME = "docs/continual-tasks.svg"
FREE = "docs/continual-free.svg"
ALT = {
    MATRICES: "Accuracy of each task after each task",
    OVER_TIME: "Accuracy of each task over time",
    FREE: "Free dimensions of each layer",
}
SHOWN = ("finetune", "gpm", "lance", "lance_scaled")
SIDE = 2.6  # inches of a panel

Drawing = tuple[str, Callable[[], str]]  # a digest of what is drawn, and the drawing


def drawings(found: dict[str, Results]) -> dict[str, Drawing]:
    """Of the methods of one benchmark, by path; a plot of nothing is left out."""
    shown = [method for method in in_order(found) if method in SHOWN and found[method]]
    if not shown:
        return {}
    matrices = {method: matrix(found[method]) for method in shown}
    made: dict[str, tuple[Mapping[str, Any], Callable[[], Figure]]] = {
        MATRICES: (matrices, functools.partial(_draw_matrices, matrices)),
        OVER_TIME: (matrices, functools.partial(_draw_over_time, matrices)),
    }
    if found.get("lance"):
        free = free_dimensions(found["lance"])
        made[FREE] = free, functools.partial(_draw_free, free)
    return {path: _drawing(path, *parts) for path, parts in made.items()}


def matrix(results: Results) -> np.ndarray:
    """Accuracies in percent, mean over seeds: [i, j] of task j after task i."""
    return 100 * np.mean([result["accuracy_matrix"] for result in results.values()], axis=0)


def free_dimensions(results: Results) -> dict[str, list[float]]:
    """Of each layer after each task, the share of its dimensions that no task needs so far."""
    shares: dict[str, list[float]] = {}
    for path in of(next(iter(results.values())))[0]["free_dimensions"]:
        counts = [[task["free_dimensions"][path] for task in of(r)] for r in results.values()]
        sizes = [of(r)[0]["dimensions"][path] for r in results.values()]
        shares[path] = np.mean(np.asarray(counts) / np.asarray(sizes)[:, None], axis=0).tolist()
    return shares


def _drawing(path: str, values: Mapping[str, Any], draw: Callable[[], Figure]) -> Drawing:
    digest = plots.digest_of([path, [[k, np.round(v, 6).tolist()] for k, v in values.items()]])
    return digest, lambda: plots.svg(draw, digest)


def _panels(count: int) -> tuple[Figure, Any]:
    figure = Figure(figsize=(SIDE * count, SIDE + 0.4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _draw_matrices(matrices: dict[str, np.ndarray]) -> Figure:
    figure, axes = _panels(len(matrices))
    top = max(one.max() for one in matrices.values())
    for axis, (method, values) in zip(axes, matrices.items(), strict=True):
        axis.imshow(values, vmin=0, vmax=top, cmap="viridis")
        axis.set(title=method, xlabel="task", xticks=range(0, len(values), 2))
        axis.set_yticks(range(0, len(values), 2))
    axes[0].set_ylabel("after task")
    figure.colorbar(axes[0].images[0], ax=list(axes), label="test accuracy, %", shrink=0.8)
    return figure


def _draw_over_time(matrices: dict[str, np.ndarray]) -> Figure:
    figure, axes = _panels(len(matrices))
    for axis, (method, values) in zip(axes, matrices.items(), strict=True):
        for task in range(len(values)):
            axis.plot(range(task, len(values)), values[task:, task], marker=".", label=str(task))
        axis.set(title=method, xlabel="after task", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(
        *axes[0].get_legend_handles_labels(), title="task", loc="outside right center", ncols=1
    )
    return figure


def _draw_free(shares: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for path, values in shares.items():
        axis.plot(range(len(values)), 100 * np.asarray(values), marker=".", label=path)
    axis.set(xlabel="after task", ylabel="free dimensions, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure
