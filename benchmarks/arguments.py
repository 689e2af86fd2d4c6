"""Numbers on a benchmark's command line, and errors that end it with one line."""

import argparse
import sys
from collections.abc import Callable


def energy(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in (0, 1]")
    return value


def seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def rounds(text: str) -> int:
    """At least 2: of one there is no interval."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return value


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark: what is wrong with its data, weights or settings is one line."""
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
