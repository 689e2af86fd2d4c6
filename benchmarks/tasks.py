"""The networks and data sets that are measured, as configs of the program; run from the root.

Pictures and weights lie under the directory that the environment variable LANCE_JAX_DATA names, as
tfds/ and weights/.
"""

import argparse
import importlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import jax
import ml_collections

from lance_jax.pictures import Pictures
from lance_jax.problem import read_pictures

RUNS = Path("workdir/benchmarks")  # working directories, removed when their run is finished
COMPLETE_BREEDS = (
    "Abyssinian,american_bulldog,Bengal,german_shorthaired,havanese,Maine_Coon,pomeranian"
)
_PLACE = os.environ.get("LANCE_JAX_DATA", "../shared/data")
WEIGHTS = f"{_PLACE}/weights"
_PREPARED = {"data_dir": f"{_PLACE}/tfds"}
# at the 128 pixels that both were trained at
MODELS = {
    "digits": {},
    "mcunet": {"weights": f"{WEIGHTS}/mcunet-5fps.safetensors", "resolution": 0},
    "mobilenetv2": {"weights": f"{WEIGHTS}/mbv2-w0.35.safetensors", "resolution": 0},
}
DATA = {
    "digits": {},
    "cifar10": _PREPARED,
    "cifar100": _PREPARED | {"epochs": 10},  # of 62 steps: as many in all as CIFAR-10's 15 of 39
    "pets": _PREPARED | {"classes": COMPLETE_BREEDS},
}


def pairs(
    parser: argparse.ArgumentParser, models: Iterable[str], data: Iterable[str]
) -> list[tuple[str, str]]:
    """(model, data) of a grid; the digits have a network of their own."""
    grid = itertools.product(models, data)
    found = [(model, name) for model, name in grid if (model == "digits") == (name == "digits")]
    if not found:
        parser.error("the model digits goes with --data digits alone, and no other with it")
    return found


def config(model: str, data: str, **settings) -> ml_collections.ConfigDict:
    """configs/DATA.py with the weights of a model, and `settings` on top.

    The batch goes through the network in one piece where they do not say otherwise: the program's
    choice depends on the machine.
    """
    config = importlib.import_module(f"configs.{data}").get_config()
    config.update({**MODELS[model], **DATA[data], **settings})
    config.micro_batch = settings.get("micro_batch", config.batch_size)
    return config


def pictures(data: str, side: int) -> Pictures:
    """The training pictures of a data set, at `side` pixels."""
    return read_pictures(config("mcunet", data), ["train"], side)["train"]


def cache_compilations() -> None:
    """Cells of a grid compile the same few programs: each once, and for all processes."""
    jax.config.update("jax_compilation_cache_dir", str(RUNS / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
