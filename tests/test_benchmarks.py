"""The benchmarks run from end to end, at a small size, on the digits."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import finetune, gradients, records, step_time, table, tasks
from lance_jax import train

SMALL = {"epochs": 1, "pretrain": {"epochs": 1}, "calibration_batches": 2}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "RUNS", tmp_path / "runs")


@pytest.mark.parametrize("best", [0.0125, 0.05, 0.1, 0.4])
def test_search_climbs_to_the_best_rate(best):
    tried = []

    def accuracy(rate):
        tried.append(rate)
        return -abs(np.log(rate / best))

    assert finetune.search(accuracy) == best
    assert {best / 2, best, best * 2} <= set(tried) and len(tried) == len(set(tried))


def test_search_ends_on_a_plateau():
    assert finetune.search(lambda rate: 1.0) == 0.05


def test_finetune_runs_each_cell_once(tmp_path, monkeypatch):
    path, ran = tmp_path / "finetune.jsonl", []

    def run(config, workdir, method):
        ran.append((config.eval_split, config.seed, config.learning_rate[method]))
        workdir.mkdir(parents=True)
        rate = config.learning_rate[method]
        return {
            "config": config.to_dict(),
            f"{config.eval_split}_accuracy": 1 - abs(rate - 0.1),
        }

    monkeypatch.setattr(train, "run", run)
    finetune.measure("digits", "paper", path, seeds=[0, 1])
    assert ran[-2:] == [("test", 0, 0.1), ("test", 1, 0.1)]
    assert len(ran) == len(set(ran))
    assert {(split, seed) for split, seed, _ in ran[:-2]} == {("validation", finetune.SEARCH_SEED)}
    finetune.measure("digits", "paper", path, seeds=[0, 1, 2])
    assert ran[-2:] == [("test", 1, 0.1), ("test", 2, 0.1)]  # only what was missing
    finetune.measure("digits", "paper", path, seeds=[2], epochs=3)
    assert ran[-1] == ("test", 2, 0.1) and ran.count(ran[-1]) == 2  # another configuration


def test_finetune_and_the_program_agree_on_what_a_result_holds(tmp_path):
    path = tmp_path / "cell.jsonl"
    record = finetune.cell("digits", "paper", "test", 0.1, 0, path, **SMALL)
    assert records.read(path)[0].items() >= record.items()
    assert record["result"]["ranks"] and record["result"]["config"]["modes"] == "paper"
    for method in ("backprop", "paper"):
        for seed in (0, 1):
            again = {**record, "method": method, "seed": seed}
            records.append(tmp_path / "finetune.jsonl", again)
    text = table.blocks(tmp_path)["finetune"]
    assert "plain backprop" in text and "`paper`" in text and "n = 2" in text


def test_step_time_measures_both_forms_of_plain_backprop(tmp_path):
    found = step_time.measure("digits", rounds=4, **SMALL)
    for record in found:
        records.append(tmp_path / "step_time.jsonl", record)
        ratio = record["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert table.blocks(tmp_path)["step_time"].count("\n| digits |") == len(found) == 2


def test_ratio_is_of_medians_within_its_interval():
    theirs = np.random.default_rng(0).uniform(1, 2, 50)
    ratio = step_time.ratio(list(theirs / 2), list(theirs))
    assert ratio == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})


def test_gradients_measures_every_layer_at_both_moments(tmp_path):
    found = list(gradients.measure("digits", 0, [0.9, 0.98], **SMALL))
    assert [record["when"] for record in found] == ["calibration", "calibration", "end"]
    assert [record["energy"] for record in found] == [0.9, 0.98, 0.98]
    assert found[0]["times_fewer"] > found[1]["times_fewer"] == found[2]["times_fewer"]
    for record in found:
        records.append(tmp_path / "gradients.jsonl", record)
        assert len(record["cosines"]) == 4
        assert all(0 < cosine <= 1 + 1e-6 for cosine in record["cosines"].values())
    assert table.blocks(tmp_path)["gradients"].count("blocks_") == 4


def test_cosine():
    a, b = jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 4.0]])
    assert gradients.cosine(a, b) == pytest.approx(0.6)
