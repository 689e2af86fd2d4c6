"""The benchmark of continual learning: its cells, and what its tables say of them."""

import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks import continual, continual_plots, continual_tables, markdown, records, tasks
from lance_jax import continual_config

SMALL = {"epochs": 1, "tasks": 2}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "RUNS", tmp_path / "runs")


def test_a_cell_is_run_once(tmp_path, monkeypatch):
    path = tmp_path / "continual.jsonl"
    monkeypatch.setattr(continual, "learning_rate", lambda *_, **__: 0.2)
    continual.measure("digits", "lance", path, [1, 7], **SMALL)
    (record,) = records.read(path)  # there are five seeds
    assert record["benchmark"] == "digits" and record["seed"] == 1
    config = record["result"]["config"]
    assert config["learning_rate"] == {"lance": 0.2} and config["seed"] == 1
    assert config["tasks"] == 2 and config["eval_split"] == "test"
    assert list((tmp_path / "runs" / "continual").iterdir()) == []

    run, ran = continual.continual_train.run, []
    monkeypatch.setattr(
        continual.continual_train, "run", lambda *given: ran.append(given) or run(*given)
    )
    continual.measure("digits", "lance", path, [1], **SMALL)
    assert ran == []


def test_the_rate_of_a_family_is_searched_once(tmp_path, monkeypatch):
    seen = []

    def cell(name, method, split, rate, seed, path, **settings):
        seen.append((method, split, seed, settings["tasks"]))
        return {"acc": -abs(np.log(rate / 0.2))}

    monkeypatch.setattr(continual, "cell", cell)
    for method, searched in (("lance", "gpm"), ("sgp", "gpm"), ("gpm_batch", "gpm"), ("er", "er")):
        seen.clear()
        assert continual.learning_rate("cifar100", method, tmp_path) == 0.2
        assert set(seen) == {(searched, "validation", continual.SEARCH_SEED, 2)}


def test_a_setting_is_chosen_by_pictures_and_seeds_of_no_test_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(continual, "learning_rate", lambda *_, **__: 0.2)
    monkeypatch.setattr(continual, "cell", lambda *given, **_: seen.append(given[2:5]))
    continual.measure("cifar100", "lance_energy80", tmp_path, [0, 2], "validation")
    assert seen == [("validation", 0.2, continual.SEARCH_SEED + seed) for seed in (0, 2)]


def test_every_benchmark_has_a_configuration_that_is_right(tmp_path):
    for name, benchmark in continual.BENCHMARKS.items():
        assert name in continual_tables.NAMES
        for method in benchmark.seeds:
            config = continual.config_of(name, method, "test", 0.1, 0)
            continual_config.check(config, tmp_path / name / method)


def test_bad_arguments_end_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["continual", "--methods", "gpn"])
    with pytest.raises(SystemExit):
        continual.main()
    assert "argument --methods: invalid choice: 'gpn'" in capsys.readouterr().err


# --- tables ---------------------------------------------------------------------------------------


def result(seed, matrix, inputs=100, held=0, total=1000, **config):
    told = [
        {
            "kept": {
                "layer_inputs": inputs, "layer_inputs_backprop": 800,
                "total": total, "total_backprop": 2000,
            },
            "ram": {"kept": total, "factors": held * (2 - t)},
            "storage": {"slices": 10 * t},
            "dimensions": {"a": 20},
            "free_dimensions": {"a": 15 - 5 * t},
        }
        for t in range(len(matrix))
    ]  # fmt: skip
    a = np.asarray(matrix)
    return {
        "config": {
            "seed": seed,
            "method": "gpm",
            "energy": 0.9,
            "learning_rate": {"gpm": 0.1, "lance": 0.1},
        }
        | config,
        "accuracy_matrix": matrix,
        "acc": a[-1].mean(),
        "bwt": float(np.mean(a[-1, :-1] - a.diagonal()[:-1])),
        "forgetting": 0.0,
        "fwt": 0.0,
        "tasks": told,
    }


def add(path, method, results, benchmark="cifar100", split="test"):
    for one in results:
        seed = one["config"]["seed"]
        key = {"benchmark": benchmark, "method": method, "split": split, "seed": seed}
        records.append(path, {**key, "result": one})


GPM = [[[0.5, 0.1], [0.5, 0.5]], [[0.6, 0.1], [0.58, 0.4]]]
LANCE = [[[0.5, 0.1], [0.52, 0.47]], [[0.6, 0.1], [0.59, 0.42]]]
FINETUNE = [[[0.5, 0.1], [0.3, 0.5]], [[0.6, 0.1], [0.4, 0.5]]]


@pytest.fixture
def measured(tmp_path):
    path = tmp_path / "continual.jsonl"
    add(path, "finetune", [result(seed, m, inputs=800) for seed, m in enumerate(FINETUNE)])
    add(path, "gpm", [result(s, m, inputs=800, held=500) for s, m in enumerate(GPM)])
    add(path, "lance", [result(s, m, held=100) for s, m in enumerate(LANCE)])
    return continual_tables.read(path)


def test_differences_are_paired_over_tasks_and_seeds(measured):
    found = measured["cifar100"]
    differences = np.asarray([2.0, -3.0, 1.0, 2.0])
    mean, low, high = continual_tables.paired(found["lance"], found["gpm"])
    want = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    np.testing.assert_allclose((mean, low, high), (0.5, want.low, want.high))
    bwt = continual_tables.paired(found["gpm"], found["finetune"], continual_tables.changes)
    np.testing.assert_allclose(bwt[0], np.mean([0 + 20, -2 + 20]))


def test_memory_is_that_of_the_task_that_needs_most(measured):
    found = measured["cifar100"]
    assert continual_tables.ram(found["lance"], "layer_inputs") == 100 + 200
    assert continual_tables.ram(found["gpm"], "total") == 1000 + 1000
    assert continual_tables.most(found["lance"], continual_tables.held) == 200


def test_the_table_has_a_line_for_each_method(measured):
    text = continual_tables.table(measured["cifar100"])
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["finetune", "gpm", "lance"]
    assert "50.0 ± 0.7" in lines[2] and "+0.5 (" in lines[2] and "| 0.1 | 2 |" in lines[2]


def test_targets_say_what_is_met(measured):
    rows = {
        row.split(" | ")[0].removeprefix("| "): row.split(" | ")[-1].removesuffix(" |")
        for row in continual_tables.targets(measured).splitlines()[2:]
    }
    assert rows["`gpm` ahead of `finetune` by 5 of BWT"] == "met"
    assert rows["`lance` at most 0.5 behind `gpm`"] == "met"
    assert rows["`lance`: BWT no worse than -1"] == "met"
    assert rows["inputs kept at most 1/7, bounds counted, in every task"] == "met"
    assert rows["AlexNet: inputs kept + factors at most 0.75 of `gpm`'s"] == "met"
    assert rows["AlexNet: all that is kept + factors at most 0.75 of `gpm`'s"] == "met"


def test_targets_say_on_how_many_seeds(measured, tmp_path):
    assert continual_tables.targets(measured).count("; n = 2 | met") == 3
    path = tmp_path / "one.jsonl"
    add(path, "gpm", [result(seed, m) for seed, m in enumerate(GPM)])
    add(path, "lance", [result(0, LANCE[0])])
    # that of `lance` beside `gpm`, of the seed that both have, and its BWT
    assert continual_tables.targets(continual_tables.read(path)).count("; n = 1 | met") == 2


def test_what_has_no_target_has_no_verdict(tmp_path):
    path = tmp_path / "continual.jsonl"
    for method, matrices in {"lance": LANCE, "gpm_int4": GPM}.items():
        add(path, method, [result(seed, m) for seed, m in enumerate(matrices)])
    rows = continual_tables.targets(continual_tables.read(path)).splitlines()
    (row,) = (row for row in rows if "no target" in row)
    assert row.split("|")[3].strip() == ""


def test_runs_of_another_configuration_replace_all_of_the_former(tmp_path):
    path = tmp_path / "continual.jsonl"
    add(path, "gpm", [result(s, m) for s, m in enumerate(GPM)])
    add(path, "gpm", [result(0, GPM[0], epochs=50)])
    assert list(continual_tables.read(path)["cifar100"]["gpm"]) == [0]


def test_what_was_measured_before_there_were_blocks_kept_layers():
    before, after = (
        {"method": "lance", "energy": 0.9, **keep} for keep in ({}, {"keep": "layers"})
    )
    assert continual.relevant(before) == continual.relevant(after)
    assert continual.relevant(before) != continual.relevant({**before, "keep": "blocks"})


def test_the_energy_is_lances_alone(tmp_path):
    """Runs of other methods stay when its default changes."""
    path = tmp_path / "continual.jsonl"
    for method in ("gpm", "lance"):
        add(path, method, [result(0, GPM[0], energy=0.8, method=method)])
        add(path, method, [result(1, GPM[1], energy=0.9, method=method)])
    measured = continual_tables.read(path)["cifar100"]
    assert list(measured["gpm"]) == [0, 1]
    assert list(measured["lance"]) == [1]


def test_energies_stand_by_their_validation_runs_over_all_tasks(tmp_path):
    path = tmp_path / "continual.jsonl"
    add(path, "gpm", [result(100, GPM[0], tasks=2)], split="validation")  # of the rate's search
    for method, energy, matrix in (("lance", 0.9, GPM[0]), ("lance_energy80", 0.8, LANCE[0])):
        add(path, method, [result(0, FINETUNE[0], energy=energy, tasks=10)])
        add(path, method, [result(100, matrix, energy=energy, tasks=10)], split="validation")
    lines = continual_tables.energies(continual_tables.read(path, "validation")).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 0.9", "| 0.8"]
    assert "50.0" in lines[2] and "49.5 | -0.5 (" in lines[3]


def test_nothing_measured_still_renders():
    assert continual_tables.energies({}) == markdown.NOTHING
    assert continual_tables.tables({}) == markdown.NOTHING
    assert continual_tables.targets({}) == markdown.NOTHING
    assert continual_tables.summary({}) == markdown.NOTHING
    assert continual_plots.drawings({}) == {}


def test_plots_show_the_results(measured):
    found = continual_plots.drawings(measured["cifar100"])
    assert set(found) == set(continual_plots.ALT)
    np.testing.assert_allclose(
        continual_plots.matrix(measured["cifar100"]["gpm"]), [[55, 10], [54, 45]]
    )
    assert continual_plots.free_dimensions(measured["cifar100"]["lance"]) == {"a": [0.75, 0.5]}
    for digest, draw in found.values():
        svg = draw()
        assert svg == draw() and digest in svg
