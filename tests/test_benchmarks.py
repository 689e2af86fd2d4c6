"""The benchmarks run from end to end, at a small size, on the digits."""

import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lance_jax
from benchmarks import arguments, finetune, gradients, records, rivals, step_time, table, tasks
from lance_jax import loop, train
from tests.tolerances import assert_close

# the same in all tests, so that they share what is pretrained
SMALL = {**finetune.FIXED, "epochs": 1, "pretrain": {"epochs": 1}, "calibration_batches": 2}
KEY = {"model": "digits", "data": "digits", "split": "test", "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "RUNS", tmp_path / "runs")


@pytest.mark.parametrize("best", [0.0125, 0.05, 0.1, 0.4])
def test_search_climbs_to_the_best_rate(best):
    tried = []

    def accuracy(rate):
        tried.append(rate)
        return -abs(np.log(rate / best))

    assert finetune.search(accuracy, 0.05) == best
    assert {best / 2, best, best * 2} <= set(tried) and len(tried) == len(set(tried))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--models", "digits"], "the model digits goes with --data digits alone"),
        (["--seeds", "-1"], "argument --seeds: -1 is below 0"),
        (["--seeds", "100"], "--seeds: 100 is the seed of the search for learning rates"),
        (["--energies", "nan"], r"argument --energies: nan does not lie in \(0, 1\]"),
    ],
)
def test_bad_arguments_end_before_anything_runs(given, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune", *given])
    with pytest.raises(SystemExit, match="2"):
        finetune.main()
    assert re.search(told, capsys.readouterr().err)


def test_what_is_not_there_is_one_line():
    def missing():
        raise FileNotFoundError("no such\nfile")

    with pytest.raises(SystemExit, match="^error: no such file$"):
        arguments.run(missing)


def test_search_ends_on_a_plateau():
    assert finetune.search(lambda rate: 1.0, 0.05) == 0.05


def test_finetune_runs_each_cell_once(tmp_path, monkeypatch):
    path, ran = tmp_path / "finetune.jsonl", []

    def run(config, method, problem):
        rate = config.learning_rate[config.method]
        ran.append((method, config.energy, config.eval_split, config.seed, rate))
        return {
            "config": config.to_dict(),
            f"{config.eval_split}_accuracy": 1 - abs(rate - 0.1),
        }

    def last():
        return ran[-1][-3:]

    monkeypatch.setattr(finetune, "run", run)
    monkeypatch.setattr(finetune, "problem_of", lambda config: None)
    finetune.measure("digits", "digits", "lance", path, [0, 1], 0.9)
    assert [cell[-3:] for cell in ran[-2:]] == [("test", 0, 0.1), ("test", 1, 0.1)]
    assert len(ran) == len(set(ran)) and {cell[:2] for cell in ran} == {("lance", 0.9)}
    assert {cell[2:4] for cell in ran[:-2]} == {("validation", finetune.SEARCH_SEED)}
    before = len(ran)
    finetune.measure("digits", "digits", "lance", path, [0, 1, 2], 0.9)
    assert len(ran) == before + 1 and last() == ("test", 2, 0.1), "only what was missing"
    finetune.measure("digits", "digits", "lance", path, [2], 0.9, epochs=3)
    assert last() == ("test", 2, 0.1) and ran.count(ran[-1]) == 2, "another configuration"
    before = len(ran)
    finetune.measure("digits", "digits", "lance", path, [2], 0.8)
    assert len(ran) > before and ran[-1][1] == 0.8, "another energy"


def test_finetune_and_the_program_agree_on_what_a_result_holds(tmp_path):
    path, key = tmp_path / "cell.jsonl", {**KEY, "method": "int4", "seed": 0}
    result = finetune.cell(key, path, None, **SMALL, trainable_layers=2)
    (record,) = records.read(path)
    assert record["result"] == result and record["method"] == "int4"
    assert result["ranks"] and result["config"]["modes"] == "none"
    for method, seed in itertools.product(("backprop", "int4"), (0, 1)):
        again = {**record, "method": method, "seed": seed}
        records.append(tmp_path / "finetune.jsonl", again)
    text = table.blocks(tmp_path)["finetune"]
    assert "plain backprop" in text and "int4 inputs" in text and "n = 2" in text


def test_a_cell_of_the_decomposition_counts_its_own_bytes(tmp_path):
    path = tmp_path / "cell.jsonl"
    result = finetune.cell({**KEY, "method": "hosvd", "seed": 0}, path, 0.9, **SMALL)
    assert set(result["ranks"]) == {f"{layer}/kernel" for layer in problem().layers}
    assert all(ranks.keys() == set(rivals.MODES) for ranks in result["ranks"].values())
    assert 0 < result["saved_bytes"]["total"] < result["saved_bytes_backprop"]["total"]


def config(method="backprop", **settings):
    return tasks.config("digits", "digits", **SMALL, **finetune.METHODS[method], **settings)


def problem():
    return finetune.problem_of(tasks.config("digits", "digits", **SMALL))


def test_the_methods_that_equal_backprop_have_its_gradients_and_fewer_bytes(tmp_path):
    path = tmp_path / "finetune.jsonl"
    for method in finetune.EXACT:
        finetune.count("digits", "digits", method, path, **SMALL)
        finetune.count("digits", "digits", method, path, **SMALL)
    found = {record["method"]: record["result"] for record in records.read(path)}
    assert len(records.read(path)) == len(found) == 3, "each once"
    total = {method: result["saved_bytes"]["total"] for method, result in found.items()}
    backprop = found["checkpoint"]["saved_bytes_backprop"]["total"]
    # in parts of 8 of this small batch, the gradients' sums may weigh more than is saved
    assert total["checkpoint"] < backprop and total["accumulate1"] < backprop
    assert total["accumulate1"] < total["accumulate8"]
    assert_equal_gradients(problem().train_fn, train.in_blocks(problem().train_fn))


def test_the_whole_decomposition_gives_the_exact_gradient():
    whole = rivals.hosvd(config("hosvd", energy=1.0), problem())
    assert_equal_gradients(problem().train_fn, whole)


def assert_equal_gradients(plain, other):
    batch = next(step_time.batches(problem().train, config().batch_size, seed=0))
    patterns = train.trainable_patterns("backprop", problem().layers)
    expected, found = (
        lance_jax.value_and_grad(loop.loss_of(fn), trainable=patterns)(problem().params, *batch)
        for fn in (plain, other)
    )
    jax.tree.map(assert_close, found, jax.tree.map(lambda x: np.asarray(x, np.float64), expected))


def test_step_time_measures_each_method_against_plain_backprop(tmp_path):
    methods = ("backprop2", "lance", "blocks", "checkpoint")
    found = step_time.measure("digits", "digits", 0.9, 4, methods, **SMALL)
    assert [record["method"] for record in found] == [step_time.PLAIN, "backprop", *methods]
    for record in found:
        records.append(tmp_path / "step_time.jsonl", record)
        ratio = record["ratio"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found[0]["ratio"]["median"] == 1
    assert found[3]["config"]["energy"] == 0.9
    assert table.blocks(tmp_path)["step_time"].count("\n| ") == len(found) + 1


def test_decomposition_and_projection_are_of_the_same_inputs(tmp_path):
    found = step_time.measure_decomposition("digits", "digits", 0.9, 2, **SMALL)
    seconds = found["seconds"]
    assert set(seconds) == {"decomposition", "projection", "projection_int4"}
    assert all(value > 0 for value in seconds.values())
    assert set(found["ratios"]) == {"projection", "projection_int4"}
    records.append(tmp_path / "decomposition.jsonl", found)
    assert "digits | 0.9 |" in table.blocks(tmp_path)["decomposition"]


def test_core_is_the_projection_of_every_mode():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 5, 6)).astype("float32")
    bases = {
        mode: np.linalg.qr(rng.normal(size=(n, n)))[0][:, :r].astype("float32")
        for mode, n, r in (("height", 4, 2), ("width", 5, 3), ("channel", 6, 4))
    }
    expected = np.einsum("nhwc,hi,wj,ck->nijk", x.astype("float64"), *bases.values())
    assert_close(step_time.core(jnp.asarray(x), bases), expected)


def test_ratio_is_of_medians_within_its_interval():
    theirs = np.random.default_rng(0).uniform(1, 2, 50)
    ratio = step_time.ratio(list(theirs / 2), list(theirs))
    assert ratio == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})


def test_gradients_measures_every_layer_at_both_moments(tmp_path):
    energy = config().energy
    found = list(gradients.measure("digits", "digits", 0, [energy], **SMALL, trainable_layers=2))
    assert [record["when"] for record in found] == ["calibration", "end"]
    assert found[0]["times_fewer"] == found[1]["times_fewer"] > 1
    for record in found:
        records.append(tmp_path / "gradients.jsonl", record)
        assert len(record["cosines"]) == 2
        assert all(0 < cosine <= 1 + 1e-6 for cosine in record["cosines"].values())
        assert record["energy"] == energy
    assert table.blocks(tmp_path)["gradients"].count("blocks_") == 2


def test_cosine():
    a, b = jnp.array([[3.0, 0.0]]), jnp.array([[3.0, 4.0]])
    assert gradients.cosine(a, b) == pytest.approx(0.6)
