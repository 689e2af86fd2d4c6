"""The three data sets that are measured, as configs of the program; run from the root.

Pictures and weights lie under the directory that the environment variable LANCE_JAX_DATA names, as
tfds/ and weights/.
"""

import importlib
import os
from pathlib import Path

import ml_collections

RUNS = Path("workdir/benchmarks")  # working directories, so that a killed run goes on too
COMPLETE_BREEDS = (
    "Abyssinian,american_bulldog,Bengal,german_shorthaired,havanese,Maine_Coon,pomeranian"
)
_PLACE = os.environ.get("LANCE_JAX_DATA", "../shared/data")
WEIGHTS = f"{_PLACE}/weights"
PREPARED = {
    "data_dir": f"{_PLACE}/tfds",
    "weights": f"{WEIGHTS}/mcunet-5fps.safetensors",
    "resolution": 0,  # the 128 pixels that MCUNet was trained at
}
DATA = {"digits": {}, "cifar10": PREPARED, "pets": PREPARED | {"classes": COMPLETE_BREEDS}}


def config(data: str, **settings) -> ml_collections.ConfigDict:
    """configs/DATA.py with the place of the prepared data, and `settings` on top."""
    config = importlib.import_module(f"configs.{data}").get_config()
    config.update({**DATA[data], **settings})
    return config
