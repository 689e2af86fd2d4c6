"""A config of `configs/`, made small."""

import importlib


def settings(name="digits", **changes):
    config = importlib.import_module(f"configs.{name}").get_config()
    small = {"epochs": 1, "calibration_batches": 2, "checkpoint_every": 100}
    # chosen by timing, it would make the numbers differ from run to run
    small["micro_batch"] = 1000
    config.update({field: value for field, value in small.items() if field in config})
    config.update(changes)
    return config
