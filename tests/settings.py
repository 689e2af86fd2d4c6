"""A config of `configs/`, made small, and the place of real data where there are some."""

import importlib
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights"


def settings(name="digits", **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    small = {"epochs": 1, "calibration_batches": 2, "checkpoint_every": 100}
    config.update({**small, **changes})
    return config
