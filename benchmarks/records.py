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
    """Adds one record, with the command that made it; several processes may write to one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"command": command(), **record}, sort_keys=True) + "\n"
    with path.open("ab", buffering=0) as file:  # one write, which appends as a whole
        file.write(line.encode())


def command() -> str:
    """The running command as one would type it in the repository's root."""
    script = Path(sys.argv[0])
    return shlex.join(["python", "-m", f"benchmarks.{script.stem}", *sys.argv[1:]])
