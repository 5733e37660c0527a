"""Training killed (-9) at random moments, within saves too, and gone on with each time: the same weights to the bit."""

import signal
import subprocess
import sys
import time
from random import Random

import pytest

from semi_fast.methods import method_names
from tests.semi_fast.killing import random_moment, run_session
from tests.semi_fast.outcome import assert_same, need, outcome
from tests.semi_fast.tiny import tiny_method

KILLS, STEPS = 20, 24
# A method that relabels and restarts between its stages.
STAGED = next(name for name in method_names() if tiny_method(name).relabels and len(tiny_method(name).starts()) > 1)


def arguments(data, run_dir, *more):
    small = ["batch=2", "log_every=6", "eval_every=8", "save_every=3", "wandb=off", "threads=1", "net=wrn10_1"]
    return ["digits_lt", f"data={data}", f"run_dir={run_dir}", f"steps={STEPS}", *small, *more]


def kill_and_go_on(session, folder, kills, random):
    """Start runs and kill their sessions until so many are dead, then let the last run end; returns the runs' folders.

    `session(folder, moment)` returns an exit code; with moment None it is not killed.
    """
    folders, dead = [folder / "run0"], []
    while len(dead) < kills:
        moment = random_moment(random)
        code = session(folders[-1], moment)
        assert code in (0, -signal.SIGKILL)
        if code:
            dead.append(moment)
        if (folders[-1] / "summary.json").exists():  # it came to its end before its moment, or died behind it
            folders.append(folder / f"run{len(folders)}")
    if not (folders[-1] / "summary.json").exists():
        assert session(folders[-1], None) == 0
    assert sum(moment.operation is not None for moment in dead) >= kills // 4
    assert sum(moment.operation is None for moment in dead) >= kills // 4
    return folders


@pytest.mark.parametrize(
    ("backend", "method", "kills"),
    [
        ("resident", "semi", KILLS),
        ("resident", STAGED, 8),
        pytest.param("ffcv", "semi", 6, marks=pytest.mark.slow),  # imports FFCV in every session
        pytest.param("dali", "semi", 6, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_come_to_the_weights_of_an_uninterrupted_one(tiny_folder, tmp_path, backend, method, kills):
    need(backend)

    def session(folder, moment):
        return run_session(arguments(tiny_folder, folder, f"data.backend={backend}", f"method={method}"), moment)

    assert session(tmp_path / "whole", None) == 0
    whole = outcome(tmp_path / "whole")
    for folder in kill_and_go_on(session, tmp_path, kills, Random(0)):
        assert_same(outcome(folder), whole)
        assert not list((folder / "checkpoints").glob("*.tmp-*")), "leftovers are cleared at the end at the latest"
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {
            path.name for path in (tmp_path / "whole/checkpoints").iterdir()
        }


@pytest.mark.slow
def test_the_command_itself_killed_at_any_moment(root, tiny_folder, tmp_path):
    random = Random(1)

    def session(folder, seconds):
        command = [sys.executable, str(root / "semi_fast/train.py"), *arguments(tiny_folder, folder), "steps=240"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    start = time.monotonic()
    assert session(tmp_path / "whole", None) == 0
    longest = time.monotonic() - start  # of a session
    whole, kills, folders = outcome(tmp_path / "whole"), 0, [tmp_path / "run0"]
    while kills < KILLS:
        code = session(folders[-1], random.uniform(0.3, 1) * longest)  # before 0.3 nothing but imports
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if (folders[-1] / "summary.json").exists():
            folders.append(tmp_path / f"run{len(folders)}")
    if not (folders[-1] / "summary.json").exists():
        assert session(folders[-1], None) == 0
    for folder in folders:
        assert_same(outcome(folder), whole)
