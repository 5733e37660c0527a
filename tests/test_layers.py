"""Who may import whom: semi_fast -> pipelines -> data_prep, within each from room to room, and never in a circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

#: Rooms of each package from the ground up: a room imports from itself and from those before it.
ROOMS = {
    "data_prep": (
        *("errors", "files", "cores", "memory", "progress", "folder", "sources", "recipes", "work", "options"),
        *("commands", "build"),
    ),
    "pipelines": ("cuda", "augment", "batch", "order", "arrays", "prefetch", "loaders", "backends", "reading", ""),
    "semi_fast": (
        *("processes", "parts", "memory_bank", "methods", "policies", "nets", "config", "digits", "training"),
        *("observe", "run", "reporting", "commands", "train", "__main__"),
    ),
}
MAY_IMPORT = {
    "data_prep": {"data_prep"},
    "pipelines": {"pipelines", "data_prep"},
    "semi_fast": {"semi_fast", "pipelines", "data_prep"},
}
#: What semi_fast may use of the package that knows files of data sets. Data folders it reads through pipelines.
DATA_PREP_OF_SEMI_FAST = {"data_prep.errors", "data_prep.files", "data_prep.cores", "data_prep.memory"}
#: What builds the embedded data set may use more.
BUILDS = {"data_prep.work.builder", "data_prep.folder.manifest"}
#: What only processes/ may use.
DISTRIBUTED = "torch.distributed"


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file, of every file of a package."""
    files = sorted((root / package).rglob("*.py"))
    assert files
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(path: Path) -> set[str]:
    """Everything a file imports, inside functions too, as `module` or `module.name`; but not for type checks alone."""
    names: set[str] = set()
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return names


def attributes(path: Path) -> set[str]:
    """Every `a.b.c` that a file speaks of."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def arrows(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    modules = modules_of(root, package)

    def target(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {found for name in imports(file) if (found := target(name)) and found != module}
        for module, file in modules.items()
    }


def room(module: str) -> str:
    """The first name behind the package's."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_package_imports_one_above_it(root, package):
    for module, file in modules_of(root, package).items():
        packages = {name.partition(".")[0] for name in imports(file)} & MAY_IMPORT.keys()
        assert packages <= MAY_IMPORT[package], f"{module} imports {packages - MAY_IMPORT[package]}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_files_import_each_other_in_a_circle(root, package):
    try:
        TopologicalSorter(arrows(root, package)).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_room_imports_one_above_it(root, package):
    floors = {name: floor for floor, name in enumerate(ROOMS[package])}
    for module, targets in arrows(root, package).items():
        for target in targets:
            if room(target) or package == "pipelines":
                assert floors[room(target)] <= floors.get(room(module), len(floors)), f"{module} imports {target}"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_every_file_is_in_a_known_room(root, package):
    assert {room(module) for module in modules_of(root, package)} - {""} == set(ROOMS[package]) - {""}


def test_semi_fast_opens_no_data_file(root):
    for module, file in modules_of(root, "semi_fast").items():
        parts = {name for name in imports(file) if name.startswith("data_prep.")}
        known = DATA_PREP_OF_SEMI_FAST | (BUILDS if module == "semi_fast.digits" else set())
        strangers = {name for name in parts if not any(name.startswith(allowed) for allowed in known)}
        assert not strangers, f"{module} imports {strangers}"
        assert not {"np.load", "np.memmap", "numpy.load"} & attributes(file), f"{module} opens an array"


def test_only_processes_know_torch_distributed(root):
    for module, file in modules_of(root, "semi_fast").items():
        if room(module) != "processes":
            names = imports(file) | attributes(file)
            assert not any(name.startswith(DISTRIBUTED) for name in names), f"{module} uses {DISTRIBUTED}"


def test_only_method_files_lie_beside_the_methods(root):
    from semi_fast.methods import method_names

    names = {file.stem for file in (root / "semi_fast/methods").iterdir() if file.suffix == ".py"}
    assert names == {"__init__", "base", *method_names()}


def test_no_method_is_known_outside_of_its_file(root):
    from semi_fast.methods import method_names

    for package in ("semi_fast", "pipelines"):
        for module, file in modules_of(root, package).items():
            if room(module) != "methods":
                nodes = ast.walk(ast.parse(file.read_text()))
                texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
                named = texts & set(method_names()) - {default_method(file)}
                assert not named, f"{module} names {named}"


def default_method(file: Path) -> str:
    """The settings have one method as their default."""
    from semi_fast.config import MethodSettings

    return MethodSettings().name if file.name == "config.py" else ""


def test_data_prep_does_not_know_torch(root):
    for module, file in modules_of(root, "data_prep").items():
        tree = ast.parse(file.read_text())
        top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        top |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom)}
        assert not top & {"torch", "ffcv"}, f"{module} imports torch or ffcv at its top"


def test_cores_are_counted_in_one_place(root):
    files = {module: file for package in MAY_IMPORT for module, file in modules_of(root, package).items()}
    counting = {module for module, file in files.items() if "os.sched_getaffinity" in attributes(file)}
    assert counting == {"data_prep.cores"}


def test_no_module_hides_a_library(root):
    libraries = set(sys.stdlib_module_names) | {
        "torch", "numpy", "ffcv", "wandb", "accelerate", "nvidia", "numba", "yaml", "PIL", "rich", "typer", "pooch",
    }  # fmt: skip
    for package in MAY_IMPORT:
        for path in (root / package).iterdir():  # a script started by path has its own folder first on the path
            assert path.stem not in libraries, f"{path.relative_to(root)} hides the library {path.stem}"
