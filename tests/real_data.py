"""Where real pictures and weights lie, beside a checkout that has them: they are not part of it."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TFDS, WEIGHTS = DATA / "tfds", DATA / "weights"
needs_real_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="real pictures and weights, 44 MB, are not at ../shared/data"
)
