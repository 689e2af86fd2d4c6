"""launch/colab_tpu.ipynb runs from top to bottom on a CPU, offline, as it stands."""

import copy
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lance_jax import config
from lance_jax.models import weights
from lance_jax.models.layers import Block
from lance_jax.models.mcunet import MCUNet, Stem
from tests.test_models_network import drawn
from tests.test_models_weights import cached

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = (Block(3, 2, 8, 16, 8, True, False), Block(3, 1, 8, 16, 8, True, True)) * 2
NETWORK = MCUNet(resolution=96, stem=Stem(3, 2, 8), blocks=BLOCKS, classes=2)
NOTEBOOK = nbformat.read(ROOT / "launch" / "colab_tpu.ipynb", nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder it ran in, cell id -> cell): the hub's cache holds a small network."""
    folder = tmp_path_factory.mktemp("notebook")
    place = cached(folder / "hub", config.pretrained().weights, {})
    weights.save(place, NETWORK, drawn(NETWORK))
    offline = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    environment = os.environ | offline | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    notebook = copy.deepcopy(NOTEBOOK)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)  # raises the first error of a cell
    return folder, {cell.id: cell for cell in notebook.cells}


def text(cell):
    """All that a cell printed or showed as text."""
    printed = [output.get("text", "") for output in cell.outputs]
    return "".join(printed + [o["data"].get("text/plain", "") for o in cell.outputs if "data" in o])


def test_every_cell_runs(run):
    _, cells = run
    counts = [cell.execution_count for cell in cells.values() if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_digits(run):
    folder, cells = run
    kept = {}
    for method in ("bias", "backprop", "lance"):
        result = json.loads((folder / "runs" / "digits" / method / "result.json").read_text())
        kept[method] = result["saved_bytes"]["total"]
        assert method in text(cells["digits"])
    assert kept["lance"] < kept["backprop"] / 5
    assert any("image/png" in output.get("data", {}) for output in cells["plot"].outputs)


def test_library(run):
    _, cells = run
    assert "int4" in text(cells["calibrate"])
    assert "total kept" in text(cells["compress"])
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", text(cells["train"]))
    assert float(accuracy) > 80


def test_photos(run):
    folder, _ = run
    result = json.loads((folder / "runs" / "photos" / "lance" / "result.json").read_text())
    assert result["config"]["weights"] == config.pretrained().weights
    assert len(result["ranks"]) == 5  # the last four layers, and the head


def test_is_committed_clean():
    nbformat.validate(NOTEBOOK)
    assert NOTEBOOK.metadata.accelerator == "TPU"
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
