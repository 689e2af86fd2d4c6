"""The benchmark of ways to round, at a small size."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random
from samples import pictures

from benchmarks import keep, keep_tables, networks, rounding
from lance_jax.models.deit import DeiT


def by_hand(core, size, ends):
    """Group by group, in float64."""
    columns = np.asarray(core, np.float64).reshape(-1, core.shape[-1])
    back = np.empty_like(columns)
    for start in range(0, len(columns), size):
        for channel in range(columns.shape[1]):
            place = slice(start, start + size), channel
            group = columns[place]
            low, high = (float(jnp.asarray(end).astype(ends)) for end in (group.min(), group.max()))
            step = (high - low) / 15 or 1.0
            back[place] = low + np.clip(np.round((group - low) / step), 0, 15) * step
    return back.reshape(core.shape)


@pytest.mark.parametrize("scheme", rounding.SCHEMES)
def test_values_are_steps_between_their_groups_ends(scheme):
    core = random(3, 5, 7, 4)
    size, ends = rounding.SCHEMES[scheme].size(core.shape), rounding.SCHEMES[scheme].ends
    found = rounding.rounded(core, size, ends)
    np.testing.assert_allclose(found, by_hand(core, size, ends), rtol=1e-4, atol=1e-5)


def test_a_group_of_equal_values_stays():
    core = jnp.full((2, 3, 4), 0.75)
    np.testing.assert_array_equal(rounding.rounded(core, 4, jnp.float16), core)


def test_every_way_is_measured_on_blocks_and_layers(monkeypatch):
    network = DeiT(resolution=16, patch=4, width=16, depth=1, heads=2)
    monkeypatch.setitem(networks.DRAWN, "tiny", network)
    monkeypatch.setattr(keep, "COMPARED", 1)
    drawn, _ = pictures(n=40, side=16)
    found = list(rounding.measure("tiny", keep.Setting("tiny", 8, warm_up=1), drawn))
    rows = {(row["keep"], row["scheme"]): row for row in found}
    assert len(rows) == len(found) == len(rounding.KEEP) * len(keep_tables.ROUNDING)
    assert {scheme for _, scheme in rows} == set(keep_tables.ROUNDING)
    for kept in ("blocks", "layers"):
        assert rows[kept, "groups_32"]["bits"] == 5 and rows[kept, "groups_64"]["bits"] == 4.5
        assert rows[kept, "groups_32_float8"]["bits"] == 4.5
        assert 4 < rows[kept, "channel"]["bits"] < 4.5 < rows[kept, "int4"]["bits"] < 5
        cosines = [rows[kept, scheme]["cosine"] for scheme in ("groups_32", "channel")]
        assert 1 > cosines[0] > cosines[1] > 0
        assert len({row["cosine"] for row in found if row["keep"] == kept}) == len(rows) / len(
            rounding.KEEP
        )
    text = keep_tables.rounding([{**row, "setting": "vit"} for row in found])
    one = rows["layers", "int4"]
    told = f"{one['bits']:.2f} bits: {one['cosine']:.4f}, {one['worst_cosine']:.3f} |"
    assert any("`int4` |" in line and line.endswith(told) for line in text.splitlines())
    assert keep_tables.rounding([]) == "(not measured yet)"
