"""The benchmark of what a step keeps, at a small size, on pictures of noise."""

import pytest
from samples import pictures

from benchmarks import keep, keep_tables, networks
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
    assert int8["worst_cosine"] > int4["worst_cosine"] > cut["worst_cosine"]
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
    (row,) = (line for line in keep_tables.summary(found).splitlines() if "blocks, int4 |" in line)
    assert f"| {by_hand:.1f} | {ours['cosine']:.4f} |" in row
    rows = keep_tables.tables(found).splitlines()
    (row,) = (line for line in rows if f"LANCE, blocks, int4 | {WHOLE}" in line)
    peak = plain["kept"] / (ours["kept"] + ours["transient"])
    assert f"| {by_hand:.1f} | 0.0 | {ours['transient'] / 1e3:,.1f} | {peak:.1f} |" in row
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
