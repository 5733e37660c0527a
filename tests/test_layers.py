"""The packages import in one direction: semi_fast -> pipelines -> data_prep."""

import ast
import sys
from pathlib import Path

import pytest

MAY_IMPORT = {
    "data_prep": {"data_prep"},
    "pipelines": {"pipelines", "data_prep"},
    "semi_fast": {"semi_fast", "pipelines", "data_prep"},
}


def imports(path: Path) -> set[str]:
    """First names of all modules a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_layer_imports_one_above_it(root, package):
    files = sorted((root / package).rglob("*.py"))
    assert files
    for file in files:
        ours = imports(file) & MAY_IMPORT.keys()
        assert ours <= MAY_IMPORT[package], f"{file.relative_to(root)} imports {ours - MAY_IMPORT[package]}"


def test_data_prep_does_not_know_torch(root):
    for file in sorted((root / "data_prep").rglob("*.py")):
        tree = ast.parse(file.read_text())
        top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not top & {"torch", "ffcv"}, f"{file.relative_to(root)} imports torch or ffcv at its top"


def test_no_module_hides_a_library(root):
    libraries = set(sys.stdlib_module_names) | {
        "torch", "numpy", "ffcv", "wandb", "accelerate", "nvidia", "numba", "yaml", "PIL", "rich", "typer", "pooch",
    }  # fmt: skip
    for package in MAY_IMPORT:
        for path in (root / package).iterdir():  # a script started by path has its own folder first on the path
            assert path.stem not in libraries, f"{path.relative_to(root)} hides the library {path.stem}"
