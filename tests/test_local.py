"""launch/local.sh installs once, and then runs the program with the flags it was given."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A python whose `-m venv` makes an environment that notes the packages it is asked for, and fails
# while the file `offline` exists.
INTERPRETER = """#!/usr/bin/env bash
mkdir -p .venv/bin
printf '#!/bin/sh\\necho "$@" >>installs\\n[ ! -e offline ]\\n' >.venv/bin/pip
printf '#!/bin/sh\\nexec {python} "$@"\\n' >.venv/bin/python
chmod +x .venv/bin/*
"""


@pytest.fixture
def clone(tmp_path):
    """run(*flags) -> the finished process, in a folder that looks like a fresh clone."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "local.sh", tmp_path / "launch")
    interpreter = tmp_path / "python"
    interpreter.write_text(INTERPRETER.format(python=sys.executable))
    interpreter.chmod(0o755)
    environment = os.environ | {"PYTHON": str(interpreter), "PYTHONPATH": str(ROOT)}

    def run(*flags):
        command = [tmp_path / "launch" / "local.sh", *flags]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")

    return run


def test_installs_once_and_passes_the_flags_on(clone, tmp_path):
    (tmp_path / "offline").touch()
    assert clone().returncode == 1  # and the installation is begun again
    (tmp_path / "offline").unlink()
    for _ in range(2):
        done = clone("--config.epochs=many", "--workdir", str(tmp_path / "a run"))
        assert done.returncode == 1 and not done.stdout
        assert "--config.epochs=many" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "installs").read_text() == "install --quiet -e .\n" * 2
