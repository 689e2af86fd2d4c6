"""The command line, in processes of its own: bad flags, and death at any moment.

Bad settings are tested in test_train.py, without the cost of a process.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lance_jax import main, train
from lance_jax.paths import leaves_with_path

ROOT = Path(__file__).resolve().parents[1]


def start(*arguments, **options):
    command = [sys.executable, "-m", "lance_jax.main", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def run(*arguments):
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out, err


BAD = [
    (["--config.lerning_rate.head=1"], 'Did you mean "learning_rate"'),
    (["--config.epochs=many"], "--config.epochs=many"),
    (["--config", "configs/no.py"], "configs/no.py"),
    (["--config", "configs/no.py", "--config.epochs=3"], "configs/no.py"),
    (["--config", "configs"], "Is a directory"),
    (["--config", "README.md"], "the configuration cannot be read"),
    (["epochs=3"], "'epochs=3' is no flag"),
]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_a_failure(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    argv = ["main", "--workdir", str(tmp_path / "run"), *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for fields
    with pytest.raises(SystemExit) as stop:
        main.main(main._parse_flags(argv))
    told = str(stop.value)
    assert told.startswith("error: ") and message in told and "\n" not in told
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.datasets=folder"], "cannot be read: there is no 'datasets'"),
        (["--config", "tests/tolerances.py"], "no attribute 'get_config'"),
        (
            ["--config", "configs/cifar10.py", "--config.weights=no.safetensors"],
            "'no.safetensors' does not exist",
        ),
    ],
)
def test_bad_input_ends_the_process_so(tmp_path, arguments, message):
    code, out, err = run("--workdir", tmp_path / "run", *arguments)
    assert code != 0 and not out
    assert message in err and "Traceback" not in err
    assert err.count("\n") == 1


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_an_interrupt_is_one_line(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "compare", stop)
    main._parse_flags(["main", "--workdir", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: interrupted; the same command goes on from the"):
        main.main(["main"])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    "error",
    [MemoryError("no 9 GiB"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no 9 GiB\nmore")],
)
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "compare", fail)
    main._parse_flags(["main", "--workdir", str(tmp_path)])
    told = (
        "^error: out of memory: .*no 9 GiB; a smaller config.batch_size or resolution needs less$"
    )
    with pytest.raises(SystemExit, match=told):
        main.main(["main"])


SMALL = [
    "--config.method=lance",
    "--config.epochs=4",
    "--config.pretrain.epochs=1",
    "--config.log_every=4",
    "--config.checkpoint_every=1",
    "--config.calibration_batches=2",
]


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


TASKS = [
    "--config=configs/split_digits.py",
    "--config.method=lance",
    "--config.tasks=2",
    "--config.epochs=2",
    "--config.momentum=0.9",
    "--config.log_every=2",
    "--config.checkpoint_every=1",
]


def kill_when(workdir, file, count, arguments=SMALL):
    """Runs until `file` under `workdir` has `count` lines, then kills the process."""
    process = start("--workdir", workdir, *arguments)
    while process.poll() is None and lines(workdir / file) < count:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"


def without_times(record):
    if isinstance(record, list):
        return [without_times(part) for part in record]
    if isinstance(record, dict):
        return {k: without_times(v) for k, v in record.items() if not k.endswith("_seconds")}
    return record


def outcome(workdir, directories=("pretrain", "lance")):
    found = {}
    for directory in directories:
        log = (workdir / directory / "metrics.jsonl").read_text().splitlines()
        found[directory] = [without_times(json.loads(line)) for line in log]
    return found, without_times(json.loads((workdir / "lance" / "result.json").read_text()))


def end_of_task(directory, task):
    """The bytes of every array that was stored after a task: weights, statistics, slices."""
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(directory / "tasks" / str(task) / "arrays")
    return {path: np.asarray(leaf).tobytes() for path, leaf in leaves_with_path(arrays)}


def test_killed_runs_end_with_the_same_numbers(tmp_path):
    code, out, err = run("--workdir", tmp_path / "whole", *SMALL)
    assert code == 0, err
    assert "lance" in out and "backprop" in out

    workdir = tmp_path / "killed"
    kill_when(workdir, "pretrain/metrics.jsonl", 1)
    kill_when(workdir, "lance/metrics.jsonl", 3)
    code, out, err = run("--workdir", workdir, *SMALL)
    assert code == 0, err
    assert outcome(workdir) == outcome(tmp_path / "whole")


def test_killed_inside_a_task_it_goes_on_there(tmp_path):
    code, out, err = run("--workdir", tmp_path / "whole", *TASKS)
    assert code == 0, err
    assert "lance: 2 of 2 learnt" in out

    workdir = tmp_path / "killed"
    kill_when(workdir, "lance/task_0/metrics.jsonl", 2, TASKS)
    kill_when(workdir, "lance/task_1/metrics.jsonl", 3, TASKS)
    code, out, err = run("--workdir", workdir, *TASKS)
    assert code == 0, err
    assert "1 of 2 learnt" not in out  # a finished task is never trained again
    tasks = ("lance/task_0", "lance/task_1")
    assert outcome(workdir, tasks) == outcome(tmp_path / "whole", tasks)
    ends = [end_of_task(where / "lance", 1) for where in (workdir, tmp_path / "whole")]
    assert {"params", "slices"} <= {name for path in ends[0] for name in path.split("/")}
    assert ends[0] == ends[1]
