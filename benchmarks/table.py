"""Writes the figures of README and docs/results.md: `python -m benchmarks.table [--check]`.

Text between `<!-- begin NAME -->` and `<!-- end NAME -->` is replaced by what `blocks` says for
NAME; a block stands on one page or on both. The plots are written to docs/. `--check` writes
nothing and fails if a page or a plot is not up to date.
"""

import argparse
import functools
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks import (
    accuracy_tables,
    continual_plots,
    continual_tables,
    grid,
    keep_tables,
    keep_targets,
    markdown,
    plots,
    records,
    targets,
    time_tables,
)
from benchmarks.grid import Cell, Entry

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/results.md", "docs/continual.md", "docs/keep.md")
BYTES_PLOT, SECONDS_PLOT = "docs/accuracy-bytes.svg", "docs/accuracy-seconds.svg"
AXES = {BYTES_PLOT: "kept for one batch, kB", SECONDS_PLOT: "time of a gradient step, ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if anything is not up to date")
    check = parser.parse_args().check
    texts = {page: (ROOT / page).read_text() for page in PAGES}
    new = fill(texts, blocks(records.RESULTS))
    if check:
        wrong = [page for page in PAGES if new[page] != texts[page]]
        for path, (digest, _) in pictures(records.RESULTS).items():
            plot = ROOT / path
            if not plot.exists() or digest not in plot.read_text():
                wrong.append(path)
        if wrong:
            sys.exit(
                f"{', '.join(wrong)} differ from benchmarks/results: run python -m benchmarks.table"
            )
        return
    for page, text in new.items():
        (ROOT / page).write_text(text)
    for path, (_, draw) in pictures(records.RESULTS).items():
        (ROOT / path).write_text(draw())


def fill(texts: dict[str, str], contents: dict[str, str]) -> dict[str, str]:
    """Pages by their paths, with each marked block replaced; no block is unknown or left over."""
    pattern = re.compile(r"<!-- begin (\w+) -->.*?<!-- end \1 -->", re.DOTALL)
    marked = {match[1] for text in texts.values() for match in pattern.finditer(text)}
    if marked != contents.keys():
        raise ValueError(
            f"{', '.join(texts)} mark {sorted(marked)}, the results give {sorted(contents)}"
        )

    def fill_page(page: str) -> str:
        folder = str(Path(page).parent)

        def block(match: re.Match) -> str:
            content = contents[match[1]]
            if folder != ".":  # links are those from the root
                content = content.replace(f"]({folder}/", "](")
            return f"<!-- begin {match[1]} -->\n{content}\n<!-- end {match[1]} -->"

        return pattern.sub(block, texts[page])

    return {page: fill_page(page) for page in texts}


def blocks(results: Path) -> dict[str, str]:
    """Markdown text by block name, from the JSON lines under `results`."""
    measured, counted = grid.read(results / "finetune.jsonl")
    gradients = grid.newest(
        records.read(results / "gradients.jsonl"), "data", "seed", "when", "energy"
    )
    steps = step_rows(results)
    decompositions = grid.newest(
        records.read(results / "decomposition.jsonl"), "model", "data", "energy"
    )
    milliseconds = {key: 1000 * row["seconds"] for key, row in steps.items()}
    cpu = grid.newest(records.read(results / "cpu.jsonl"), "network", "kind", "batch_size")
    learnt = continual_tables.read(results / "continual.jsonl")
    kept = keep_tables.read(records.read(results / "keep.jsonl"))
    all_layers = records.read(results / "all_layers.jsonl")
    return {
        "sentence": accuracy_tables.sentence(measured),
        "main": accuracy_tables.main_table(measured, counted),
        "plots": plot_links(results),
        "targets": targets.table(measured, decompositions, cpu),
        "finetune": accuracy_tables.cell_tables(measured, counted, milliseconds),
        "gradients": gradient_table(gradients),
        "energy": energy_table(gradients),
        "step_time": time_tables.step_table(steps),
        "decomposition": time_tables.decomposition_table(decompositions),
        "cpu": time_tables.cpu_tables(cpu),
        "keep_targets": keep_targets.table(kept, measured, all_layers),
        "keep_rounding": keep_tables.rounding(records.read(results / "rounding.jsonl")),
        "keep_trained": keep_tables.trained(all_layers),
        "keep_summary": keep_tables.summary(kept),
        "keep": keep_tables.tables(kept),
        "keep_least": keep_tables.least(kept),
        "keep_plots": links({path: keep_tables.ALT[path] for path in keep_tables.drawings(kept)}),
        "continual_summary": continual_tables.summary(learnt),
        "continual_targets": continual_tables.targets(learnt),
        "continual": continual_tables.tables(learnt),
        "continual_energies": continual_tables.energies(
            continual_tables.read(results / "continual.jsonl", "validation")
        ),
        "continual_plots": links(
            {
                path: continual_plots.ALT[path]
                for path in continual_plots.drawings(learnt.get("cifar100", {}))
            }
        ),
    }


def step_rows(results: Path) -> dict[tuple[Cell, Entry], dict]:
    """The newest time of each method in each cell."""
    return {
        ((row["model"], row["data"]), grid.entry(row["method"], row["config"])): row
        for row in records.read(results / "step_time.jsonl")
    }


def drawings(results: Path) -> dict[str, plots.Panels]:
    """What each plot shows, by its path; a plot of nothing is left out."""
    measured, counted = grid.read(results / "finetune.jsonl")
    seconds = {key: row["seconds"] for key, row in step_rows(results).items()}
    found = {
        BYTES_PLOT: plots.against_bytes(measured, counted),
        SECONDS_PLOT: plots.against_seconds(measured, seconds),
    }
    return {path: panels for path, panels in found.items() if panels}


def pictures(results: Path) -> dict[str, continual_plots.Drawing]:
    """All plots by path: a digest of what each shows, and its drawing."""
    found = {
        path: (plots.digest(panels), functools.partial(plots.draw, panels, AXES[path]))
        for path, panels in drawings(results).items()
    }
    learnt = continual_tables.read(results / "continual.jsonl")
    found |= continual_plots.drawings(learnt.get("cifar100", {}))
    return found | keep_tables.drawings(keep_tables.read(records.read(results / "keep.jsonl")))


def plot_links(results: Path) -> str:
    alt = {BYTES_PLOT: "Accuracy against bytes kept", SECONDS_PLOT: "Accuracy against time"}
    return links({path: alt[path] for path in drawings(results)})


def links(alt: dict[str, str]) -> str:
    """The plots at these paths."""
    return "\n\n".join(f"![{alt[path]}]({path})" for path in alt) or markdown.NOTHING


def gradient_table(rows: list[dict]) -> str:
    """Cosine of LANCE's and plain backprop's weight gradients by layer, at the program's energy."""
    cosines = defaultdict(lambda: defaultdict(list))
    shown = rows[-1]["config"]["energy"] if rows else grid.default_energy()
    for row in rows:
        if row["energy"] == row["config"]["energy"] == shown:
            for path, cosine in row["cosines"].items():
                cosines[path][row["when"]].append(cosine)
    return markdown.table(
        ["layer", *(f"{when}, energy {shown}" for when in ("after calibration", "at the end"))],
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
    return markdown.table(
        ["energy", "times fewer bytes, all", "worst layer's cosine"],
        [
            [
                f"{energy:g}" + (" (default)" if energy == grid.default_energy() else ""),
                f"{np.mean(gains[energy]):.1f}",
                mean_and_least(cosines[energy]),
            ]
            for energy in sorted(gains)
        ],
    )


def mean_and_least(values: list[float]) -> str:
    """Of cosines; nothing where the benchmark was stopped before it measured any."""
    if not values:
        return ""
    return f"{np.mean(values):.3f} (least {min(values):.3f}, n = {len(values)})"


if __name__ == "__main__":
    main()
