"""JSON lines in `results/`: one measurement a line, appended as soon as it is made."""

import json
import shlex
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(path: Path) -> list[dict]:
    """All records of a file, in order of writing; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict) -> None:
    """Adds one record, with the command that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"command": command(), **record}, sort_keys=True)
    with path.open("a") as file:
        file.write(line + "\n")


def command() -> str:
    """The running command as one would type it in the repository's root."""
    script = Path(sys.argv[0])
    return shlex.join(["python", "-m", f"benchmarks.{script.stem}", *sys.argv[1:]])
