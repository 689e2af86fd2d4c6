"""The benchmark of what a step keeps, at a small size, on pictures of noise."""

import pytest
from samples import pictures

from benchmarks import keep, keep_tables, keep_targets, networks
from benchmarks.grid import BACKPROP, Entry
from lance_jax.models.deit import DeiT

WAYS = ["backprop", "checkpoint", "blocks_int8", "blocks_int4", "blocks_layers_int4", "blocks_90"]
IN_MICRO_BATCHES = ("backprop", "blocks_int4")
WHOLE = 12


@pytest.fixture(scope="module")
def records():
    """By way and micro-batch."""
    with pytest.MonkeyPatch.context() as patch:
        network = DeiT(resolution=16, patch=4, width=16, depth=1, heads=2)
        patch.setitem(networks.DRAWN, "tiny", network)
        patch.setattr(keep, "MICRO_BATCHES", (4,))
        patch.setattr(keep, "IN_MICRO_BATCHES", IN_MICRO_BATCHES)
        setting = keep.Setting("tiny", WHOLE, warm_up=2, steps=12)
        drawn, _ = pictures(n=40, side=16)
        found = list(keep.measure("tiny", setting, WAYS, 2, drawn))
    return {(record["way"], record["micro_batch"]): record for record in found}


def test_every_way_is_measured(records):
    assert {way for way, _ in records} == set(WAYS)
    in_parts = {way for way, size in records if size == 4}
    assert in_parts == set(IN_MICRO_BATCHES)
    for record in records.values():
        assert record["setting"] == "tiny" and record["seconds"] > 0


def test_bytes_fall_from_way_to_way(records):
    order = ["backprop", "checkpoint", "blocks_int8", "blocks_int4", "blocks_90"]
    kept = [records[way, WHOLE]["kept"] for way in order]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    for way, size in records:
        record = records[way, size]
        assert (record["transient"] > 0) == (way == "checkpoint" or way.startswith("blocks"))
        assert (record["macs_recomputed"] > 0) == (record["transient"] > 0)
        assert (record["sums"] > 0) == (size < WHOLE)
        if size < WHOLE:
            assert record["kept"] < 0.5 * records[way, WHOLE]["kept"]


def test_layers_inside_make_the_recomputed_block_smaller(records):
    alone, both = (records[way, WHOLE] for way in ("blocks_int4", "blocks_layers_int4"))
    assert both["kept"] == alone["kept"]
    assert both["transient"] < alone["transient"]
    assert both["cosine"] != alone["cosine"]


def test_gradients_are_nearer_with_more_bits(records):
    int8, int4, cut = (records[way, WHOLE] for way in ("blocks_int8", "blocks_int4", "blocks_90"))
    assert int8["cosine"] > 0.95 > int4["cosine"] > 0.5
    assert int4["cosine"] > cut["cosine"]
    assert int8["worst_cosine"] > max(int4["worst_cosine"], cut["worst_cosine"])
    for (way, _), record in records.items():
        assert ("cosine" in record) == (not keep.WAYS[way].exact)
        if "cosine" in record:
            assert record["worst_layer"].endswith("/kernel")


def test_losses_are_those_of_whole_batches(records):
    exact = {records[way, size]["loss"] for way, size in records if keep.WAYS[way].exact}
    assert len(exact) == 1
    near = records["blocks_int8", WHOLE]["loss"]
    assert near == pytest.approx(exact.pop(), rel=0.02)


def test_tables_and_plots_say_what_was_measured(records):
    found = keep_tables.read([{**record, "setting": "vit"} for record in records.values()])
    assert list(found) == ["vit"] and len(found["vit"]) == len(records)
    plain, ours = records["backprop", WHOLE], records["blocks_int4", WHOLE]
    by_hand = plain["kept"] / ours["kept"]
    peak = plain["kept"] / (ours["kept"] + ours["transient"])
    (row,) = (line for line in keep_tables.summary(found).splitlines() if "blocks, int4 |" in line)
    assert f"| {by_hand:.1f} / {peak:.1f}, {ours['cosine']:.3f} |" in row
    rows = keep_tables.tables(found).splitlines()
    (row,) = (line for line in rows if f"LANCE, blocks, int4 | {WHOLE}" in line)
    assert f"| 0.0 | {by_hand:.1f} | {ours['transient'] / 1e3:,.1f} | {peak:.1f} |" in row
    assert f"| {ours['loss']:.3f} |" in row
    drawings = keep_tables.drawings(found)
    assert set(drawings) == set(keep_tables.ALT)
    for digest, draw in drawings.values():
        assert digest in draw()


def test_the_least_is_one_picture_at_a_time(records):
    rows = [{**record, "setting": "vit"} for record in records.values()]
    one = [{**row, "micro_batch": 1} for row in rows if row["micro_batch"] == 4]
    text = keep_tables.least(keep_tables.read(rows + one))
    kept = next(row for row in one if row["way"] == "blocks_int4")
    told = (kept["kept"] + kept["factors"] + kept["transient"]) / 1e3
    assert f"| LANCE, blocks, int4 | {told:,.0f} |" in text.splitlines()


def test_every_way_and_setting_has_a_name():
    assert keep_tables.WAY_NAMES.keys() == keep.WAYS.keys()
    assert keep_tables.NAMES.keys() == keep.SETTINGS.keys()
    assert set(keep.IN_MICRO_BATCHES) <= keep.WAYS.keys()
    assert keep_tables.tables({}) == keep_tables.least({}) == "(not measured yet)"


# --- targets ---


def verdicts(text):
    """What was measured and the verdict, by the target's beginning."""
    lines = [line.strip("|").split("|") for line in text.splitlines()[2:]]
    return {target.strip(): (found.strip(), met.strip()) for target, found, met in lines}


def one(setting, way, kept, size=64, **told):
    told = {"factors": 0, "sums": 0, "transient": 0, "cosine": 1.0, **told}
    return {"setting": setting, "way": way, "micro_batch": size, "kept": kept} | {
        "batch_size": size,
        "ratio": {"median": 1.0},
        **told,
    }


def test_targets_of_cosines_are_judged_by_the_way_that_keeps_least():
    rows = [
        one("mcunet_all", "backprop", 2100),
        one("mcunet_all", "lance", 10, cosine=0.999),  # no blocks
        one("mcunet_all", "blocks_int8", 100, cosine=0.999),
        one("mcunet_all", "blocks_99_int8", 50, factors=40, cosine=0.991),
        one("mcunet_all", "blocks_int4", 50, cosine=0.989),
    ]
    found = verdicts(keep_targets.table(keep_tables.read(rows), {}, []))
    near = found["MCUNet, all layers: 1/20 of plain backprop's bytes at a cosine of 0.99"]
    assert near == ("1/23.3 with factors, at 0.9910: blocks, energy .99, int8", "met")
    far = found["MCUNet, all layers: 1/50 of plain backprop's bytes at a cosine of 0.95"]
    assert far == ("1/42.0 with factors, at 0.9890: blocks, int4", "missed")
    assert found["ViT, 65 tokens: 1/50 of plain backprop's bytes at a cosine of 0.99"] == (
        "",
        "not measured",
    )


def test_targets_of_one_picture_count_the_recomputed_block():
    target = "1/15 of plain backprop's bytes between the phases, 1/5 at the peak"
    for transient, words in ((80, "met"), (150, "missed")):
        rows = [
            one("vit_one", "backprop", 1000, size=1),
            one("vit_one", "checkpoint", 1, size=1),
            one("vit_one", "blocks_int4", 20, size=1, transient=transient, factors=40),
        ]
        found = verdicts(keep_targets.table(keep_tables.read(rows), {}, []))
        told, met = found[f"ViT, 2,026 tokens, one picture: {target}"]
        peak = 1000 / (60 + transient)
        assert (told, met) == (f"1/16.7, 1/{peak:.1f}: blocks, int4", words)


def test_targets_beside_checkpoint():
    for median, kept, met in ((1.05, 10, "met"), (1.15, 10, "missed"), (1.05, 20, "missed")):
        rows = [
            one("mcunet_all", "backprop", 1000),
            one("mcunet_all", "checkpoint", 60),
            one("mcunet_all", "blocks_int4", kept, ratio={"median": median}),
        ]
        found = verdicts(keep_targets.table(keep_tables.read(rows), {}, []))
        (told,) = (value for key, value in found.items() if key.startswith("MCUNet, all layers, b"))
        assert told == (f"{median:.2f} of its time, 1/{60 / kept:.1f} of its bytes", met)


def trained(method, accuracy, total, rate=0.1, split="test"):
    saved = {"total": total, "transient": 500 if method == "blocks" else 0}
    result = {"test_accuracy": accuracy, "saved_bytes": saved, "loss": 0.5}
    result["saved_bytes_backprop"] = {"total": 6000}
    key = {"data": "cifar10", "method": method, "split": split, "learning_rate": rate}
    return {**key, "result": result}


def test_training_all_layers():
    """Judged by the test runs, each at its method's rate."""
    rows = [trained("backprop", 0.80, 6000), trained("blocks", 0.795, 200, 0.2)]
    rows += [trained("blocks", 0.9, 200, rate, "validation") for rate in (0.1, 0.2)]
    found = verdicts(keep_targets.table({}, {}, rows))
    (told,) = (value for key, value in found.items() if key.startswith("MCUNet trained in all"))
    assert told == ("1/30.0, -0.5: blocks in int4 (one seed)", "met")
    lines = keep_tables.trained(rows).splitlines()
    assert len(lines) == 4
    assert "| LANCE, blocks in int4 | 0.2 | 79.5 | 0.500 | 0.2 | 30.0 | 0.5 |" in lines
    assert keep_tables.trained([]) == "(not measured yet)"


def test_targets_of_accuracy():
    cell = "mcunet", "cifar10"

    def runs(accuracies, total):
        return {
            seed: {"result": {"test_accuracy": one, "saved_bytes": {"total": total}}}
            for seed, one in enumerate(accuracies)
        }

    plain = runs([0.70, 0.72, 0.71], 3700)
    for accuracies, total, met in (
        ([0.70, 0.71, 0.71], 100, "met"),
        ([0.70, 0.70, 0.70], 100, "missed"),
        ([0.70, 0.72, 0.71], 110, "missed"),
    ):
        found = {cell: {Entry("blocks"): runs(accuracies, total), BACKPROP: plain}}
        told = verdicts(keep_targets.table({}, found, [trained("backprop", 0.8, 1)]))
        (value,) = (v for k, v in told.items() if k.startswith("MCUNet, CIFAR-10,") and "1/36" in k)
        assert value[0].startswith(f"1/{3700 / total:.1f}, ") and value[1] == met
