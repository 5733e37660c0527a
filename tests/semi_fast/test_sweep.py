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
from data_prep.recipes.catalog import long_tail
from data_prep.work.builder import build_dataset
from pipelines import read_info
from pipelines.reading import read_facts
from semi_fast.commands import sweep
from semi_fast.commands.sweep import Job, choose_devices, run_all
from semi_fast.config import load_settings
from semi_fast.methods import method_names
from semi_fast.reporting.paper import paper_figure
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.runlog import RunLog
from semi_fast.reporting.sweep_table import make_row, markdown, ratio, write_files
from semi_fast.run.summary import Summary
from tests.semi_fast.trained_runs import command

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
    assert command("sweep", *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


STAND_IN = """
import json, pathlib, sys
prepared, *arguments = sys.argv[1:]
folder = pathlib.Path(json.loads(arguments[-1].removeprefix("run_dir=")))
source = pathlib.Path(prepared) / folder.name
if not source.exists():
    sys.exit("error: nothing prepared")
for path in source.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
print("trained", folder.name)
"""


def test_cells_that_are_finished_are_kept_and_the_others_trained_again(digits, tmp_path, capfd, monkeypatch):
    """With a stand-in for training that finishes the runs prepared for it and fails with the others."""
    out, prepared = tmp_path / "out", tmp_path / "prepared"
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", STAND_IN, str(prepared)])
    settings = [f"data={digits}", "steps=4", "figure=mean20"]
    line = ["sweep", *settings, "--methods", "supervised,fixmatch", "--seeds", "0,1", "--out", str(out)]
    _, cells = sweep.plan(settings, "supervised,fixmatch", "0,1", out)
    assert [cell.name for cell in cells] == [f"{m} seed {s}" for s in (0, 1) for m in ("supervised", "fixmatch")]
    fingerprint = read_info(digits).fingerprint
    for number, cell in enumerate(cells[:3]):
        (prepared / cell.folder.name).mkdir(parents=True)
        (prepared / cell.folder.name / "config.yaml").write_text(yaml.safe_dump(cell.settings.model_dump()))
        (prepared / cell.folder.name / "summary.json").write_text(
            json.dumps(summary(50.0 + number, fingerprint).to_json())
        )

    assert command(*line) == 1
    said = capfd.readouterr()
    assert "failed: fixmatch seed 1, exit code 1: error: nothing prepared" in said.err
    assert said.out.count(" starts on the CPU") == 4
    assert "| `fixmatch` | – | 0 (1 of 2) | 50.00 (mean20) | 51.00 |" in said.out
    assert "| `supervised` | – | 0, 1 | 50.00 ± 1.41 (mean20) | 51.00 ± 1.41 |" in said.out

    assert command(*line) == 1
    assert capfd.readouterr().out.count(" starts on the CPU") == 1
    assert command(*line, "steps=6") == 2
    assert "holds a run of other settings (steps: now 6, saved 4)" in capfd.readouterr().err
    damaged = out / "fixmatch-seed0" / "summary.json"
    damaged.write_text(json.dumps(summary(51.0, "other").to_json()))
    assert command(*line) == 2
    assert "does not hold the data of that run" in capfd.readouterr().err
    damaged.write_text("{")
    assert command(*line) == 2
    assert "is damaged" in capfd.readouterr().err


@pytest.mark.slow
def test_a_sweep_survives_a_cell_that_fails_and_goes_on_with_it(digits, tmp_path, capfd, root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(root))
    out = tmp_path / "out"
    line = ["sweep", f"data={digits}", *SHORT, "--methods", "supervised", "--seeds", "0,1", "--out", str(out)]
    (out / "supervised-seed0").mkdir(parents=True)
    (out / "supervised-seed0" / "log.jsonl").mkdir()  # where a file is to be written
    assert command(*line) == 1
    said = capfd.readouterr()
    assert "failed: supervised seed 0, exit code 2: error: Cannot write to the run's folder" in said.err
    assert "| `supervised` | – | 1 (1 of 2) |" in said.out

    (out / "supervised-seed0" / "log.jsonl").rmdir()
    kept = (out / "supervised-seed1" / "log.jsonl").stat().st_mtime_ns
    assert command(*line) == 0
    said = capfd.readouterr()
    assert "2 cells, 1 finished" in said.out
    assert "| `supervised` | – | 0, 1 |" in said.out
    assert (out / "supervised-seed1" / "log.jsonl").stat().st_mtime_ns == kept
    assert "accuracy: last" in (out / "supervised-seed0" / "console.txt").read_text()
    (row,) = json.loads((out / "results.json").read_text())
    summaries = [json.loads((out / f"supervised-seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert row["figures"]["last"]["mean"] == pytest.approx(sum(s["accuracy_last"] for s in summaries) / 2)
    assert row["data"]["labeled"] == 118

    assert command(*line, "steps=6") == 2
    assert "holds a run of other settings (steps: now 6, saved 4)" in capfd.readouterr().err


def test_runs_share_the_devices_and_a_failing_one_ends_alone(tmp_path, monkeypatch):
    script = (
        "import os, sys, time; name = sys.argv[1]; print(os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[2:]);"
        "time.sleep(0.3); sys.exit('broken' if name == 'b' else 0)"
    )
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", script])
    jobs = [Job(name, [name], tmp_path / name / "console.txt") for name in "abcd"]
    seen = []
    outcomes, signum = run_all(jobs, ["3", "5"], seen.append)
    assert signum is None
    assert {o.name: o.code for o in outcomes} == {"a": 0, "b": 1, "c": 0, "d": 0}
    assert [o.last_line for o in outcomes if o.code] == ["broken"]
    assert seen == outcomes
    used = [(tmp_path / name / "console.txt").read_text().split() for name in "abcd"]
    assert {device for device, *_ in used} == {"3", "5"}
    assert all(rest[0].startswith("threads=") for _, *rest in used), "several runs share the cores"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_runs_and_starts_no_further_one(tmp_path, monkeypatch, signum):
    script = (
        f"import signal, sys, time; signal.signal({int(signum)}, lambda *_: sys.exit(77));"
        "print('ready'); time.sleep(60)"
    )
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", script])
    log = tmp_path / "a" / "console.txt"

    def send_when_ready():
        while not (log.exists() and "ready" in log.read_text()):
            pass
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send_when_ready)
    sender.start()
    outcomes, stopped_by = run_all([Job("a", [], log), Job("b", [], tmp_path / "b.txt")], [], lambda outcome: None)
    sender.join()
    assert stopped_by == signum
    assert [(o.name, o.code) for o in outcomes] == [("a", 77)]
    assert not (tmp_path / "b.txt").exists()


def test_an_error_of_the_sweep_leaves_no_run_behind(tmp_path, monkeypatch):
    script = "import sys, time; sys.argv[1] == 'quick' or time.sleep(60)"
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", script])
    jobs = [Job(name, [name], tmp_path / f"{name}.txt") for name in ("slow", "quick", "never")]

    def fail(outcome):
        raise ArithmeticError(outcome.name)

    with pytest.raises(ArithmeticError, match="quick"):
        run_all(jobs, ["0", "1"], fail)  # comes back long before the slow one would


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
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_devices("auto") == ["0", "1"]
    assert choose_devices("1") == ["1"]
    assert choose_devices("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert choose_devices("auto") == ["4", "7"]
    with pytest.raises(UserError, match="has GPUs 4, 7"):
        choose_devices("0")


def summary(last: float, fingerprint: str = "") -> Summary:
    plain = dict.fromkeys(Summary._fields, 0) | {
        "accuracy": last - 1, "figure": "mean20", "head": "balanced", "weights": "averaged",
        "figures": {"last": last, "best": last + 1, "mean20": last - 1, "median20": last - 2},
        "groups": {"many": 90.0, "medium": 70.0, "few": last - 20}, "data_fingerprint": fingerprint, "commit": "abc",
    }  # fmt: skip
    return Summary(**plain)


def test_the_table_has_mean_deviation_and_the_papers_figure(tmp_path, digits):
    split = long_tail("cifar10-lt").options()
    facts = read_facts(digits)
    known = facts._replace(split=split, info=facts.info._replace(name="cifar10-lt", resolution=32))
    runs = {0: summary(80.0), 1: summary(83.0), 2: summary(84.5), 3: None}
    settings = load_settings(["cifar10_lt", "protocol_acr", "method=semi", "steps=1000"])
    row = make_row(settings, known, runs, paper_figure(split, 32, "semi", settings.method.options))
    rows = [row, make_row(load_settings(["method=fixmatch"]), facts, {0: None}, None)]
    text = write_files(tmp_path / "results", rows, markdown(rows))
    assert (tmp_path / "results.md").read_text() == text
    cells = [cell.strip() for cell in text.splitlines()[2].split("|")[1:-1]]
    assert cells == [
        "`semi`", "P-ACR (changed: steps)", "0, 1, 2 (3 of 4)", "81.50 ± 2.29 (mean20)", "82.50 ± 2.29", "83.50 ± 2.29",
        "81.50 ± 2.29", "80.50 ± 2.29", "90.0 / 70.0 / 62.5", "80.3 ± 0.41 (Table 1)", "+1.20",
    ]  # fmt: skip
    assert "cifar10-lt at 32 px, 118 labeled (imbalance 10), 564 unlabeled (imbalance 10); evaluated: ema/" in text
    assert " steps=1000" in text
    assert " batch=" not in text, "a default"
    semi, fixmatch = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert float(semi["last_std"]) == pytest.approx(2.2913, abs=1e-4)
    assert (semi["protocol"], semi["batch"], semi["method.tau"]) == ("P-ACR (changed: steps)", "64", "0.7")
    assert (semi["commit"], fixmatch["commit"]) == ("abc", "")
    assert (semi["paper"], semi["paper_table"], fixmatch["last"], fixmatch["paper"]) == ("80.3", "1", "", "")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries[0]["by_seed"]["1"]["best"] == 84.0
    assert entries[0]["data"]["split"] == split
    assert entries[1]["missing"] == [0]


@pytest.mark.parametrize(("protocol", "shown"), [("protocol_acr", True), ("protocol_fast", False)])
def test_no_published_figure_stands_beside_a_protocol_of_our_own(tmp_path, digits, protocol, shown):
    split = long_tail("cifar10-lt").options()
    settings = load_settings(["cifar10_lt", protocol, "steps=10"])
    row = make_row(settings, None, {0: summary(80.0)}, paper_figure(split, 32, "semi"))
    assert [row["paper"] is not None, row["difference"] is not None] == [shown, shown]
    facts = read_facts(digits)
    facts = facts._replace(split=split, info=facts.info._replace(resolution=32))
    run = RunData(tmp_path, settings.model_dump(), RunLog([], [], []), None, facts)
    assert [bool(run.papers), run.paper is not None] == [shown, shown]


def test_imbalance_is_first_to_last_class():
    assert [ratio(c) for c in ([500, 50, 5], [40, 4000], [3, 3], [5, 0])] == ["100", "1/100", "1", "n/a"]


def test_the_readme_names_a_sweep_that_parses():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("python -m semi_fast sweep ")]
    assert lines
    for line in lines:
        words = line.split("  #")[0].split()[4:]
        named = [words.index(option) for option in ("--methods", "--seeds") if option in words]
        given = {words[at]: words[at + 1] for at in named}
        settings = [word for at, word in enumerate(words) if at not in named and at - 1 not in named]
        _, cells = sweep.plan(settings, given.get("--methods"), given["--seeds"], None)
        methods = given["--methods"].split(",") if "--methods" in given else method_names()
        assert len(cells) == len(methods) * len(given["--seeds"].split(","))
