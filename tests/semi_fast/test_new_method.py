"""A method as somebody would add it: one file on the methods' path, and not a line changed elsewhere."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from semi_fast import methods
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from semi_fast.train import main
from tests.conftest import ROOT
from tests.semi_fast.outcome import assert_same, outcome

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

METHOD = re.search(r"```python\n(.*?)```", (ROOT / "docs/methods.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


@pytest.fixture
def selftrain(tmp_path, monkeypatch):
    folder = tmp_path / "more_methods"
    folder.mkdir()
    (folder / "selftrain.py").write_text(METHOD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield "selftrain"
    sys.modules.pop("semi_fast.methods.selftrain", None)


def arguments(data, run_dir, *more):
    small = ["steps=12", "batch=4", "log_every=3", "eval_every=4", "save_every=3", "wandb=off", "threads=1", "keep=9"]
    return ["digits_lt", f"data={data}", f"run_dir={run_dir}", "method=selftrain", "ceiling=off", *small, *more]


class KilledError(Exception):
    pass


def train_until(monkeypatch, step, argv, *, within=False):
    """Die after `step` steps and what is due then, or within the beginning of the stage that follows."""

    def tick(self, now):
        original(self, now)
        if now == step and not within:
            raise KilledError

    def restart(self):
        raise KilledError

    original = Run.tick
    with monkeypatch.context() as patch:
        patch.setattr(Run, "tick", tick)
        if within:
            patch.setattr("semi_fast.training.look.RunLook.restart", restart)
        with pytest.raises(KilledError):
            main(argv)


def test_it_trains_relabels_restarts_and_goes_on_to_the_bit_from_anywhere(digits, tmp_path, monkeypatch, selftrain):
    main(arguments(digits, tmp_path / "whole"))
    expected = outcome(tmp_path / "whole")
    for name, step, within in (("before", 5, False), ("at", 6, False), ("within", 6, True), ("behind", 10, False)):
        argv = arguments(digits, tmp_path / name)
        train_until(monkeypatch, step, argv, within=within)
        main(argv)
        assert_same(outcome(tmp_path / name), expected)


def test_two_processes_do_what_one_does_with_the_same_global_batch(digits, root, tmp_path, selftrain):
    """Relabelling, a restart, frozen parts, balanced and common streams, draws; up to rounding, see test_processes."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.semi_fast.process_runs", str(tmp_path), str(digits)]
    done = subprocess.run(
        [*command, str(tmp_path / "more_methods"), "selftrain"],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(alone["labeled"]) == 118 + 5
    for group in ("method", "ema"):
        for key, value in alone[group].items():
            assert torch.equal(first[group][key], second[group][key]), key
            torch.testing.assert_close(first[group][key], value, rtol=1e-3, atol=1e-3)
    assert torch.equal(first["labeled"], second["labeled"])
    assert torch.equal(first["labeled"], alone["labeled"])


def test_what_its_stage_did_is_in_the_checkpoints(digits, tmp_path, selftrain):
    main(arguments(digits, tmp_path / "run"))
    start, before, after = (load_checkpoint(tmp_path / f"run/checkpoints/step-{step:09d}") for step in (3, 6, 9))
    assert "labeled" not in before.tensors
    assert len(after.tensors["labeled"]["rows"]) == 118 + 5
    assert after.values["restarted"] == 6
    assert after.tensors["model"]["evaluations"] == 2
    assert after.tensors["model"]["chosen"].sum() == pytest.approx(1.0)
    frozen = "net.stem.weight"
    assert not torch.equal(start.tensors["model"][frozen], before.tensors["model"][frozen])
    last = load_checkpoint(tmp_path / "run/checkpoints/step-000000012")
    assert torch.equal(after.tensors["model"][frozen], last.tensors["model"][frozen]), "frozen since the restart"
    assert not torch.equal(after.tensors["model"]["heads.first.weight"], last.tensors["model"]["heads.first.weight"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["head"], summary["weights"]) == ("first", "raw")
    assert summary["accuracy_last"] == summary["heads"]["raw/first"]


def test_report_and_dashboard_show_its_figures(digits, tmp_path, selftrain):
    from semi_fast.commands.dashboard import as_json, build_workspace
    from semi_fast.reporting import write_report

    main(arguments(digits, tmp_path / "run"))
    page = write_report([tmp_path / "run"]).read_text()
    for text in ("Mean of the numbers drawn for a step.", "Share of each class among the images chosen half-way."):
        assert text in page
    assert "selftrain/noise" in as_json(build_workspace("entity", "project"))
