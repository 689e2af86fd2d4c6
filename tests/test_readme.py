"""README's example runs, and its figures are those of the committed results."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import records, table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_example_runs():
    text = README.read_text()
    match = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert match and text[: match.end()].count("\n") < 30, "the example ends by line 30"
    names = {}
    exec(match[1], names)
    arguments = [names[name] for name in ("params", "x", "y")]
    value, grads = jax.value_and_grad(names["loss"])(*arguments, names["net"].apply)
    assert jnp.allclose(names["value"], value)
    assert jax.tree.structure(names["grads"]) == jax.tree.structure(grads)


def test_figures_are_up_to_date():
    texts = {page: (ROOT / page).read_text() for page in table.PAGES}
    assert table.fill(texts, table.blocks(records.RESULTS)) == texts
    for path, (digest, _) in table.pictures(records.RESULTS).items():
        assert digest in (ROOT / path).read_text(), f"{path} shows other results"


def test_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax_bound,) = [name for name in project["dependencies"] if name.startswith("jax>=")]
    python = project["requires-python"].removeprefix(">=")
    stated = f"Python {python} or newer; jax {jax_bound.removeprefix('jax>=')} or newer"
    assert stated in README.read_text()
