"""A sweep trains every cell once, survives what fails, goes on where it stood, and says what it compared."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from data_prep.errors import UserError
from data_prep.folder.manifest import Manifest, read_manifest
from data_prep.recipes.catalog import long_tail
from data_prep.work.builder import build_dataset
from semi_fast.commands import sweep, sweep_processes
from semi_fast.commands.sweep_processes import choose_devices, run_all
from semi_fast.config import load_settings
from semi_fast.reporting.sweep_table import make_row, ratio, write_table

SHORT = ["steps=4", "batch=16", "log_every=2", "eval_every=2", "save_every=2", "wandb=off"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "digits-lt"
    build_dataset("digits-lt", folder, progress=False, say=lambda line: None)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "fixmach"], "Unknown method 'fixmach'. Did you mean 'fixmatch'"),
        (["--methods", "semi,semi"], "--methods takes different names"),
        (["--methods", ""], "--methods takes different names"),
        (["--seeds", "0,one"], "--seeds takes whole numbers from 0"),
        (["seed=3"], "Use --seeds"),
        (["method.name=semi"], "Use --methods"),
        (["run_dir=x"], "Use --out"),
        (["stepz=3"], "Did you mean 'steps'"),
        (["method.tau=0.9", "--methods", "supervised,semi"], "Unknown option of method 'supervised' 'tau'"),
        (["data=no/such/set"], "No data set at no/such/set"),
        (["--devices", "99"], "--devices reads auto, cpu, or GPUs such as 0,1, got '99'"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_trained(arguments, message, tmp_path, capsys):
    if not any(argument.startswith("data=") for argument in arguments):
        arguments = [*arguments, f"--out={tmp_path / 'out'}"]
    assert sweep.cli(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


STAND_IN = """
import json, pathlib, sys
prepared, *arguments = sys.argv[1:]
place = pathlib.Path(json.loads(arguments[-1].removeprefix("run_dir=")))
source = pathlib.Path(prepared) / place.name
if not source.exists():
    sys.exit("error: nothing prepared")
for path in source.iterdir():
    (place / path.name).write_bytes(path.read_bytes())
print("trained", place.name)
"""


def test_cells_that_are_finished_are_kept_and_the_others_trained_again(digits, tmp_path, capfd, monkeypatch):
    """With a stand-in for training that finishes the runs prepared for it and fails with the others."""
    out, prepared = tmp_path / "out", tmp_path / "prepared"
    monkeypatch.setattr(sweep_processes, "COMMAND", [sys.executable, "-c", STAND_IN, str(prepared)])
    settings = [f"data={digits}", "steps=4"]
    command = [*settings, "--methods", "supervised,fixmatch", "--seeds", "0,1", "--out", str(out)]
    _, cells = sweep.plan(settings, ["supervised", "fixmatch"], [0, 1], str(out))
    assert [cell.name for cell in cells] == [f"{m} seed {s}" for s in (0, 1) for m in ("supervised", "fixmatch")]
    made = {"data_fingerprint": read_manifest(digits).fingerprint}
    for number, cell in enumerate(cells[:3]):
        (prepared / cell.folder.name).mkdir(parents=True)
        (prepared / cell.folder.name / "config.yaml").write_text(yaml.safe_dump(cell.settings.model_dump()))
        (prepared / cell.folder.name / "summary.json").write_text(json.dumps(summary(50.0 + number) | made))

    assert sweep.cli(command) == 1
    said = capfd.readouterr()
    assert "failed: fixmatch seed 1, exit code 1: error: nothing prepared" in said.err
    assert said.out.count(" starts on the CPU") == 4
    assert "| `fixmatch` | 0 (1 of 2) | 51.00 |" in said.out
    assert "| `supervised` | 0, 1 | 51.00 ± 1.41 |" in said.out

    assert sweep.cli(command) == 1
    assert capfd.readouterr().out.count(" starts on the CPU") == 1
    assert sweep.cli([*command, "steps=6"]) == 2
    assert "holds a run of other settings (steps: now 6, saved 4)" in capfd.readouterr().err
    damaged = out / "fixmatch-seed0" / "summary.json"
    damaged.write_text(json.dumps(summary(51.0) | {"data_fingerprint": "other"}))
    assert sweep.cli(command) == 2
    assert "does not hold the data of that run" in capfd.readouterr().err
    damaged.write_text("{")
    assert sweep.cli(command) == 2
    assert "is damaged" in capfd.readouterr().err


@pytest.mark.slow
def test_a_sweep_survives_a_cell_that_fails_and_goes_on_with_it(digits, tmp_path, capfd, root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    out = tmp_path / "out"
    command = [f"data={digits}", *SHORT, "--methods", "supervised", "--seeds", "0,1", "--out", str(out)]
    (out / "supervised-seed0").mkdir(parents=True)
    (out / "supervised-seed0" / "log.jsonl").mkdir()  # where a file is to be written
    assert sweep.cli(command) == 1
    said = capfd.readouterr()
    assert "failed: supervised seed 0, exit code 2: error: Cannot write to the run's folder" in said.err
    assert "| `supervised` | 1 (1 of 2) |" in said.out

    (out / "supervised-seed0" / "log.jsonl").rmdir()
    kept = (out / "supervised-seed1" / "log.jsonl").stat().st_mtime_ns
    assert sweep.cli(command) == 0
    said = capfd.readouterr()
    assert "2 cells, 1 finished" in said.out
    assert "| `supervised` | 0, 1 |" in said.out
    assert (out / "supervised-seed1" / "log.jsonl").stat().st_mtime_ns == kept
    assert "accuracy: best" in (out / "supervised-seed0" / "console.txt").read_text()
    (row,) = json.loads((out / "results.json").read_text())
    summaries = [json.loads((out / f"supervised-seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert row["figures"]["accuracy_last"]["mean"] == pytest.approx(sum(s["accuracy_last"] for s in summaries) / 2)
    assert row["protocol"]["labeled"] == 118

    assert sweep.cli([*command, "steps=6"]) == 2
    assert "holds a run of other settings (steps: now 6, saved 4)" in capfd.readouterr().err


def test_runs_share_the_devices_and_a_failing_one_ends_alone(tmp_path, monkeypatch):
    script = (
        "import os, sys, time; name = sys.argv[1]; print(os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[2:]);"
        "time.sleep(0.3); sys.exit('broken' if name == 'b' else 0)"
    )
    monkeypatch.setattr(sweep_processes, "COMMAND", [sys.executable, "-c", script])
    jobs = [(name, [name], tmp_path / name / "console.txt") for name in "abcd"]
    seen = []
    outcomes = run_all(jobs, ["3", "5"], seen.append)
    assert outcomes.signum is None
    assert {o.name: o.code for o in outcomes.ended} == {"a": 0, "b": 1, "c": 0, "d": 0}
    assert [o.last_words for o in outcomes.ended if o.code] == ["broken"]
    assert seen == outcomes.ended
    used = [(tmp_path / name / "console.txt").read_text().split() for name in "abcd"]
    assert {device for device, *_ in used} == {"3", "5"}
    assert all(rest[0].startswith("threads=") for _, *rest in used), "several runs share the cores"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_runs_and_starts_no_further_one(tmp_path, monkeypatch, signum):
    script = (
        f"import signal, sys, time; signal.signal({int(signum)}, lambda *_: sys.exit(77));"
        "print('ready'); time.sleep(60)"
    )
    monkeypatch.setattr(sweep_processes, "COMMAND", [sys.executable, "-c", script])
    log = tmp_path / "a" / "console.txt"

    def send_when_ready():
        while not (log.exists() and "ready" in log.read_text()):
            pass
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    outcomes = run_all([("a", [], log), ("b", [], tmp_path / "b" / "console.txt")], [], lambda outcome: None)
    sender.join()
    assert outcomes.signum == signum
    assert [(o.name, o.code) for o in outcomes.ended] == [("a", 77)]


def test_a_second_sweep_waits_for_the_runs_of_a_killed_one(tmp_path):
    with sweep.sweep_lock(tmp_path):
        left_behind = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
        with pytest.raises(UserError, match="is at work in"), sweep.sweep_lock(tmp_path):
            pass
    with pytest.raises(UserError, match="or a run that one started"), sweep.sweep_lock(tmp_path):
        pass
    left_behind.communicate(b"\n")
    with sweep.sweep_lock(tmp_path):
        pass


def test_the_gpus_of_a_machine(monkeypatch):
    monkeypatch.setattr(sweep_processes.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_devices("auto") == ["0", "1"]
    assert choose_devices("1") == ["1"]
    assert choose_devices("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert choose_devices("auto") == ["4", "7"]
    with pytest.raises(UserError, match="has GPUs 4, 7"):
        choose_devices("0")


def summary(last):
    return {
        "accuracy_last": last, "accuracy_mean20": last - 1, "accuracy_best": last + 1,
        "groups": {"many": 90.0, "medium": 70.0, "few": last - 20},
        "heads": {"ema/balanced": last, "ema/standard": 1.0},
    }  # fmt: skip


def test_the_table_has_mean_deviation_and_the_papers_figure(tmp_path, digits):
    split = long_tail("cifar10-lt").options()
    known = read_manifest(digits).model_dump() | {"name": "cifar10-lt", "resolution": 32, "split": split}
    settings = load_settings(["cifar10_lt", "method=semi", "steps=1000"])
    row = make_row(settings, Manifest(**known), [(0, summary(80.0)), (1, summary(83.0)), (2, summary(84.5)), (3, None)])
    write_table(tmp_path, [row, make_row(load_settings(["method=fixmatch"]), read_manifest(digits), [(0, None)])])
    text = (tmp_path / "results.md").read_text()
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == [
        "`semi`", "0, 1, 2 (3 of 4)", "82.50 ± 2.29", "81.50 ± 2.29", "83.50 ± 2.29", "90.0 / 70.0 / 62.5",
        "80.3 ± 0.41 (Table 1)", "+2.20",
    ]  # fmt: skip
    assert "cifar10-lt at 32 px, 118 labeled (imbalance 10), 564 unlabeled (imbalance 10); wrn28_2" in text
    assert "1,000 steps of 64 labeled and 64 unlabeled images" in text
    assert "evaluated: ema/balanced" in text
    semi, fixmatch = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert float(semi["accuracy_last_std"]) == pytest.approx(2.2913, abs=1e-4)
    assert (semi["paper"], semi["paper_table"], fixmatch["accuracy_last"], fixmatch["paper"]) == ("80.3", "1", "", "")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries[0]["accuracies"]["1"]["accuracy_best"] == 84.0
    assert entries[0]["protocol"]["split"] == split
    assert entries[1]["missing"] == [0]


def test_imbalance_is_first_to_last_class():
    assert [ratio(c) for c in ([500, 50, 5], [40, 4000], [3, 3], [5, 0])] == ["100", "1/100", "1", "n/a"]


def test_the_readme_names_a_sweep_that_parses():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("python -m semi_fast sweep ")]
    assert lines
    for line in lines:
        given = sweep.parse(line.split("  #")[0].split()[3:])
        _, cells = sweep.plan(
            given.settings, sweep.split_list(given.methods, "--methods"), sweep.seeds_of(given.seeds), given.out
        )
        assert len(cells) == 9
