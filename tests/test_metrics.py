"""The files that a run writes."""

import json

import pytest

from lance_jax import metrics


def line(step):
    return {"step": step, "epoch": 0, "steps": 1, "loss": 0.1 * step, "step_seconds": []}


def test_lines_are_appended(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = metrics.Metrics(path, 0)
    assert log.lines() == [] and path.exists()
    for step in (1, 2):
        log.append(line(step))
        assert len(path.read_text().splitlines()) == step
    assert log.lines() == [line(1), line(2)]


@pytest.mark.parametrize("half", ["", '{"step": 40, "lo'])
@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])]
)
def test_later_lines_and_half_a_line_are_dropped(tmp_path, half, step, kept):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(s)) + "\n" for s in (10, 20, 30)) + half)
    log = metrics.Metrics(path, step)
    assert log.lines() == [line(s) for s in kept]
    log.append(line(99))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, 99]


@pytest.mark.parametrize("foreign", ["{}", "3", "not JSON", '{"step": 3}'])
def test_lines_that_no_run_wrote(tmp_path, foreign):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(line(1))}\n{foreign}\n")
    with pytest.raises(ValueError, match="metrics.jsonl' holds lines that no run wrote"):
        metrics.Metrics(path, 3)
    assert foreign in path.read_text(), "it is left as it was"


def test_write_atomically_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    metrics.write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics.write_atomically(path, "new")
    assert path.read_text() == "old"
    metrics.write_atomically(path, "new")
    assert path.read_text() == "new"


def test_spread():
    assert metrics.spread([3.0, 1.0, 2.0, 9.0]) == {"median": 2.5, "min": 1.0, "max": 9.0}
    assert metrics.spread([]) == {"median": None, "min": None, "max": None}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_table(capsys, split):
    result = {
        "config": {"dataset": "digits", "batch_size": 64, "eval_split": split},
        "method": "lance",
        f"{split}_accuracy": 0.9876,
        "loss": 0.0123,
        "micro_batch": 16,
        "saved_bytes": {"layer_inputs": 10, "total": 2500},
        "saved_bytes_backprop": {"layer_inputs": 100, "total": 50000},
        "step_seconds": {"median": 0.0256, "min": 0.02, "max": 0.03},
    }
    metrics.show_table([result, {**result, "step_seconds": metrics.spread([])}])
    text = capsys.readouterr().out
    for cell in ("digits", "lance", "98.8%", "0.012", "16", "kB", "2.5", "1/20.0", "25.6"):
        assert cell in text
    assert split in text and "block" not in text
    recomputed = {**result["saved_bytes"], "transient": 7890}
    metrics.show_table([result, {**result, "saved_bytes": recomputed}])
    text = capsys.readouterr().out
    assert "1/4.8" in text  # 50000 / (2500 + 7890)
    assert "2.5 +" in text and "7.9" in text and "block" in text
