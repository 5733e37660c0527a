"""What a run survives: full disks and a tracker that dies; and what it does not: numbers that are not finite."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch

from semi_fast.run import log as run_log
from semi_fast.run.checkpoint import list_checkpoints, newest_checkpoint
from semi_fast.run.log import LogWriter
from semi_fast.train import cli, main
from semi_fast.training.guard import Guard

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def arguments(data, run_dir, *more):
    small = ["steps=12", "batch=2", "log_every=4", "eval_every=6", "save_every=3", "wandb=off", "threads=1"]
    return ["digits_lt", f"data={data}", f"run_dir={run_dir}", "method=supervised", *small, *more]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fault_at(monkeypatch, *steps):
    """The loss of these steps (counted from 1 in the session) is NaN, with its gradients."""
    original, done = Guard.judge, [0]

    def judge(self, loss, logs):
        done[0] += 1
        if done[0] in steps:
            for parameter in self._parameters:
                parameter.grad.mul_(math.nan)
            loss, logs = loss * math.nan, {**logs, "loss/labeled": logs["loss/labeled"] * math.nan}
        return original(self, loss, logs)

    monkeypatch.setattr(Guard, "judge", judge)


def test_a_line_is_written_whole_or_not_at_all_and_trouble_is_said_once(tmp_path, monkeypatch):
    said, path, write = [], tmp_path / "log.jsonl", os.write
    log = LogWriter(path, said.append)
    log.write({"step": 1})

    def half(handle, data):
        if len(data) < 8:
            full()
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(run_log.os, "write", half)
        log.write({"step": 2})
        log.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n'
    log.write({"step": 4})
    log.write({"step": 5})
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n{"step": 5}\n'
    assert said == [
        f"warning: {path} cannot be written (No space left on device); training goes on without it.",
        f"{path} can be written again; 2 lines are missing",
    ]


def test_cutting_keeps_the_lines_up_to_a_step_and_drops_what_is_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    log = LogWriter(path, print)
    log.cut(3)
    path.write_bytes(b'{"step": 2}\n{"step": 4}\n[1]\n{"kind": "train"}\n{"step": 3}\n\xff\xfe\n{"step"')
    log.cut(3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'
    log.cut(0)
    assert path.read_text() == ""


def test_a_disk_that_is_full_for_a_while_costs_lines_and_checkpoints(tiny_folder, tmp_path, monkeypatch, capsys):
    class Disk:
        """Full for everything a run writes between steps 3 and 8."""

        full = False

    def unless_full(function):
        return lambda *args, **kwargs: full() if Disk.full else function(*args, **kwargs)

    from semi_fast.run import checkpoint
    from semi_fast.run.run import Run

    tick = Run.tick

    def at(self, step, *rest):
        Disk.full = 3 <= step <= 8
        tick(self, step, *rest)

    monkeypatch.setattr(Run, "tick", at)
    monkeypatch.setattr(run_log, "_append", unless_full(run_log._append))
    monkeypatch.setattr(checkpoint, "save_file", unless_full(checkpoint.save_file))
    assert main(arguments(tiny_folder, tmp_path / "run")).steps == 12
    out = capsys.readouterr().out
    assert out.count("log.jsonl cannot be written (No space left on device)") == 1
    assert "log.jsonl can be written again; " in out
    assert "no checkpoint of step 3: the disk is full" in out
    assert [path.name[-2:] for path in list_checkpoints(tmp_path / "run/checkpoints")] == ["09", "12"]
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert sorted({entry["step"] for entry in entries}) == [9, 12]


def test_a_summary_without_room_ends_in_one_line_and_the_same_command_writes_it(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    replace = os.replace

    def no_summary(source, target):
        return full() if Path(target).name == "summary.json" else replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_summary)
        assert cli(arguments(tiny_folder, tmp_path / "run")) == 2
    captured = capsys.readouterr()
    assert "accuracy: last" in captured.out, "the figures are not lost"
    assert captured.err.startswith("error: Training is done, but its results cannot be written to")
    assert captured.err.count("\n") == 1
    assert cli(arguments(tiny_folder, tmp_path / "run")) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 12


def test_a_tracker_that_dies_in_mid_run_is_said_and_left_behind(tiny_folder, tmp_path, monkeypatch, capsys):
    import wandb

    class Dying:
        url, id, calls = "nowhere", "1", 0

        def __getattr__(self, name):
            def call(*args, **kwargs):
                Dying.calls += 1
                if Dying.calls > 4:
                    raise BrokenPipeError(errno.EPIPE, "the service is gone")

            return call

    monkeypatch.setattr(wandb, "init", lambda **_: Dying())
    argv = [text for text in arguments(tiny_folder, tmp_path / "run") if text != "wandb=off"]
    assert cli([*argv, "wandb=offline", "log_every=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("the service is gone") == 1
    assert Dying.calls == 5, "it is not asked again"
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"train"' in line]) == 12


def test_a_diverged_run_stops_and_names_step_part_and_last_good_checkpoint(tiny_folder, tmp_path, monkeypatch, capsys):
    fault_at(monkeypatch, 8)
    assert cli(arguments(tiny_folder, tmp_path / "run", "log_every=3")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The loss is not finite at step 8: loss/labeled = nan. The last good checkpoint is ")
    assert f"{tmp_path / 'run/checkpoints/step-000000006'}. Go on from there with on_nonfinite=skip" in error
    assert error.count("\n") == 1
    assert newest_checkpoint(tmp_path / "run/checkpoints").step == 6
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert max(steps) == 6, "nothing of a diverged model is logged or evaluated"


def test_after_a_stop_the_run_goes_on_past_the_fault_by_skipping(tiny_folder, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        fault_at(patch, 8)
        assert cli(arguments(tiny_folder, tmp_path / "run")) == 2
    with monkeypatch.context() as patch:
        fault_at(patch, 2)  # the same step: the session starts after step 6
        assert cli(arguments(tiny_folder, tmp_path / "run", "on_nonfinite=skip")) == 0
    out = capsys.readouterr().out
    assert "resumed at step 6" in out
    assert "12 steps (1 of them skipped)" in out
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps_skipped"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    counts = {line["step"]: line.get("guard/skipped") for line in lines if line["kind"] == "train"}
    assert counts[9] == counts[12] == 1.0
    last = newest_checkpoint(tmp_path / "run/checkpoints")
    assert last.values["skipped"] == 1
    assert all(tensor.isfinite().all() for group in last.tensors.values() for tensor in group.values())


def test_without_a_fault_skip_and_stop_train_the_same_to_the_bit(tiny_folder, tmp_path):
    for policy in ("stop", "skip"):
        main(arguments(tiny_folder, tmp_path / policy, "method=semi", f"on_nonfinite={policy}"))
    one, two = (newest_checkpoint(tmp_path / policy / "checkpoints").tensors for policy in ("stop", "skip"))
    for group, named in one.items():
        assert all(torch.equal(tensor, two[group][name]) for name, tensor in named.items())


def test_weights_that_overflow_in_the_last_update_are_not_saved(tiny_folder, tmp_path, capsys):
    argv = arguments(tiny_folder, tmp_path / "run", "optim.lr=1e38", "save_every=1", "log_every=1", "eval_every=1")
    assert cli(argv) == 2
    error = capsys.readouterr().err
    assert "not finite" in error
    assert "No checkpoint had been saved" in error or "The last good checkpoint is" in error
    saved = list_checkpoints(tmp_path / "run/checkpoints")
    for path in saved:
        tensors = newest_checkpoint(path.parent).tensors
        assert all(tensor.isfinite().all() for tensor in tensors["model"].values())
