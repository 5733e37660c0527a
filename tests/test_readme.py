"""The README tells the truth: its commands parse, its file tree is the real one."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from semi_fast.config import load_settings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(prefix: str) -> list[str]:
    """Arguments of the command lines in the README's bash blocks that start with `prefix`."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    found = [line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)]
    assert found, f"the README has no command that starts with {prefix}"
    return found


@pytest.mark.parametrize("arguments", commands("accelerate launch semi_fast/train.py"))
def test_training_commands_are_valid(arguments):
    if arguments != "--help":
        load_settings(shlex.split(arguments))


@pytest.mark.parametrize("arguments", commands("python data_prep/build.py"))
def test_build_commands_are_valid(arguments):
    from data_prep.build import app

    name, *rest = shlex.split(arguments)
    group = typer.main.get_command(app)
    with group.make_context("build.py", [name, *rest]) as context:
        command = group.get_command(context, name)
        assert command is not None, f"build.py has no command {name}"
        command.make_context(name, rest).close()


@pytest.mark.parametrize("target", commands("make"))
def test_make_targets_exist(target):
    assert re.search(rf"^{target.split()[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("arguments", commands("python -m benchmarks."))
def test_benchmarks_exist(arguments):
    assert callable(importlib.import_module(f"benchmarks.{arguments.split()[0]}").main)


def tree() -> dict[str, str]:
    """Path -> description of the README's file tree; indented names belong to the folder above them."""
    block = re.search(r"## Files\n+```\n(.*?)```", README, flags=re.DOTALL)
    assert block, "the README has no file tree"
    paths, folder = {}, ""
    for line in block[1].splitlines():
        name, description = line.split(maxsplit=1)
        folder = folder if line.startswith(" ") else (name if name.endswith("/") else "")
        paths[name if name == folder else folder + name] = description
    return paths


def test_the_file_tree_lists_what_there_is():
    listed = tree()
    for path in listed:
        assert (ROOT / path).exists(), f"the README lists {path}, which does not exist"
    for package in ("semi_fast", "pipelines", "data_prep"):
        for path in (ROOT / package).iterdir():
            if path.name.startswith("__") or path.suffix not in ("", ".py"):
                continue
            name = f"{package}/{path.name}" + ("/" if path.is_dir() else "")
            assert name in listed, f"the README's file tree lacks {name}"


def test_the_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000


def test_the_results_name_their_settings_files():
    for path in re.findall(r"`(\w+_lt\w*)`", README):
        assert isinstance(yaml.safe_load((ROOT / "configs" / f"{path}.yaml").read_text()), dict)


def test_no_file_names_a_folder_of_the_machine_it_was_made_on():
    places = ["semi_fast", "pipelines", "data_prep", "tests", "benchmarks", "configs", "docs", ".ci"]
    files = [
        path
        for place in places
        for path in (ROOT / place).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".json", "")
    ]
    for path in [*files, *ROOT.glob("*.*"), ROOT / "Makefile"]:
        if path.is_file():
            assert f"{ROOT}/" not in path.read_text(errors="ignore"), f"{path} names a folder of this machine"
