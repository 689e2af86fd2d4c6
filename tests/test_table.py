"""The pages' figures say what the JSON lines say."""

import math

import numpy as np
import pytest

from benchmarks import finetune, grid, plots, records, table, targets
from benchmarks.grid import BACKPROP, BIAS, Entry

# Student's t, 0.975 quantile at four degrees of freedom, from a printed table
T4 = 2.776445
DEFAULT = grid.default_energy()
CELL = "mcunet", "cifar10"
LANCE = [0.750, 0.761, 0.755, 0.760, 0.752]
PLAIN = [0.760, 0.758, 0.757, 0.765, 0.751]


def run(method, seed, accuracy, cell=CELL, split="test", total=600_000, **settings):
    energy = 0.7 if method == "paper" else DEFAULT
    config = {"seed": seed, "classes": "", "trainable_layers": 4, "energy": energy, **settings}
    total = 9_600_000 if method == "backprop" else total
    return {
        "model": cell[0],
        "data": cell[1],
        "method": method,
        "split": split,
        "seed": seed,
        "learning_rate": 0.05,
        "result": {
            "config": config,
            "test_accuracy": accuracy,
            "loss": 0.25,
            "saved_bytes": {"layer_inputs": 50_000, "total": total},
            "saved_bytes_backprop": {"layer_inputs": 9_000_000, "total": 9_600_000},
        },
    }


def add(path, method, accuracies, **options):
    for seed, accuracy in enumerate(accuracies):
        records.append(path, run(method, seed, accuracy, **options))


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "finetune.jsonl"
    add(path, "lance", LANCE)
    add(path, "backprop", PLAIN)
    records.append(path, run("lance", 100, 0.1, split="validation"))
    return tmp_path


def measured(results):
    return grid.read(results / "finetune.jsonl")[0]


def rows(text, name):
    """The columns of the rows with this first column."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    columns = [[column.strip() for column in line] for line in lines]
    return [line[1:] for line in columns if line[0] == name]


# --- the cells ---


def test_paired_difference_is_the_t_interval_of_the_differences(results):
    runs = measured(results)[CELL]
    difference = 100 * (np.array(LANCE) - np.array(PLAIN))
    half = T4 * difference.std(ddof=1) / math.sqrt(5)
    mean = difference.mean()
    found = grid.paired(runs[grid.lance()], runs[BACKPROP])
    np.testing.assert_allclose(found, [mean, mean - half, mean + half], 1e-5)


def test_only_common_seeds_are_paired(results):
    runs = measured(results)[CELL]
    before = grid.paired(runs[grid.lance()], runs[BACKPROP])
    runs[BACKPROP][5] = run("backprop", 5, 0.0)
    assert grid.paired(runs[grid.lance()], runs[BACKPROP]) == before


def test_energies_are_methods_of_their_own(results):
    add(results / "finetune.jsonl", "lance", [0.9] * 5, energy=0.5)
    found = measured(results)[CELL]
    assert set(found) == {BACKPROP, grid.lance(), Entry("lance", 0.5)}
    assert grid.accuracies(found[grid.lance()]) == pytest.approx([100 * a for a in LANCE])
    names = [entry.name for entry in grid.in_order(found)]
    assert names == ["plain backprop", "LANCE", "LANCE, energy 0.5"]


def test_a_method_measured_anew_replaces_all_of_its_former_cells(results):
    path = results / "finetune.jsonl"
    records.append(path, run("lance", 0, 0.9, epochs=3))
    assert grid.lance() not in measured(results)[CELL], "one seed of five"
    for seed in range(1, 5):
        records.append(path, run("lance", seed, 0.9, epochs=3))
    assert grid.lance() not in measured(results)[CELL], "backprop has other epochs"
    add(path, "backprop", PLAIN, epochs=3)
    (row,) = rows(table.blocks(results)["finetune"], "LANCE")
    assert row[:2] == ["0.05", "90.0 ± 0.0, n = 5"]


def test_a_grid_that_is_not_finished_shows_what_is(results):
    path, other = results / "finetune.jsonl", ("mobilenetv2", "cifar10")
    add(path, "backprop", PLAIN[:1], cell=other)
    add(path, "paper", LANCE[:4])
    assert set(measured(results)) == {CELL}
    assert set(measured(results)[CELL]) == {BACKPROP, grid.lance()}
    records.append(path, run("backprop", 1, PLAIN[1], cell=other))
    records.append(path, run("paper", 4, LANCE[4]))
    assert set(measured(results)) == {CELL, other} and Entry("paper") in measured(results)[CELL]


def test_runs_of_another_task_are_not_paired(results):
    add(results / "finetune.jsonl", "int8", LANCE, epochs=3)
    assert set(measured(results)[CELL]) == {BACKPROP, grid.lance()}


def test_a_few_seeds_are_no_finished_grid(results):
    fill_grid(results, -0.2)
    assert targets.finished(measured(results))
    path = results / "finetune.jsonl"
    kept = [record for record in records.read(path) if record["seed"] < 4]
    path.write_text("")
    for record in kept:
        records.append(path, record)
    assert set(measured(results)) == set(grid.JUDGED) and not targets.finished(measured(results))


def test_bytes_count_against_plain_backprop_of_all_trained_layers(results):
    records_of_two = [run("backprop2", seed, a, total=4_800_000) for seed, a in enumerate(PLAIN)]
    for record in records_of_two:
        record["result"]["saved_bytes_backprop"] = record["result"]["saved_bytes"]
        records.append(results / "finetune.jsonl", record)
    blocks = table.blocks(results)
    (row,) = rows(blocks["finetune"], "plain backprop, last 2 layers")
    assert row[5] == "2.0"
    assert rows(blocks["main"], "plain backprop, last 2 layers")[0][-1] == "2.0"


def test_nothing_measured_still_renders(tmp_path):
    blocks = table.blocks(tmp_path)
    assert "not measured" in blocks["main"] and "not measured" in blocks["targets"]
    assert table.drawings(tmp_path) == {}


def test_the_newest_of_equal_rows_counts():
    found = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}]
    assert grid.newest(found, "a") == [{"a": 1, "b": 2}, {"a": 2, "b": 1}]


def test_every_method_has_a_name_and_a_mark():
    methods = {*finetune.METHODS, *finetune.EXACT}
    assert methods | {grid.PLAIN} == set(grid.METHODS) and methods == set(plots.STYLES)


# --- the tables ---


def test_row_shows_mean_spread_bytes_and_ratio(results):
    mean, deviation = 100 * np.mean(LANCE), 100 * np.std(LANCE, ddof=1)
    blocks = table.blocks(results)
    (row,) = rows(blocks["finetune"], "LANCE")
    # the validation cell is not among them
    assert row[1] == f"{mean:.1f} ± {deviation:.1f}, n = 5"
    assert row[4:6] == ["50 / 600", "16.0"]
    assert "MCUNet on CIFAR-10, LANCE keeps 16.0 times fewer" in blocks["sentence"]
    (row,) = rows(blocks["main"], "LANCE")
    assert row == [f"{mean:.1f} ± {deviation:.1f} (-0.3)", "16.0"]


def test_the_methods_that_equal_backprop_have_bytes_alone(results):
    record = run("checkpoint", 0, 0.0, split="bytes")
    record["result"]["saved_bytes"] = {"total": 1_600_000, "transient": 3_200_000}
    records.append(results / "finetune.jsonl", record)
    blocks = table.blocks(results)
    name = grid.METHODS["checkpoint"]
    (row,) = rows(blocks["finetune"], name)
    assert row[1] == "equals plain backprop"
    assert row[4:6] == ["– / 1,600, 4,800 at its peak", "6.0, 2.0 at its peak"]
    assert rows(blocks["main"], name) == [["as plain backprop", "6.0; 2.0 at its peak"]]


def step(method, seconds, energy=DEFAULT):
    return {
        "model": CELL[0],
        "data": CELL[1],
        "method": method,
        "seconds": seconds,
        "ratio": {"median": seconds / 0.1, "low": seconds / 0.11, "high": seconds / 0.09},
        "config": {"energy": energy},
        "device": "cpu",
    }


def test_times_stand_beside_their_method_and_energy(results):
    path = results / "step_time.jsonl"
    for record in (step("jit", 0.1), step("lance", 0.7), step("lance", 0.05), step("paper", 0.04)):
        records.append(path, record)
    records.append(path, step("lance", 0.06, energy=0.5))
    blocks = table.blocks(results)
    assert rows(blocks["step_time"], "LANCE") == [["50.0", "0.50 (0.45 to 0.56)"]], "the newest"
    assert rows(blocks["step_time"], "LANCE, energy 0.5") == [["60.0", "0.60 (0.55 to 0.67)"]]
    assert rows(blocks["finetune"], "LANCE")[0][-1] == "50"
    assert rows(blocks["finetune"], "plain backprop")[0][-1] == ""


def gradient(when, energy, cosine, seed=0):
    cosines = {"blocks_1/conv1": cosine, "blocks_1/conv3": 0.99}
    row = {"data": "cifar10", "seed": seed, "when": when, "energy": energy, "cosines": cosines}
    return {**row, "times_fewer": 14.0 + seed, "config": {"energy": 0.98}}


def test_gradients_are_shown_at_the_programs_energy_and_over_energies(results):
    found = [gradient("calibration", 0.9, 0.9), gradient("end", 0.98, 0.7)]
    found += [gradient("calibration", 0.98, cosine, seed) for seed, cosine in ((0, 0.5), (1, 0.98))]
    found += [gradient("calibration", 0.98, 0.96)]  # the first of seed 0 measured again
    for row in found:
        records.append(results / "gradients.jsonl", row)
    blocks = table.blocks(results)
    assert rows(blocks["gradients"], "`blocks_1/conv1`") == [
        ["0.970 (least 0.960, n = 2)", "0.700 (least 0.700, n = 1)"]
    ]
    assert rows(blocks["energy"], "0.9") == [["14.0", "0.900 (least 0.900, n = 1)"]]
    name = "0.98" + (" (default)" if DEFAULT == 0.98 else "")
    assert rows(blocks["energy"], name) == [["14.5", "0.970 (least 0.960, n = 2)"]]


def test_gradients_of_a_run_that_was_stopped(results):
    records.append(results / "gradients.jsonl", gradient("calibration", 0.98, 0.5))
    (row,) = rows(table.blocks(results)["gradients"], "`blocks_1/conv1`")
    assert row == ["0.500 (least 0.500, n = 1)", ""]


def cpu(kind, ours, **micro_batch):
    ratios = {
        f"{other} / {name}": {"median": 2.0 + i, "low": 1.5, "high": 9.0}
        for i, name in enumerate(ours)
        for other in ("jax", "torch")
    }
    seconds = {name: 0.001 * (i + 1) for i, name in enumerate(["jax", "torch", *ours])}
    common = {"network": "resnet18", "batch_size": 32, "device": "cpu", "kind": kind}
    return {**common, "seconds": seconds, "ratios": ratios, "micro_batch": micro_batch}


def test_cpu_times_are_shown_with_micro_batches_and_ratios(tmp_path):
    step = cpu("all", ["lance_jax backprop", "lance_jax LANCE"])
    step["micro_batch"] = {"lance_jax backprop": 32, "lance_jax LANCE": 4}
    for record in (step, cpu("forward", ["lance_jax"])):
        records.append(tmp_path / "cpu.jsonl", record)
    text = table.blocks(tmp_path)["cpu"]
    two, three = "2.00 (1.50 to 9.00)", "3.00 (1.50 to 9.00)"
    start = ["32", "1.0", "2.0", "3.0", two, two]
    assert rows(text, "inference") == [[*start, "", "", ""]]
    assert rows(text, "step, all layers") == [[*start, "4.0 (in parts of 4)", three, three]]
    assert text.index("inference") < text.index("step, all layers")
    assert "billion" not in text
    records.append(
        tmp_path / "cpu.jsonl",
        {**cpu("forward", ["lance_jax"]), "forward_macs": 2e8, "macs_per_second": 5e10},
    )
    told = "at the 50 billion a second of a large matrix product in PyTorch, ms: 4.0 for 32."
    assert told in table.blocks(tmp_path)["cpu"]


# --- the targets ---


def verdicts(results, decompositions=()):
    return [verdict for _, _, verdict in targets.rows(measured(results), list(decompositions))]


def ratio(median, model="mcunet"):
    ratios = {"projection": {"median": median, "low": median - 1, "high": median + 1}}
    return {"model": model, "energy": DEFAULT, "ratios": ratios}


def fill_grid(results, difference, **total):
    path = results / "finetune.jsonl"
    path.write_text("")
    rng = np.random.default_rng(0)  # differences vary a little from seed to seed
    for cell in grid.JUDGED:
        add(path, "backprop", PLAIN, cell=cell)
        shifts = {"lance": difference, "bias": -2.0, "paper": -1.5, "backprop2": -1.2, "int4": -0.2}
        for method, shift in shifts.items():
            accuracies = [a + (shift + rng.uniform(-0.05, 0.05)) / 100 for a in PLAIN]
            add(path, method, accuracies, cell=cell, total=total.get(method, 600_000))


def test_targets_are_met_and_missed(results):
    both = [ratio(21.0), ratio(40.0, "mobilenetv2")]
    fill_grid(results, -0.2, int4=700_000)
    assert verdicts(results, both) == ["met"] * 8
    fill_grid(results, -1.3, int4=500_000)
    missed = ["missed", "met", "met", "met", "met", "missed", "missed", "missed"]
    assert verdicts(results, [ratio(19.0), both[1]]) == missed
    fill_grid(results, -3.0, lance=800_000, int4=900_000)
    assert verdicts(results, both) == ["missed"] * 7 + ["met"], "of other accuracy, 12 times fewer"


def test_targets_count_only_cells_where_weight_gradients_pay(results):
    fill_grid(results, -0.2, int4=700_000)
    path = results / "finetune.jsonl"
    add(path, "bias", [a - 0.001 * i for i, a in enumerate(PLAIN)], cell=CELL)
    add(path, "lance", [0.1] * 5, cell=CELL)
    assert CELL not in targets.judged(measured(results)) and verdicts(results)[:2] == ["met"] * 2
    found = targets.table(measured(results), [], [])
    assert "Not judged: MCUNet, CIFAR-10 (plain backprop +" in found


def test_targets_of_an_unfinished_grid_say_so(results):
    assert set(verdicts(results)) == {"not measured"}
    add(results / "finetune.jsonl", "bias", [a - 0.02 - 0.001 * i for i, a in enumerate(PLAIN)])
    found = verdicts(results, [ratio(30.0)])
    assert found[:3] == ["met, so far"] * 3 and found[3] == "not measured"
    assert found[4] == found[7] == "met, so far" and BIAS in measured(results)[CELL]


def cpu_times(jax, torch):
    """All the rows of `benchmarks.cpu`, with the same ratios everywhere."""
    times = {"jax": jax, "torch": torch}
    return [
        {
            "network": network,
            "kind": kind,
            "batch_size": size,
            "ratios": {
                f"{other} / {name}": {"median": times[other], "low": 0.0, "high": 9.0}
                for other in times
                for name in (["lance_jax"] if kind == "forward" else STEPS)
            },
        }
        for network in ("mcunet-5fps", "mbv2-w0.35", "mobilenetv2-1.0", "resnet18")
        for kind in ("forward", "last4", "all")
        for size in (1, 32)
    ]


STEPS = ["lance_jax backprop", "lance_jax LANCE"]


def test_targets_of_the_times_on_a_cpu():
    def judge(rows):
        return [verdict for _, _, verdict in targets.cpu_rows(rows)]

    assert judge(cpu_times(6.0, 2.6)) == ["met"] * 9
    slower = ["met", "missed", "met", "missed", *["met"] * 5]
    assert judge(cpu_times(6.0, 1.5)) == slower
    rows = cpu_times(6.0, 2.6)
    large = next(r for r in rows if (r["network"], r["kind"]) == ("resnet18", "all"))
    large["ratios"]["jax / lance_jax LANCE"]["median"] = 0.9
    assert judge(rows) == [*["met"] * 8, "missed"]
    assert "ResNet-18, step, all layers, batch 1, lance_jax LANCE" in targets.cpu_rows(rows)[-1][1]
    small = next(r for r in rows if (r["network"], r["batch_size"]) == ("mbv2-w0.35", 32))
    small["ratios"]["torch / lance_jax"]["median"] = 1.9
    assert judge(rows)[:2] == ["met", "missed"], "the worse of the two networks counts"
    part = [row for row in cpu_times(6.0, 2.6) if row["network"] == "mcunet-5fps"]
    assert judge(part) == ["met, so far"] * 9
    of_one_size = [row for row in cpu_times(6.0, 2.6) if row["batch_size"] == 32]
    assert judge(of_one_size) == [*["met"] * 8, "met, so far"]
    assert judge([]) == ["not measured"] * 9


# --- the plots ---


def test_plots_are_the_same_for_the_same_results(results):
    records.append(results / "step_time.jsonl", step("lance", 0.05))
    drawings = table.drawings(results)
    assert list(drawings) == [table.BYTES_PLOT, table.SECONDS_PLOT]
    (lance,) = drawings[table.SECONDS_PLOT][CELL]
    assert lance.entry == grid.lance() and lance.x == pytest.approx(50)
    assert lance.accuracy == pytest.approx(100 * np.mean(LANCE))
    assert [point.x for point in drawings[table.BYTES_PLOT][CELL]] == [9600, 600]
    svg = plots.draw(drawings[table.BYTES_PLOT], "kB")
    assert svg == plots.draw(drawings[table.BYTES_PLOT], "kB")
    assert plots.digest(drawings[table.BYTES_PLOT]) in svg and "MCUNet, CIFAR-10" in svg
    assert plots.digest(drawings[table.SECONDS_PLOT]) not in svg


# --- the pages ---


def mark(names):
    return "".join(f"<!-- begin {name} -->old<!-- end {name} -->\nbetween\n" for name in names)


def test_fill_replaces_each_block_and_nothing_else(results):
    contents = table.blocks(results)
    first, *rest = contents
    texts = {"README.md": "before\n" + mark(contents), "docs/results.md": mark([first])}
    filled = table.fill(texts, contents)
    for page, text in filled.items():
        assert "old" not in text and text.count("between") == texts[page].count("between")
    assert all(content in filled["README.md"] for content in contents.values())
    assert contents[first] in filled["docs/results.md"]
    assert table.fill(filled, contents) == filled


def test_links_are_those_from_the_page():
    contents = {"plots": "![a](docs/a.svg)"}
    filled = table.fill(dict.fromkeys(table.PAGES, mark(contents)), contents)
    assert "](docs/a.svg)" in filled["README.md"] and "](a.svg)" in filled["docs/results.md"]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "other"]])
def test_fill_refuses_a_missing_or_unknown_marker(names):
    with pytest.raises(ValueError, match=r"the results give \['a', 'b'\]"):
        table.fill({"README.md": mark(names)}, {"a": "", "b": ""})


def test_check_fails_on_figures_edited_by_hand(results, monkeypatch):
    (results / "docs").mkdir()
    readme = results / "README.md"
    readme.write_text(mark(table.blocks(results)))
    for page in table.PAGES[1:]:
        (results / page).write_text("")
    monkeypatch.setattr(table, "ROOT", results)
    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["table"])
    table.main()
    monkeypatch.setattr("sys.argv", ["table", "--check"])
    table.main()
    written = readme.read_text()
    readme.write_text(written.replace("75.6", "75.9"))
    with pytest.raises(SystemExit, match=r"README\.md differ"):
        table.main()
    readme.write_text(written)
    (results / table.BYTES_PLOT).write_text("<svg></svg>")
    with pytest.raises(SystemExit, match=r"accuracy-bytes\.svg differ"):
        table.main()
