"""The README tells the truth: its commands parse, its folders are the real ones."""

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
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])


def commands(prefix: str) -> list[str]:
    """Arguments of the command lines in the bash blocks of README and docs/ that start with `prefix`."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    found = [line.removeprefix(prefix).strip() for line in lines if line.startswith(prefix)]
    assert found, f"no page has a command that starts with {prefix}"
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


def test_the_file_tree_names_the_folders_there_are():
    block = re.search(r"## Files\n+```\n(.*?)```", README, flags=re.DOTALL)
    assert block, "the README has no file tree"
    listed, top = set(), ""
    for line in block[1].splitlines():
        names = re.findall(r"(?:^|  )(\w+/) ", line + " ")
        if line.startswith(" "):
            listed |= {top + name for name in names}
        else:
            top = names[0]
            listed |= set(names)
    assert all((ROOT / name).is_dir() for name in listed), listed
    for package in ("semi_fast", "pipelines", "data_prep"):
        rooms = {f"{package}/{path.parent.name}/" for path in (ROOT / package).glob("*/__init__.py")}
        assert rooms <= listed, f"the README's file tree lacks {rooms - listed}"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_the_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 10_000


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


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
