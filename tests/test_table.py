"""README's tables say what the JSON lines say."""

import math

import numpy as np
import pytest

from benchmarks import records, table

# Student's t, 0.975 quantile at four degrees of freedom, from a printed table
T4 = 2.776445


def cell(
    method: str, seed: int, accuracy: float, split: str = "test", energy: float = 0.98
) -> dict:
    small = method != "backprop"
    return {
        "data": "cifar10",
        "method": method,
        "split": split,
        "seed": seed,
        "learning_rate": 0.05,
        "result": {
            "config": {"seed": seed, "classes": "", "trainable_layers": 4, "energy": energy},
            "test_accuracy": accuracy,
            "loss": 0.25,
            "saved_bytes": {"layer_inputs": 50_000 if small else 9_000_000, "total": 600_000},
            "saved_bytes_backprop": {"layer_inputs": 9_000_000, "total": 9_600_000},
        },
    }


LANCE = [0.750, 0.761, 0.755, 0.760, 0.752]
BACKPROP = [0.760, 0.758, 0.757, 0.765, 0.751]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "finetune.jsonl"
    for seed, (ours, theirs) in enumerate(zip(LANCE, BACKPROP, strict=True)):
        records.append(path, cell("lance", seed, ours))
        records.append(path, cell("backprop", seed, theirs))
    records.append(path, cell("lance", 100, 0.1, split="validation"))
    return tmp_path


def test_paired_difference_is_the_t_interval_of_the_differences(results):
    runs = table.by_method(records.read(results / "finetune.jsonl"))["cifar10"]
    mean, low, high = table.paired(runs["lance"], runs["backprop"])
    difference = 100 * (np.array(LANCE) - np.array(BACKPROP))
    half = T4 * difference.std(ddof=1) / math.sqrt(5)
    np.testing.assert_allclose(
        [mean, low, high],
        [difference.mean(), difference.mean() - half, difference.mean() + half],
        1e-5,
    )


def test_only_common_seeds_are_paired(results):
    runs = table.by_method(records.read(results / "finetune.jsonl"))["cifar10"]
    before = table.paired(runs["lance"], runs["backprop"])
    runs["backprop"][5] = cell("backprop", 5, 0.0)
    assert table.paired(runs["lance"], runs["backprop"]) == before


def test_row_shows_mean_spread_bytes_and_ratio(results):
    text = table.blocks(results)["finetune"]
    (row,) = [line for line in text.splitlines() if line.startswith("| LANCE |")]
    mean, deviation = 100 * np.mean(LANCE), 100 * np.std(LANCE, ddof=1)
    assert f"{mean:.1f} ± {deviation:.1f}, n = 5" in row  # the validation cell is not among them
    assert "50 / 600" in row and row.endswith("| 16.0 |")
    assert "16.0 times fewer" in table.blocks(results)["sentence"]
    assert "180 times fewer" in table.blocks(results)["sentence"]


def test_a_method_measured_anew_replaces_all_of_its_former_cells(results):
    path = results / "finetune.jsonl"
    records.append(path, cell("lance", 0, 0.9, energy=0.5))
    assert "lance" not in table.by_method(records.read(path))["cifar10"], "one seed of five"
    for seed in range(1, 5):
        records.append(path, cell("lance", seed, 0.9, energy=0.5))
    assert "| LANCE | 0.05 | 90.0 ± 0.0, n = 5 |" in table.blocks(results)["finetune"]


def test_the_newest_of_equal_rows_counts():
    rows = [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 1, "b": 2}]
    assert table.newest(rows, "a") == [{"a": 1, "b": 2}, {"a": 2, "b": 1}]


def gradient(when, energy, cosine, seed=0):
    cosines = {"blocks_1/conv1": cosine, "blocks_1/conv3": 0.99}
    row = {"data": "cifar10", "seed": seed, "when": when, "energy": energy, "cosines": cosines}
    return {**row, "times_fewer": 14.0 + seed, "config": {"energy": 0.98}}


def test_gradients_are_shown_at_the_default_energy_and_over_energies(results):
    rows = [gradient("calibration", 0.9, 0.9), gradient("end", 0.98, 0.7)]
    rows += [gradient("calibration", 0.98, cosine, seed) for seed, cosine in ((0, 0.5), (1, 0.98))]
    rows += [gradient("calibration", 0.98, 0.96)]  # the first of seed 0 measured again
    for row in rows:
        records.append(results / "gradients.jsonl", row)
    blocks = table.blocks(results)
    want = "| `blocks_1/conv1` | 0.970 (least 0.960, n = 2) | 0.700 (least 0.700, n = 1) |"
    assert want in blocks["gradients"]
    assert blocks["energy"].splitlines()[2:] == [
        "| 0.9 | 14.0 | 0.900 (least 0.900, n = 1) |",
        "| 0.98 | 14.5 | 0.970 (least 0.960, n = 2) |",
    ]


def test_fill_replaces_each_block_and_nothing_else(results):
    contents = table.blocks(results)
    text = "before\n" + "".join(
        f"<!-- begin {name} -->old<!-- end {name} -->\nbetween\n" for name in contents
    )
    filled = table.fill(text, contents)
    assert "old" not in filled and filled.count("between") == len(contents)
    assert all(content in filled for content in contents.values())
    assert table.fill(filled, contents) == filled


def test_fill_refuses_a_missing_or_unknown_marker(results):
    contents = table.blocks(results)
    with pytest.raises(ValueError, match="sentence"):
        table.fill("<!-- begin other -->\n<!-- end other -->", contents)


def test_check_fails_on_figures_edited_by_hand(results, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    contents = table.blocks(results)
    readme.write_text("".join(f"<!-- begin {n} -->\n<!-- end {n} -->\n" for n in contents))
    monkeypatch.setattr(table, "README", readme)
    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setattr("sys.argv", ["table"])
    table.main()
    monkeypatch.setattr("sys.argv", ["table", "--check"])
    table.main()
    readme.write_text(readme.read_text().replace("75.6", "75.9"))
    with pytest.raises(SystemExit, match=r"README\.md differs"):
        table.main()
