"""README's tables say what the JSON lines say."""

import math

import numpy as np
import pytest

from benchmarks import records, table

# Student's t, 0.975 quantile at four degrees of freedom, from a printed table
T4 = 2.776445


def cell(method: str, seed: int, accuracy: float, split: str = "test") -> dict:
    small = method != "backprop"
    return {
        "data": "cifar10",
        "method": method,
        "split": split,
        "seed": seed,
        "learning_rate": 0.05,
        "result": {
            "test_accuracy": accuracy,
            "loss": 0.25,
            "saved_bytes": {"layer_inputs": 50_000 if small else 9_000_000, "total": 600_000},
            "saved_bytes_backprop": {"layer_inputs": 9_000_000, "total": 9_600_000},
            "step_seconds": {"median": 0.1, "min": 0.09, "max": 0.2},
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
    assert "50 / 600" in row and "| 16.0 |" in row and "| 100 |" in row
    assert "16.0 times fewer" in table.blocks(results)["sentence"]
    assert "180 times fewer" in table.blocks(results)["sentence"]


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
