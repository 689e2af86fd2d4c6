"""What a run writes and shows: metrics.jsonl, result.json, progress bars, the comparison table."""

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

FIELDS = {"step", "epoch", "steps", "loss", "step_seconds"}  # of every line of metrics.jsonl
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("ETA"),
    TimeRemainingColumn(),
)


class Metrics:
    """The lines of a metrics.jsonl, one JSON object each, that only ever grows.

    Opening it for a run that goes on at `step` drops the lines of later steps, and half a line that
    a killed process left, so that the finished file is that of a run that was never stopped.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= step]
        write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept))

    def append(self, line: dict[str, Any]) -> None:
        """Adds a line, and returns when the operating system has it."""
        with self.path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return _lines(self.path)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
    try:
        lines = [json.loads(line) for line in whole]
        if all(line.keys() >= FIELDS for line in lines):
            return lines
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"{str(path)!r} holds lines that no run wrote; choose another --workdir"
    ) from None


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that other processes, and later runs, see complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def track(steps: Iterable[int], description: str) -> Iterable[int]:
    """The steps, with a progress bar that shows the time left."""
    with Progress(*COLUMNS) as progress:
        yield from progress.track(steps, description=description)


def spread(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median, least and greatest; None where nothing was measured."""
    if not seconds:
        return {"median": None, "min": None, "max": None}
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def show_table(results: Sequence[dict[str, Any]]) -> None:
    """Prints the comparison of finished runs, one a line."""
    config = results[0]["config"]
    split = config["eval_split"]
    table = Table(
        title=f"{config['dataset']}, batches of {config['batch_size']}",
        caption="kept: bytes that live from the forward to the backward pass, of the samples that "
        "go through the network at a time",
    )
    table.add_column("method")
    headers = ("train loss", "at a time", "kept, kB", "of backprop", "ms a step")
    if any(result["saved_bytes"].get("transient") for result in results):
        table.caption = f"{table.caption}; + what a recomputed block holds on top, and with it"
    for name in (f"{split} accuracy", *headers):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for result in results:
        kept, backprop = result["saved_bytes"]["total"], result["saved_bytes_backprop"]["total"]
        transient = result["saved_bytes"].get("transient")
        median = result["step_seconds"]["median"]
        table.add_row(
            result["method"],
            f"{result[f'{split}_accuracy']:.1%}",
            f"{result['loss']:.3f}",
            str(result["micro_batch"]),
            f"{kept / 1e3:,.1f}" + (f" + {transient / 1e3:,.1f}" if transient else ""),
            f"1/{backprop / kept:.1f}"
            + (f", 1/{backprop / (kept + transient):.1f}" if transient else ""),
            "-" if median is None else f"{1e3 * median:.1f}",
        )
    Console().print(table)


def show_continual_table(results: Sequence[dict[str, Any]]) -> None:
    """Prints the comparison of finished runs of continual learning, one a line."""
    config = results[0]["config"]
    table = Table(
        title=f"{config['datasets']}, {config['tasks']} tasks, batches of {config['batch_size']}",
        caption="ACC: mean accuracy at the end; BWT: what later tasks did to earlier ones, in "
        "points; kept: from the forward to the backward pass; held beside it while training: "
        "factors, projectors, penalties, replay or adapters; stored: what rests between tasks",
    )
    table.add_column("method")
    for name in ("ACC", "BWT", "kept, kB", "held, kB", "stored, kB"):
        table.add_column(name, justify="right")
    for result in results:
        memory = result["memory"]
        kept = memory["ram"]["kept"]
        held = sum(memory["ram"].values()) - kept
        bwt = result["bwt"]
        table.add_row(
            result["method"],
            f"{result['acc']:.1%}",
            "-" if bwt is None else f"{100 * bwt:+.1f}",
            f"{kept / 1e3:,.1f}",
            f"{held / 1e3:,.1f}",
            f"{sum(memory['storage'].values()) / 1e3:,.1f}",
        )
    Console().print(table)
