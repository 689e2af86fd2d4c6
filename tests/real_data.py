"""Beside a checkout that has them, and no part of it: real pictures, weights, golden files."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
DATA, GOLDENS = SHARED / "data", SHARED / "goldens"
TFDS, WEIGHTS = DATA / "tfds", DATA / "weights"
needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="real pictures and weights, 44 MB, are not at ../shared/data"
)
needs_goldens = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason="outputs of the authors' code are not at ../shared/goldens"
)
