"""What README and docs/results.md say of times."""

from collections import defaultdict
from collections.abc import Iterable

from benchmarks import grid, markdown
from benchmarks.grid import Cell, Entry

CPU_NETWORKS = {
    "mcunet-5fps": "MCUNet",
    "mbv2-w0.35": "MobileNetV2-0.35",
    "mobilenetv2-1.0": "MobileNetV2-1.0",
    "resnet18": "ResNet-18",
}
CPU_KINDS = {"forward": "inference", "last4": "step, last 4 layers", "all": "step, all layers"}
CPU_OURS = {"lance_jax": ("lance_jax", "lance_jax backprop"), "LANCE": ("lance_jax LANCE",)}


def step_table(steps: dict[tuple[Cell, Entry], dict]) -> str:
    """Time of every method's step, and its ratio to plain backprop's in one call."""
    cells = sorted({cell for cell, _ in steps}, key=grid.cell_order)
    if not cells:
        return markdown.NOTHING
    header = ["gradient step"]
    for cell in cells:
        header += [f"{grid.cell_name(cell)}: ms", "ratio (95 % interval)"]

    def columns(row: dict | None) -> list[str]:
        return (
            ["", ""]
            if row is None
            else [f"{1000 * row['seconds']:.1f}", markdown.ratio(row["ratio"])]
        )

    rows = []
    for entry in grid.in_order(e for _, e in steps):
        shown = [text for cell in cells for text in columns(steps.get((cell, entry)))]
        rows.append([entry.name, *shown])
    return f"{markdown.table(header, rows)}\n\n{measured_on(steps.values())}"


def measured_on(rows: Iterable[dict]) -> str:
    return f"Measured on: {'; '.join(dict.fromkeys(row['device'] for row in rows))}."


def decomposition_table(rows: list[dict]) -> str:
    """The two ways to find a core, alone: each step's own decomposition, and fixed factors."""
    if not rows:
        return markdown.NOTHING
    header = ["layer inputs of", "energy", "HOSVD, ms", "LANCE's projection, ms", "times"]
    header += ["and in int4, ms", "times"]

    def row(of: dict) -> list[str]:
        seconds, ratios = of["seconds"], of["ratios"]
        found = [f"{grid.cell_name((of['model'], of['data']))}", f"{of['energy']:g}"]
        found.append(f"{1000 * seconds['decomposition']:.1f}")
        for name in ("projection", "projection_int4"):
            found += [f"{1000 * seconds[name]:.2f}", markdown.ratio(ratios[name])]
        return found

    return markdown.table(header, [row(of) for of in rows])


def cpu_tables(rows: list[dict]) -> str:
    """One table a network, one row a kind of call and batch size."""
    by_network = defaultdict(list)
    for row in rows:
        by_network[row["network"]].append(row)
    header = ["", "batch", "plain JAX, ms", "PyTorch, ms"]
    for ours in CPU_OURS:
        header += [f"{ours}, ms", "plain JAX / " + ours, "PyTorch / " + ours]
    if not rows:
        return markdown.NOTHING
    tables = [
        f"**{CPU_NETWORKS[name]}**\n\n"
        + markdown.table(header, [cpu_row(row) for row in sorted(by_network[name], key=_cpu_order)])
        + _least_time(by_network[name])
        for name in CPU_NETWORKS
        if name in by_network
    ]
    return "\n\n".join([*tables, measured_on(rows)])


def _least_time(rows: list[dict]) -> str:
    """What inference would take if all of it ran like one large matrix product."""
    found = [row for row in rows if row["kind"] == "forward" and "macs_per_second" in row]
    if not found:
        return ""
    rate = max(row["macs_per_second"] for row in found)
    times = [
        f"{1000 * row['forward_macs'] / rate:.1f} for {row['batch_size']}"
        for row in sorted(found, key=_cpu_order)
    ]
    return (
        f"\n\nThe multiplications of inference, at the {rate / 1e9:.0f} billion a second of a "
        f"large matrix product in PyTorch, ms: {', '.join(times)}."
    )


def _cpu_order(row: dict) -> tuple[int, int]:
    return list(CPU_KINDS).index(row["kind"]), row["batch_size"]


def cpu_row(row: dict) -> list[str]:
    seconds = row["seconds"]
    found = [CPU_KINDS[row["kind"]], str(row["batch_size"])]
    found += [f"{1000 * seconds[other]:.1f}" for other in ("jax", "torch")]
    for names in CPU_OURS.values():
        name = next((name for name in names if name in seconds), None)
        if name is None:  # LANCE has no inference of its own
            found += ["", "", ""]
            continue
        size = row["micro_batch"].get(name)
        parts = size is not None and size < row["batch_size"]
        found.append(f"{1000 * seconds[name]:.1f}" + (f" (in parts of {size})" if parts else ""))
        found += [markdown.ratio(row["ratios"][f"{other} / {name}"]) for other in ("jax", "torch")]
    return found
