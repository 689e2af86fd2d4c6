"""Tables and plots of what a step may keep, from results/keep.jsonl."""

import functools
from typing import Any

from matplotlib.figure import Figure

from benchmarks import grid, markdown, plots
from benchmarks.continual_plots import Drawing
from benchmarks.keep import IN_MICRO_BATCHES, SETTINGS, WAYS
from benchmarks.time_tables import measured_on

Rows = dict[tuple[str, int], dict]  # (way, micro-batch) -> the newest record

NAMES = {
    "mcunet_last4": "MCUNet, last 4 layers, batch of 64",
    "mcunet_all": "MCUNet, all layers, batch of 64",
    "resnet18": "ResNet-18, 224 pixels, batch of 16",
    "vit": "ViT, 65 tokens, batch of 64",
    "resnet18_one": "ResNet-18, 448 pixels, one picture",
    "vit_one": "ViT, 2,026 tokens, one picture",
}
WAY_NAMES = {
    "backprop": "plain backprop",
    "checkpoint": "`jax.checkpoint` of blocks",
    "int8": "int8 inputs",
    "int4": "int4 inputs",
    "lance": "LANCE, layers",
    "paper": "LANCE, layers, `paper` modes",
    "blocks_int8": "LANCE, blocks, int8",
    "blocks_int4": "LANCE, blocks, int4",
    "blocks_layers_int4": "LANCE, blocks, int4, layers too",
    "blocks_int4_stochastic": "LANCE, blocks, int4, stochastic",
    "blocks_999_int8": "LANCE, blocks, energy .999, int8",
    "blocks_99_int8": "LANCE, blocks, energy .99, int8",
    "blocks_99": "LANCE, blocks, energy .99",
    "blocks_97": "LANCE, blocks, energy .97",
    "blocks_95": "LANCE, blocks, energy .95",
    "blocks_90": "LANCE, blocks, energy .90",
}
COSINE_PLOT, TIME_PLOT = "docs/keep-cosine.svg", "docs/keep-time.svg"
ALT = {
    COSINE_PLOT: "How far gradients are off, against bytes kept",
    TIME_PLOT: "Time of a gradient against bytes held",
}
SHORT = ("checkpoint", "int4", "lance", "blocks_int8", "blocks_int4", "blocks_layers_int4")
SHORT += ("blocks_99", "blocks_90")


def read(rows: list[dict]) -> dict[str, Rows]:
    """setting -> its rows, in the order of SETTINGS and WAYS."""
    newest = {
        (row["setting"], row["way"], row["micro_batch"]): row
        for row in grid.newest(rows, "setting", "way", "micro_batch")
    }
    found = {
        setting: {
            (way, size): newest[setting, way, size]
            for way in WAYS
            for size in sorted({k[2] for k in newest if k[:2] == (setting, way)}, reverse=True)
        }
        for setting in SETTINGS
    }
    return {setting: rows for setting, rows in found.items() if rows}


def short_name(setting: str) -> str:
    """Without its batch."""
    return NAMES[setting].rsplit(",", 1)[0]


def whole(rows: Rows) -> Rows:
    """Those of whole batches."""
    return {key: row for key, row in rows.items() if row["micro_batch"] == row["batch_size"]}


def between(row: dict) -> int:
    """Bytes that live from the forward to the backward pass, with all that goes with them."""
    return row["kept"] + row["factors"] + row["sums"]


def at_peak(row: dict) -> int:
    """And the most that a recomputed block holds on top."""
    return between(row) + row["transient"]


# --- tables ---------------------------------------------------------------------------------------

HEADER = ["kept", "micro-batch", "kept, kB", "factors, sums, kB", "times fewer"]
HEADER += ["recomputed block, kB", "times fewer at the peak", "time to `jax.jit`'s"]
HEADER += ["cosine", "worst layer's", "loss"]


def tables(found: dict[str, Rows]) -> str:
    """A table for each setting."""
    parts = [f"### {NAMES[setting]}\n\n{_table(rows)}" for setting, rows in found.items()]
    return "\n\n".join([*parts, measured(found)]) if parts else markdown.NOTHING


def summary(found: dict[str, Rows]) -> str:
    """Of whole batches: times fewer between the phases / at the peak, and the cosine."""
    if not found:
        return markdown.NOTHING
    rows = []
    for way in SHORT:
        ones = [{w: row for (w, _), row in whole(of).items()}.get(way) for of in found.values()]
        of_settings = zip(ones, found.values(), strict=True)
        cells = ["-" if one is None else _short(one, plain_row(of)) for one, of in of_settings]
        rows.append([WAY_NAMES[way], *cells])
    header = ["kept for the backward pass", *map(short_name, found)]
    return f"{markdown.table(header, rows)}\n\n{measured(found)}"


def least(found: dict[str, Rows]) -> str:
    """kB that a step of one picture holds beside parameters and gradients."""
    ways = [way for way in IN_MICRO_BATCHES if any((way, 1) in rows for rows in found.values())]
    if not ways:
        return markdown.NOTHING
    header = ["kept", *map(short_name, found)]
    return markdown.table(
        header,
        [
            [WAY_NAMES[way], *(_least(rows.get((way, 1))) for rows in found.values())]
            for way in ways
        ],
    )


def _least(row: dict | None) -> str:
    return "-" if row is None else f"{(row['kept'] + row['factors'] + row['transient']) / 1e3:,.0f}"


def trained(rows: list[dict]) -> str:
    """Of training all layers, for each method: its learning rate, accuracy, loss and bytes."""
    header = ["kept", "learning rate", "test accuracy, %", "training loss", "kept, kB"]
    header += ["times fewer", "recomputed block, kB"]
    found = []
    for row in tested(rows):
        result = row["result"]
        kept = result["saved_bytes"]["total"]
        transient = result["saved_bytes"]["transient"]
        found.append(
            [
                grid.METHODS[row["method"]],
                f"{row['learning_rate']:g}",
                f"{100 * result['test_accuracy']:.1f}",
                f"{result['loss']:.3f}",
                f"{kept / 1e3:,.1f}",
                f"{result['saved_bytes_backprop']['total'] / kept:.1f}",
                f"{transient / 1e3:,.1f}" if transient else "",
            ]
        )
    return markdown.table(header, found) if found else markdown.NOTHING


ROUNDING = {
    "channel": "two ends a channel of the batch, float16",
    "sample": "two ends a channel of a sample, float16",
    "groups_64": "groups of 64 values of a channel, ends in float16",
    "groups_32": "groups of 32, ends in float16",
    "groups_32_float8": "groups of 32, ends in float8",
    "int4": "groups of 32, ends in 8 bits of the range of 32 groups: `int4`",
}


def rounding(rows: list[dict]) -> str:
    """Of each way to round to 4 bits: bits a value, and cosines of all and of the worst layer."""
    found = {
        (row["scheme"], row["setting"], row["keep"]): row
        for row in grid.newest(rows, "scheme", "setting", "keep")
    }
    places = list(dict.fromkeys(key[1:] for key in found))
    if not places:
        return markdown.NOTHING
    header = ["4 bits a value, and"]
    header += [f"{short_name(setting)}, {kept}" for setting, kept in places]
    table = [
        [name, *(_rounding(found.get((scheme, *place))) for place in places)]
        for scheme, name in ROUNDING.items()
    ]
    return markdown.table(header, table)


def _rounding(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['bits']:.2f} bits: {row['cosine']:.4f}, {row['worst_cosine']:.3f}"


def tested(rows: list[dict]) -> list[dict]:
    """Of training all layers, each method's newest test run."""
    return grid.newest([row for row in rows if row["split"] == "test"], "method")


def measured(found: dict[str, Rows]) -> str:
    return measured_on(row for rows in found.values() for row in rows.values())


def plain_row(rows: Rows) -> dict:
    return next(row for (way, _), row in whole(rows).items() if way == "backprop")


def _short(row: dict, plain: dict) -> str:
    times = f"{plain['kept'] / between(row):,.1f} / {at_peak(plain) / at_peak(row):.1f}"
    return times if WAYS[row["way"]].exact else f"{times}, {row['cosine']:.3f}"


def _table(rows: Rows) -> str:
    plain = plain_row(rows)
    return markdown.table(HEADER, [_row(row, plain) for row in rows.values()])


def _row(row: dict, plain: dict) -> list[str]:
    is_whole = row["micro_batch"] == row["batch_size"]
    return [
        WAY_NAMES[row["way"]],
        str(row["micro_batch"]),
        f"{row['kept'] / 1e3:,.1f}",
        f"{(row['factors'] + row['sums']) / 1e3:,.1f}",
        f"{plain['kept'] / between(row):,.1f}",
        f"{row['transient'] / 1e3:,.1f}" if row["transient"] else "",
        f"{at_peak(plain) / at_peak(row):.1f}",
        markdown.ratio(row["ratio"]),
        _cosine(row, "cosine"),
        _cosine(row, "worst_cosine"),
        f"{row['loss']:.3f}" if is_whole else "",
    ]


def _cosine(row: dict, name: str) -> str:
    if WAYS[row["way"]].exact:
        return "1"
    return f"{row[name]:.4f}"


# --- plots ----------------------------------------------------------------------------------------

# exact black, inputs in low bits blue, LANCE by layers orange and by blocks red
COLORS = {"backprop": "black", "checkpoint": "grey", "int8": "#1f77b4", "int4": "#1f77b4"}
COLORS |= {"lance": "#ff7f0e", "paper": "#ff7f0e"}
BLOCKS = "#d62728"
MARKERS = {"int8": "s", "int4": "D", "paper": "P", "blocks_int8": "s", "blocks_int4": "D"}
MARKERS |= {"blocks_layers_int4": "d", "blocks_int4_stochastic": "X", "blocks_99_int8": "v"}
MARKERS |= {"blocks_999_int8": "*", "blocks_97": "^", "blocks_95": "<", "blocks_90": ">"}
WIDTH, HEIGHT, COLUMNS = 4.2, 3.2, 2

Points = dict[str, dict[str, list[tuple[float, float]]]]  # setting -> way -> (kB, value)


def drawings(found: dict[str, Rows]) -> dict[str, Drawing]:
    """By path; a plot of nothing is left out."""
    if not found:
        return {}
    off = {setting: _off(rows) for setting, rows in found.items()}
    times = {setting: _times(rows) for setting, rows in found.items()}
    axes = {COSINE_PLOT: ("kept and factors, kB", "1 - cosine of the gradients")}
    axes |= {TIME_PLOT: ("held at the peak, kB", "time, plain backprop in one jax.jit = 1")}
    made = {}
    for path, points in {COSINE_PLOT: off, TIME_PLOT: times}.items():
        digest = plots.digest_of([path, _rounded(points)])
        draw = functools.partial(_figure, points, *axes[path], path == COSINE_PLOT)
        made[path] = digest, functools.partial(plots.svg, draw, digest)
    return made


def _off(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    compressed = [row for row in whole(rows).values() if not WAYS[row["way"]].exact]
    return {row["way"]: [(between(row) / 1e3, 1 - row["cosine"])] for row in compressed}


def _times(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for (way, _), row in rows.items():
        points.setdefault(way, []).append((at_peak(row) / 1e3, row["ratio"]["median"]))
    return points


def _rounded(points: Points) -> Any:
    return [
        [setting, way, [[round(x, 6), round(y, 6)] for x, y in values]]
        for setting, ways in points.items()
        for way, values in ways.items()
    ]


def _figure(points: Points, x: str, y: str, logarithmic: bool) -> Figure:
    rows = -(-len(points) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, rows * HEIGHT + 1.4), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    handles = {}
    for axis, (setting, ways) in zip(axes.flat, points.items(), strict=False):
        for way, values in ways.items():
            (handles[WAY_NAMES[way].replace("`", "")],) = axis.plot(
                *zip(*values, strict=True),
                color=COLORS.get(way, BLOCKS),
                marker=MARKERS.get(way, "o"),
                linewidth=0.8,
            )
        axis.set(xscale="log", title=short_name(setting), xlabel=x, ylabel=y)
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(points) :]:
        axis.remove()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure
