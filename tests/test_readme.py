"""The README tells the truth: its commands parse, its folders are the real ones."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from semi_fast.commands.dashboard import sections
from semi_fast.config import load_settings
from semi_fast.methods import check_options, method_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
LAUNCH = "accelerate launch --config_file accelerate.yaml semi_fast/train.py"
# First words of the commands that this file or tests/semi_fast/test_processes.py checks, and of those that set up.
CHECKED = (LAUNCH, "python data_prep/build.py ", "python -m semi_fast ", "python -m benchmarks.", "make ")
ELSEWHERE = ("accelerate launch --multi_gpu ", "torchrun ", "ACCELERATE_USE_CPU=true torchrun ")
SHELL = ("(cd photos && echo path,label ", "awk 'NR == 1 ")  # run by tests/semi_fast/test_own_images_page.py
SET_UP = ("source .venv/bin/activate", "python3 -m venv .venv && ")


def command_lines() -> list[str]:
    """The command lines in the bash blocks of README and docs/, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGES, flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def commands(prefix: str) -> list[str]:
    """Arguments of the command lines that start with `prefix`."""
    found = [line.removeprefix(prefix).strip() for line in command_lines() if line.startswith(prefix)]
    assert found, f"no page has a command that starts with {prefix}"
    return found


def test_every_command_is_one_that_is_checked():
    assert [line for line in command_lines() if not line.startswith(CHECKED + ELSEWHERE + SHELL + SET_UP)] == []


@pytest.mark.parametrize("arguments", commands(LAUNCH))
def test_training_commands_are_valid(arguments):
    if arguments != "--help":
        load_settings(shlex.split(arguments))


def test_the_launcher_says_nothing_about_defaults(tmp_path):
    """The command of the Makefile, with a script that prints nothing; that of the README has the same options."""
    (line,) = re.findall(r"accelerate (launch .*) semi_fast/train.py", (ROOT / "Makefile").read_text())
    assert f"accelerate {line} semi_fast/train.py".replace(" --quiet", "") == LAUNCH
    (tmp_path / "empty.py").touch()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *shlex.split(line)]
    done = subprocess.run([*command, str(tmp_path / "empty.py")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def check_command(app: typer.Typer, program: str, arguments: str) -> None:
    """Raise where a command of a typer application does not parse."""
    name, *rest = shlex.split(arguments)
    group = typer.main.get_command(app)
    with group.make_context(program, [name, *rest]) as context:
        command = group.get_command(context, name)
        assert command is not None, f"{program} has no command {name}"
        command.make_context(name, rest).close()


@pytest.mark.parametrize("arguments", commands("python data_prep/build.py"))
def test_build_commands_are_valid(arguments):
    from data_prep.build import app

    check_command(app, "build.py", arguments)


@pytest.mark.parametrize("arguments", commands("python -m semi_fast "))
def test_commands_beside_training_are_valid(arguments):
    from semi_fast.__main__ import app

    check_command(app, "semi_fast", arguments)


@pytest.mark.parametrize("text", sorted(set(re.findall(r"`method\.([\w.=]+)`", (ROOT / "docs/semi.md").read_text()))))
def test_options_of_semi_exist(text):
    name, _, value = text.partition("=")
    assert name in check_options("semi", {})
    if value and value != "n":
        check_options("semi", {name: yaml.safe_load(value)})


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


def test_the_sections_of_the_dashboard_are_named():
    rows = (ROOT / "docs/training.md").read_text().split("| section | what it answers |")[1]
    assert re.findall(r"^\| ([^|]+) \|", rows, flags=re.MULTILINE) == list(sections())


def test_every_method_is_in_the_table():
    table = README.split("| `method=` |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == method_names()


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
