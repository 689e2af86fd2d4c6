"""python -m lance_jax.main [--config configs/X.py] [--workdir DIR] [--config.key=value ...]

Without --config it runs configs/digits.py. Results of a method lie in WORKDIR/METHOD.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from lance_jax import continual_train, devices, train

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Configuration [configs/digits.py]; --config.key=value sets a field.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where results and checkpoints go [workdir/NAME of the configuration]."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _stop(f"{argv[1]!r} is no flag; fields are set by --config.key=value")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
    file, config = config_flags.get_config_filename(flags.FLAGS["config"]), _CONFIG.value
    if not isinstance(config, ml_collections.ConfigDict):
        _stop(f"get_config() of {file} gives a {type(config).__name__}, and no ConfigDict")
    try:
        workdir = _WORKDIR.value or f"workdir/{Path(file).stem}"
        compare = continual_train.compare if "tasks" in config else train.compare
        compare(config, Path(workdir).expanduser())
    except (ValueError, OSError, FloatingPointError) as error:
        _stop(error)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        _stop(f"out of memory: {reason}; a smaller config.batch_size or resolution needs less")
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from the last checkpoint")


def _parse_flags(argv: list[str]) -> list[str]:
    # as a default of the flag it would be parsed, and fail, while this file is imported
    if not any(re.match("--?config(=|$)", argument) for argument in argv):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        rest = flags.FLAGS(argv)
        getattr(_CONFIG.value, "lock", None)  # where the file failed to load, this raises its error
        return rest
    except flags.Error as error:
        _stop(error)
    except Exception as error:
        # The configuration is a Python file of the user's, run here: it may raise anything.
        reason: object = error
        # ml_collections puts one error into another
        while isinstance(reason, AttributeError | KeyError) and reason.args:
            missing = isinstance(reason, KeyError) and isinstance(reason.args[0], str)
            reason = f"there is no {reason.args[0]}" if missing else reason.args[0]
        _stop(f"the configuration cannot be read: {reason}")


def _stop(error: object) -> NoReturn:
    """Ends the program with one line."""
    sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    devices.use_cores()
    app.run(main, flags_parser=_parse_flags)
