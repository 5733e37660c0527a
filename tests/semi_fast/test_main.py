"""One command line for what comes beside training: quick to start, and a mistake is one line."""

import shlex
import subprocess
import sys

import pytest
import typer

from semi_fast.__main__ import app
from tests.semi_fast.trained_runs import command

HEAVY = ("torch", "numpy", "matplotlib", "pydantic", "wandb", "sklearn")


def test_help_imports_nothing_heavy(root):
    code = f"import sys, semi_fast.__main__ as m; m.main(['--help']); print([n for n in {HEAVY} if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    for name in ("report", "predict", "export", "evaluate", "dashboard", "sweep"):
        assert f" {name} " in ran.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command"),
        (["predikt"], "No such command 'predikt'"),
        (["report"], "Missing argument"),
        (["predict", "runs/x"], "Missing argument"),
        (["sweep", "--seed", "1"], "No such option: --seed"),
        (["evaluate", "nowhere"], "is no run's folder"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_the_readme_s_commands_parse(root):
    start = "python -m semi_fast "
    lines = [line for line in (root / "README.md").read_text().splitlines() if line.startswith(start)]
    assert lines
    group = typer.main.get_command(app)
    for line in lines:
        name, *rest = shlex.split(line.removeprefix(start), comments=True)
        group.commands[name].make_context(name, rest).close()
