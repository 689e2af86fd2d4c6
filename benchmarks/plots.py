"""Test accuracy against bytes kept and against time, as SVG, a panel for each network and data."""

import functools
import hashlib
import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from benchmarks import grid
from benchmarks.grid import BACKPROP, Cell, Entry, Measured

# exact methods black, LANCE red, other compression blue, methods that train less green
STYLES = {
    "backprop": ("o", "black", "full"),
    "checkpoint": ("s", "black", "none"),
    "accumulate8": ("^", "black", "none"),
    "accumulate1": ("v", "black", "none"),
    "lance": ("o", "#d62728", "full"),
    "lance_micro": ("^", "#d62728", "full"),
    "blocks": ("D", "#d62728", "full"),
    "blocks_99": ("v", "#d62728", "full"),
    "blocks_90": (">", "#d62728", "full"),
    "paper": ("P", "#d62728", "none"),
    "int8": ("s", "#1f77b4", "full"),
    "int4": ("D", "#1f77b4", "full"),
    "hosvd": ("P", "#1f77b4", "full"),
    "backprop2": ("o", "#2ca02c", "none"),
    "bias": ("X", "#2ca02c", "full"),
    "head": ("*", "#2ca02c", "full"),
}
OTHER_ENERGY = ("o", "#d62728", "none")
COLUMNS, WIDTH, HEIGHT = 2, 4.2, 3.0  # panels a row; inches a panel


class Point(NamedTuple):
    entry: Entry
    x: float
    accuracy: float  # %, mean
    deviation: float  # over seeds


Panels = dict[Cell, list[Point]]


def against_bytes(measured: Measured, counted: Measured) -> Panels:
    """x: kB kept in all."""
    panels = {}
    for cell, found in measured.items():
        points = {**found, **counted.get(cell, {})}
        panels[cell] = [
            Point(e, grid.kept(points[e]) / 1000, *_accuracy(e, found))
            for e in grid.in_order(points)
        ]
    return panels


def against_seconds(measured: Measured, seconds: dict[tuple[Cell, Entry], float]) -> Panels:
    """x: milliseconds of a gradient step."""
    panels = {}
    for cell, found in measured.items():
        timed = [e for of, e in seconds if of == cell and e.method in STYLES]
        entries = [e for e in timed if e in found or e.method in grid.EXACT]
        if entries:
            panels[cell] = [
                Point(e, 1000 * seconds[cell, e], *_accuracy(e, found))
                for e in grid.in_order(entries)
            ]
    return panels


def _accuracy(entry: Entry, found: dict[Entry, grid.Runs]) -> tuple[float, float]:
    runs = found[BACKPROP if entry.method in grid.EXACT else entry]
    return grid.spread(grid.accuracies(runs))


def digest(panels: Panels) -> str:
    """Of what is drawn, but for rounding; it stands in the drawing."""
    values = [
        [*cell, *point.entry, *(round(value, 6) for value in point[1:])]
        for cell, points in panels.items()
        for point in points
    ]
    return digest_of(values)


def digest_of(values: Any) -> str:
    """Of JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def svg(draw: Callable[[], Figure], digest: str) -> str:
    """A figure as SVG, the same for the same figure, with the digest in it."""
    settings: Any = {"svg.hashsalt": "lance_jax", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        file = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": digest}
        draw().savefig(file, format="svg", metadata=metadata)
    # The lines end in spaces, which nothing needs.
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def draw(panels: Panels, label: str) -> str:
    """SVG, the same for the same panels."""
    return svg(functools.partial(_figure, panels, label), digest(panels))


def _figure(panels: Panels, label: str) -> Figure:
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT + 1.2))
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    handles = {}
    for axis, (cell, points) in zip(axes.flat, panels.items(), strict=False):
        for point in points:
            handles[point.entry] = _draw_point(axis, point)
        axis.set(xscale="log", xlabel=label, title=grid.cell_name(cell))
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for row in axes:
        row[0].set_ylabel("test accuracy, %")
    ordered = grid.in_order(handles)
    figure.legend(
        [handles[e] for e in ordered],
        [e.name.replace("`", "") for e in ordered],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 1.2 / (rows * HEIGHT + 1.2), 1, 1))
    return figure


def _draw_point(axis, point: Point):
    marker, color, fill = STYLES[point.entry.method]
    if point.entry.method == "lance" and point.entry != grid.lance():
        marker, color, fill = OTHER_ENERGY
    return axis.errorbar(
        point.x,
        point.accuracy,
        yerr=point.deviation,
        marker=marker,
        color=color,
        fillstyle=fill,
        markersize=7,
        elinewidth=0.8,
        linestyle="none",
    )
