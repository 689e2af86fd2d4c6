"""The layout: imports point one way, and jax is used through its public names, unpatched."""

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lance_jax"

# A file imports only from files above it. A folder stands for all files in it.
ORDER = [
    "paths",
    "jaxprs",
    "origins",
    "interpreter",
    "blocks",
    "primitives",
    "factors",
    "hosvd",
    "modes",
    "quantize",
    "dense",
    "windows",
    "shifted",
    "conv_shape",
    "conv_order",
    "conv",
    "pointwise",
    "cpu_conv",
    "cpu_pool",
    "lowering",
    "layer_rule",
    "block_rule",
    "layers",
    "transform",
    "grams",
    "calibrate",
    "residuals",
    "phases",
    "micro_batches",
    "step",
    "transient",
    "slices",
    "memory",
    "continual",
    "models",
    "pictures",
    "data",
    "folder",
    "loader",
    "features",
    "checkpoint",
    "metrics",
    "forgetting",
    "config",
    "timing",
    "devices",
    "loop",
    "problem",
    "train",
    "norm_statistics",
    "continual_tasks",
    "continual_config",
    "continual_methods",
    "continual_train",
    "main",
    "predict",
    "prepare",
]
LIBRARIES = {"jax", "jaxlib", "flax", "optax", "numpy", "haiku", "equinox", "keras"}
PRIVATE = "jax." + "_src"  # in two pieces, since this file is searched too


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def place_of(path: Path) -> str:
    """The name in ORDER of a file of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all imported modules and names, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """The files and folders of the package that are imported; "" for the package itself."""
    parts = [name.split(".") for name in imports(tree)]
    names = [p[1] if len(p) > 1 else "" for p in parts if p[0] == "lance_jax"]
    return {name if name in ORDER else "" for name in names}


def patches(tree: ast.AST) -> Iterator[int]:
    """Lines that assign to, or delete, an attribute of an imported library."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    bound.add(alias.asname or alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LIBRARIES:
            bound.update(alias.asname or alias.name for alias in node.names)

    def in_library(node: ast.AST) -> bool:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id in bound

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript):
            if "primitive_batchers[primitive]" in ast.unparse(node):
                continue  # where jax has primitives of others registered
            if not isinstance(node.ctx, ast.Load) and in_library(node):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("setattr", "delattr") and node.args and in_library(node.args[0]):
                yield node.lineno
            if called == "patch" or (called == "object" and "patch" in ast.unparse(node.func)):
                yield node.lineno


# The package's own front imports what is public, wherever it stands.
MODULES = [path for path in files("lance_jax") if place_of(path) != "__init__"]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    place = place_of(path)
    assert place in ORDER, f"{name_of(path)} has no place in the order of imports"
    above = set(ORDER[: ORDER.index(place)])
    if (PACKAGE / place).is_dir():
        above.add(place)
    if "memory" in above:
        above.add("")  # the program uses the library by its front
    wrong = own_imports(ast.parse(path.read_text())) - above
    assert not wrong, f"{name_of(path)} imports {sorted(wrong)}, which stand below it"


@pytest.mark.parametrize("path", files("lance_jax", "configs", "benchmarks", "tests"), ids=name_of)
def test_only_public_names_of_jax(path):
    assert PRIVATE not in path.read_text()


@pytest.mark.parametrize("path", files("lance_jax", "configs", "benchmarks"), ids=name_of)
def test_nothing_is_patched(path):
    assert list(patches(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize("path", files("lance_jax"), ids=name_of)
def test_two_files_know_the_interpreter(path):
    """Only jaxprs.py and primitives.py import its building blocks."""
    if path in (PACKAGE / "jaxprs.py", PACKAGE / "primitives.py"):
        assert "jax.extend" in path.read_text()
    else:
        assert "jax.extend" not in path.read_text()


def test_the_core_imports_jax_alone():
    """The library needs jax; the other packages serve the program and the tests."""
    core = ORDER[: ORDER.index("memory") + 1]
    for name in core:
        path = PACKAGE / f"{name}.py"
        for module in imports(ast.parse(path.read_text())):
            root = module.split(".")[0]
            known = root in sys.stdlib_module_names or root in ("jax", "numpy", "lance_jax")
            assert known, f"{name_of(path)} imports {module}"


def test_the_checks_can_fail():
    def tree(source):
        return ast.parse(textwrap.dedent(source))

    assert own_imports(tree("import lance_jax.train")) == {"train"}
    assert own_imports(tree("from lance_jax.train import main")) == {"train"}
    assert own_imports(tree("from lance_jax import conv, dense")) == {"conv", "dense"}
    assert own_imports(tree("from lance_jax import compress")) == {""}
    assert own_imports(tree("def f():\n    import lance_jax")) == {""}
    assert own_imports(tree("import jax")) == set()

    for patch in (
        "import jax\njax.lax.dot = None",
        "import jax.numpy as jnp\njnp.dot = None",
        "from jax import lax\nlax.dot += 1",
        "from flax import linen as nn\ndef f():\n    nn.Dense.__call__ = f",
        "import jax\nsetattr(jax.lax, 'dot', None)",
        "import jax\ndel jax.lax.dot",
        "import jax\njax.lax.__dict__['dot'] = None",
        "from unittest import mock\nmock.patch('jax.lax.dot')",
        "from unittest import mock\nmock.patch.object(lax, 'dot')",
        "import jax\nfor jax.lax.dot in (): pass",
    ):
        assert len(list(patches(tree(patch)))) == 1, patch
    for fine in (
        "import jax\nx = jax.lax.dot",
        "import jax\njax.config.update('jax_enable_x64', True)",
        "import jax\nself.jax = jax",
        "import numpy as np\nx = np.zeros(3)\nx[0] = 1",
        "import jax.numpy as jnp\nx = x.at[jnp.arange(3)].set(1)",
    ):
        assert list(patches(tree(fine))) == [], fine
