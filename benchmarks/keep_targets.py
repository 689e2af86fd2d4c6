"""What keeping blocks is to reach, and whether it does, computed from the results."""

from collections.abc import Callable

from benchmarks import grid, keep_tables, markdown
from benchmarks.grid import BACKPROP, Entry, Measured
from benchmarks.keep_tables import Rows
from benchmarks.targets import Row

# (way of fine-tuning, times fewer bytes, points of test accuracy at most behind plain backprop)
TUNED = (("blocks", 36, -0.5), ("blocks_90", 100, -1.0))
# (setting, cosine, times fewer bytes)
COSINES = (("mcunet_all", 0.99, 20), ("mcunet_all", 0.95, 50), ("vit", 0.99, 50))
SLOWER = 1.1  # times the time of `jax.checkpoint`
OF_CHECKPOINT = 6.0  # times fewer bytes than that
ALL_LAYERS = (20, -1.0)  # times fewer bytes; points
ONE = (15.0, 5.0)  # times fewer bytes of one picture: between the phases, and at the peak


def table(found: dict[str, Rows], measured: Measured, all_layers: list[dict]) -> str:
    """A row for each target; what was not measured says so."""
    if not found and not all_layers:
        return markdown.NOTHING
    rows: list[Row] = [
        *(_tuned(measured, cell, *one) for one in TUNED for cell in grid.JUDGED[:2]),
        *(_cosine(found, *one) for one in COSINES),
        _trained(all_layers),
        *(_beside_checkpoint(found, setting) for setting in ("mcunet_last4", "mcunet_all")),
        *(_one(found, setting) for setting in ("resnet18_one", "vit_one")),
    ]
    return markdown.table(["target", "measured", ""], [list(row) for row in rows])


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _tuned(measured: Measured, cell: grid.Cell, method: str, times: float, points: float) -> Row:
    target = (
        f"{grid.cell_name(cell)}, last 4 layers: 1/{times:g} of plain backprop's bytes, at "
        f"{points} points or better"
    )
    runs = measured.get(cell, {})
    if Entry(method) not in runs:
        return target, "", "not measured"
    ours, plain = runs[Entry(method)], runs[BACKPROP]
    mean, low, high = grid.paired(ours, plain)
    fewer = grid.gain(ours, plain)
    text = f"1/{fewer:.1f}, {markdown.difference(mean, low, high)}"
    return target, text, _verdict(fewer >= times and mean >= points)


def _cosine(found: dict[str, Rows], setting: str, cosine: float, times: float) -> Row:
    """By the way that keeps least of those that reach the cosine."""
    name = keep_tables.short_name(setting)
    target = f"{name}: 1/{times:g} of plain backprop's bytes at a cosine of {cosine}"
    if setting not in found:
        return target, "", "not measured"
    rows, plain = keep_tables.whole(found[setting]), keep_tables.plain_row(found[setting])
    near = [row for row in rows.values() if _is_of_blocks(row) and row["cosine"] >= cosine]
    if not near:
        return target, "no way is as near", "missed"
    best = min(near, key=keep_tables.between)
    fewer = plain["kept"] / keep_tables.between(best)
    text = f"1/{fewer:.1f} with factors, at {best['cosine']:.4f}: {_way(best)}"
    return target, text, _verdict(fewer >= times)


def _trained(rows: list[dict]) -> Row:
    times, points = ALL_LAYERS
    target = (
        f"MCUNet trained in all layers: 1/{times} of plain backprop's bytes, at {points} points "
        "or better after the same epochs"
    )
    runs = {row["method"]: row["result"] for row in keep_tables.tested(rows)}
    plain = runs.pop("backprop", None)
    if plain is None:
        return target, "", "not measured"

    texts, met = [], False
    for method, ours in runs.items():
        fewer = plain["saved_bytes"]["total"] / ours["saved_bytes"]["total"]
        difference = 100 * (ours["test_accuracy"] - plain["test_accuracy"])
        name = grid.METHODS[method].removeprefix("LANCE, ")
        texts.append(f"1/{fewer:.1f}, {difference:+.1f}: {name}")
        met = met or (fewer >= times and difference >= points)
    return target, f"{'; '.join(texts)} (one seed)", _verdict(met)


def _beside_checkpoint(found: dict[str, Rows], setting: str) -> Row:
    target = (
        f"{keep_tables.short_name(setting)}, blocks in int4: {SLOWER:g} of `jax.checkpoint`'s time "
        f"at most, and 1/{OF_CHECKPOINT:g} of its bytes"
    )
    rows = {way: row for (way, _), row in keep_tables.whole(found.get(setting, {})).items()}
    if not {"checkpoint", "blocks_int4"} <= rows.keys():
        return target, "", "not measured"
    ours, theirs = rows["blocks_int4"], rows["checkpoint"]
    slower = ours["ratio"]["median"] / theirs["ratio"]["median"]
    fewer = theirs["kept"] / ours["kept"]
    text = f"{slower:.2f} of its time, 1/{fewer:.1f} of its bytes"
    return target, text, _verdict(slower <= SLOWER and fewer >= OF_CHECKPOINT)


def _one(found: dict[str, Rows], setting: str) -> Row:
    """By the way that needs least at its peak."""
    target = (
        f"{keep_tables.short_name(setting)}, one picture: 1/{ONE[0]:g} of plain backprop's bytes "
        f"between the phases, 1/{ONE[1]:g} at the peak"
    )
    if setting not in found:
        return target, "", "not measured"
    plain = keep_tables.plain_row(found[setting])["kept"]

    def fewer(count: Callable) -> Callable:
        return lambda row: plain / count(row)

    between, peak = fewer(keep_tables.between), fewer(keep_tables.at_peak)
    best = max(filter(_is_of_blocks, found[setting].values()), key=peak)
    text = f"1/{between(best):.1f}, 1/{peak(best):.1f}: {_way(best)}"
    return target, text, _verdict(between(best) >= ONE[0] and peak(best) >= ONE[1])


def _is_of_blocks(row: dict) -> bool:
    return row["way"].startswith("blocks")


def _way(row: dict) -> str:
    return keep_tables.WAY_NAMES[row["way"]].removeprefix("LANCE, ")
