"""The examples of docs/ run, and its API page names all that is public."""

import re
from pathlib import Path
from types import ModuleType

import pytest

import lance_jax

DOCS = Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.name)
def test_examples_run(page):
    """The blocks of a page are one program."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), page.name, "exec"), {})


def test_api_page_names_all_that_is_public():
    library = re.search(r"## The library\n(.*?)\n## ", (DOCS / "api.md").read_text(), re.DOTALL)
    assert library
    named = re.findall(r"^::: .*?(\w+)$", library[1], re.MULTILINE)
    public = [
        name
        for name, value in vars(lance_jax).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]
    assert sorted(named) == sorted(public)
