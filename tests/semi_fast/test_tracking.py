"""W&B: online only when somebody is logged in and the server answers; never a long wait."""

import socket

import pytest

from semi_fast.observe import tracking
from semi_fast.observe.tracking import open_tracker, why_offline


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
