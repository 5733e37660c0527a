"""W&B: online only when somebody is logged in and the server answers; never a long wait."""

import signal
import socket
from unittest.mock import MagicMock

import pytest

from semi_fast.observe import tracking
from semi_fast.observe.tracking import open_tracker, why_offline
from tests.semi_fast.killing import Moment, run_session
from tests.semi_fast.trained_runs import log_lines
from tests.semi_fast.wandb_file import read_piece


@pytest.fixture
def clean(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


def open_it(mode, folder):
    said = []
    tracker = open_tracker(mode, project="p", name="n", folder=folder, config={"a": 1}, say=said.append)
    return tracker, said


def test_off_is_a_twin_that_does_nothing(clean):
    tracker, said = open_it("off", clean)
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert said == []
    assert list(clean.iterdir()) == []


def test_nobody_logged_in_gives_an_offline_run_with_its_files(clean):
    tracker, said = open_it("auto", clean)
    tracker.log({"loss/total": 1.0}, 1)
    tracker.finish()
    assert len(said) == 1
    assert said[0].startswith("wandb: offline (nobody is logged in)")
    assert list(clean.glob("wandb/offline-run-*/*.wandb"))


def test_environment_can_switch_it_off(clean, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert open_it("auto", clean)[1] == []
    assert list(clean.iterdir()) == []


def test_a_key_in_the_netrc_file_counts_as_logged_in(clean, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    (clean / "netrc").write_text("machine 127.0.0.1\n  login user\n  password key\n")
    assert why_offline().startswith("127.0.0.1 does not answer")


def test_a_server_that_does_not_answer_means_offline(clean, monkeypatch):
    with socket.socket() as closed:  # a port nobody listens on
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    tracker, said = open_it("online", clean)
    tracker.finish()
    assert said[0].startswith("wandb: offline (127.0.0.1 does not answer")


def test_a_start_that_fails_falls_back_to_offline(clean, monkeypatch):
    import wandb

    real, modes = wandb.init, []

    def init(**arguments):
        modes.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("Run initialization has timed out")
        return real(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "why_offline", lambda: "")
    tracker, said = open_it("auto", clean)
    tracker.finish()
    assert modes == ["online", "offline"]
    assert "timed out" in said[0]


def test_the_end_of_a_run_does_not_wait_for_a_lost_server_without_end(clean, monkeypatch):
    import wandb

    seen = []

    def init(**arguments):
        seen.append(arguments["settings"])
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", init)
    _, said = open_it("offline", clean)
    assert list(clean.glob("wandb/*")) == []
    assert said == ["wandb: off (no room)"]
    assert 0 < seen[0].finish_timeout <= 300


def test_a_killed_run_that_goes_on_is_one_run_with_every_step_once(tiny_folder, clean):
    """Both offline pieces are read back; `wandb sync` adds the second one to the first."""
    small = ["batch=2", "method=fixmatch", "net=wrn10_1", "threads=1", "wandb=offline", "ceiling=off"]
    every = ["steps=12", "log_every=1", "save_every=4", "eval_every=6"]
    argv = ["digits_lt", f"data={tiny_folder}", f"run_dir={clean}/run", *small, *every]
    assert run_session(argv, Moment(step=8, pause=1)) == -signal.SIGKILL  # 7 steps are logged; step 4 is saved
    assert run_session(argv) == 0

    pieces = [read_piece(path) for path in sorted((clean / "run/wandb").glob("offline-run-*"))]
    name = (clean / "run/wandb-id").read_text()
    assert [piece[:2] for piece in pieces] == [(name, True)] * 2
    rows = [row for piece in pieces for row in piece[2]]
    assert [len(piece[2]) for piece in pieces] == [7, 6]
    assert [row["_step"] for row in rows] == list(range(1, 14)), "13: the tables"
    assert [row.get("step") for row in rows] == [*range(1, 13), None]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [6, 12]
    logged = {line["step"]: line["loss/total"] for line in log_lines(clean / "run") if line["kind"] == "train"}
    assert {row["step"]: row["loss/total"] for row in rows[:12]} == pytest.approx(logged)


def test_a_run_that_starts_anew_is_another_run(clean):
    names = []
    for logged in (None, 5, None):
        tracker = open_tracker("offline", project="p", name="n", folder=clean, config={}, logged=logged)
        tracker.finish()
        names.append((clean / "wandb-id").read_text())
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"no id\n"])
def test_a_damaged_id_is_said_and_another_run_recorded(clean, content):
    (clean / "wandb-id").write_bytes(content)
    said = []
    open_tracker("offline", project="p", name="n", folder=clean, config={}, logged=5, say=said.append).finish()
    assert said[0] == f"warning: {clean}/wandb-id holds no id of W&B's; the run goes on there as another."
    assert len((clean / "wandb-id").read_text()) == 16


def test_online_the_server_knows_which_steps_it_has(clean, monkeypatch):
    """Killed after step 80 was logged, of which the server has got 70; gone on with from step 50."""
    import wandb

    rows = []

    class Resumed(MagicMock):
        resumed, step, url = True, 71, "https://wandb.test/run"

        def log(self, data, step, commit):
            rows.append((step, data["step"]))

    monkeypatch.setattr(wandb, "init", lambda **arguments: Resumed())
    monkeypatch.setattr(tracking, "why_offline", lambda: "")
    (clean / "wandb-id").write_text("abc")
    tracker = open_tracker("online", project="p", name="n", folder=clean, config={}, logged=80, say=lambda line: None)
    for step in (60, 70, 80, 90):
        tracker.log({"loss/total": 1.0}, step)
    assert rows == [(80, 80), (90, 90)]


def test_whatever_wandb_raises_at_the_start_is_said_and_training_goes_on(clean, monkeypatch):
    import wandb

    def init(**arguments):
        raise RuntimeError("run ID abc is in use")

    monkeypatch.setattr(wandb, "init", init)
    tracker, said = open_it("offline", clean)
    tracker.log({"loss/total": 1.0}, 1)
    assert said == ["wandb: off (run ID abc is in use)"]
