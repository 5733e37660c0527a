"""Training from data to summary: every method, resumption to the bit, and every kind of mistake."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data_prep.cores import usable_cores
from data_prep.errors import UserError
from data_prep.work.builder import build_dataset
from semi_fast.memory_bank import MemoryBank
from semi_fast.methods import method_names
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from semi_fast.train import cli, main
from tests.semi_fast.outcome import need
from tests.semi_fast.tiny import tiny_method

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def arguments(digits, run_dir, *more):
    small = ["steps=8", "batch=8", "log_every=2", "eval_every=4", "save_every=4", "wandb=off", "threads=1"]
    return ["digits_lt", f"data={digits}", f"run_dir={run_dir}", *small, *more]


def test_where_the_bank_has_no_kernel_a_run_ends_before_anything_is_written(digits, tmp_path, monkeypatch, capsys):
    def no_kernel(self):
        raise UserError("no kernel runs here")

    monkeypatch.setattr(MemoryBank, "check_device", no_kernel)
    capsys.readouterr()
    assert cli(arguments(digits, tmp_path / "run", "method=semi")) == 2
    assert capsys.readouterr() == ("", "error: no kernel runs here\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", method_names())
def test_a_run_leaves_everything_a_user_expects(digits, tmp_path, method):
    summary = main(arguments(digits, tmp_path / "run", f"method={method}"))
    folder = tmp_path / "run"
    saved = json.loads((folder / "summary.json").read_text())
    assert saved.keys() >= {
        "accuracy_best", "accuracy_last", "accuracy_mean20", "per_class", "steps", "seconds", "images_per_s",
    }  # fmt: skip
    assert saved["accuracy_best"] == summary.figures["best"]
    assert saved["images_per_s"] > 0
    assert saved["steps"] == 8
    assert len(saved["per_class"]) == 10
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "train"] == [2, 4, 6, 8]
    assert [e["step"] for e in entries if e["kind"] == "eval"] == [4, 8]
    assert all(math.isfinite(e["loss/total"]) for e in entries if e["kind"] == "train")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000000004", "step-000000008"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"]["name"] == method
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] >= 800
    reported = f"{'ema' if saved['weights'] == 'averaged' else 'raw'}/{saved['head']}"
    assert saved["heads"][reported] == saved["accuracy_last"]


class KilledError(Exception):
    pass


def on_step(monkeypatch, step, act):
    """After `step` steps and what is due then, do `act`."""
    original = Run.tick

    def tick(self, now, *rest):
        original(self, now, *rest)
        if now == step:
            act()

    monkeypatch.setattr(Run, "tick", tick)


def stop_after(monkeypatch, step):
    """The process dies after `step` steps."""

    def die():
        raise KilledError

    on_step(monkeypatch, step, die)


@pytest.mark.parametrize("stop", [4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(digits, tmp_path, monkeypatch, fresh_accelerator, stop):
    whole = main(arguments(digits, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KilledError):
            main(arguments(digits, tmp_path / "parts"))
    resumed = main(arguments(digits, tmp_path / "parts"))
    for name in ("model", "ema", "optimizer"):
        one, two = (
            load_file(tmp_path / run / "checkpoints/step-000000008" / f"{name}.safetensors")
            for run in ("whole", "parts")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert resumed.confusion == whole.confusion
    assert resumed.figures["mean20"] == whole.figures["mean20"]

    def losses(run):
        lines = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        return [(e["step"], e["loss/total"]) for e in lines if e["kind"] == "train"]

    assert losses("parts") == losses("whole")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_and_the_same_command_finishes_it(digits, tmp_path, monkeypatch, capsys, signum, code):
    whole = main(arguments(digits, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        on_step(patch, 3, lambda: os.kill(os.getpid(), signum))
        assert cli(arguments(digits, tmp_path / "parts")) == code
    assert f"stopped by {signum.name} after step 4" in capsys.readouterr().err
    assert not (tmp_path / "parts/summary.json").exists()
    assert main(arguments(digits, tmp_path / "parts")).confusion == whole.confusion


def test_a_second_ctrl_c_ends_at_once(digits, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with monkeypatch.context() as patch:
            on_step(patch, 3, twice)
            assert cli(arguments(digits, tmp_path / "run")) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_killed_before_its_summary_is_finished_by_the_same_command(digits, tmp_path):
    whole = main(arguments(digits, tmp_path / "run"))
    (tmp_path / "run/summary.json").unlink()
    saved = load_checkpoint(tmp_path / "run/checkpoints/step-000000008").values["seconds"]
    again = main(arguments(digits, tmp_path / "run"))
    for key in ("figures", "evaluations_in_mean", "heads", "groups", "confusion"):
        assert getattr(again, key) == getattr(whole, key)
    assert again.images_per_s == pytest.approx(whole.images_per_s)
    assert again.seconds >= saved > 0, "the time of the earlier session is kept"
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "eval"] == [4, 8]


def test_a_full_disk_costs_a_checkpoint_not_the_run(digits, tmp_path, monkeypatch, capsys):
    def full(tensors, path):
        if "step-000000004" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path)

    monkeypatch.setattr("semi_fast.run.checkpoint.save_file", full)
    assert main(arguments(digits, tmp_path / "run")).steps == 8
    assert "warning: no checkpoint of step 4: the disk is full" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000008"]


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(digits, tmp_path):
    runs = [main(arguments(digits, tmp_path / name, f"seed={seed}")) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    weights = [load_file(tmp_path / name / "checkpoints/step-000000008/model.safetensors") for name in "abc"]
    assert runs[0].confusion == runs[1].confusion
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not torch.equal(weights[0]["heads.standard.weight"], weights[2]["heads.standard.weight"])


def test_a_run_starts_from_the_weights_of_a_finished_one(digits, tmp_path, capsys):
    main(arguments(digits, tmp_path / "first", "method=fixmatch"))
    state = tmp_path / "first/checkpoints/step-000000008"
    still = ["optim.lr=1e-12", "steps=2", "eval_every=2", "save_every=2", f"start_from={tmp_path / 'first'}"]
    for weights, file in (("averaged", "ema"), ("raw", "model")):
        capsys.readouterr()
        main(arguments(digits, tmp_path / weights, *still, f"start_weights={weights}"))
        assert "start_from: as initialized: " in capsys.readouterr().out, "SeMi has a head that FixMatch lacks"
        then = load_file(state / f"{file}.safetensors")
        now = load_file(tmp_path / weights / "checkpoints/step-000000002/model.safetensors")
        for name in ("net.stem.weight", "heads.standard.weight"):
            torch.testing.assert_close(now[name], then[name], rtol=0, atol=1e-6)
    averages = load_file(tmp_path / "raw/checkpoints/step-000000002/ema.safetensors")
    torch.testing.assert_close(averages["net.stem.weight"], then["net.stem.weight"], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"The weights of start_from do not fit: .*net\."):
        main(arguments(digits, tmp_path / "other", *still, "net=wrn10_2"))


@pytest.mark.parametrize(("protocol", "name"), [("acr", "P-ACR"), ("daso", "P-DASO")])
def test_a_split_that_is_not_the_protocol_s_is_named_with_it(digits, tmp_path, protocol, name):
    """The labeled images of this set are among the unlabeled ones, as P-ACR has them and P-DASO has not."""
    small = ["net=wrn10_1", "steps=2", "batch=8", "wandb=off", "threads=1", "ceiling=off", "report=off"]
    argv = ["digits_lt", f"protocol_{protocol}", f"data={digits}", f"run_dir={tmp_path}/run", "method=fixmatch", *small]
    protocol = main(argv).protocol
    assert protocol.startswith(f"{name} (changed: batch, ")
    assert ("data.disjoint" in protocol) == (name == "P-DASO")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["protocol"] == protocol


def test_a_back_end_that_cannot_relabel_is_refused_at_the_start(tiny_folder, tmp_path):
    need("dali")
    name = next(name for name in method_names() if tiny_method(name).relabels)
    with pytest.raises(UserError, match=rf"dali serves the labels that were built, and method={name} changes them"):
        main(arguments(tiny_folder, tmp_path / "run", f"method={name}", "data.backend=dali", "batch=2"))
    assert not (tmp_path / "run").exists()


def test_run_folders_are_not_overwritten(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = [a for a in arguments(digits, "x", "steps=2") if not a.startswith("run_dir")]
    for _ in range(2):
        main(plain)
    main([*plain, "optim.lr=0.01"])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-lt-semi-seed0", "digits-lt-semi-seed0-2", "digits-lt-semi-seed0-3",
    ]  # fmt: skip


def test_a_run_folder_of_other_settings_is_refused(digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KilledError):
            main(arguments(digits, tmp_path / "run"))
    with pytest.raises(UserError, match=r"optim\.lr: now 0\.5, saved 0\.03"):
        main(arguments(digits, tmp_path / "run", "optim.lr=0.5"))
    main(arguments(digits, tmp_path / "run", "log_every=1"))  # what does not change the result may differ
    with pytest.raises(UserError, match="holds a finished run"):
        main(arguments(digits, tmp_path / "run"))


def test_starting_anew_does_not_mix_with_a_run_that_is_there(digits, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KilledError):
            main(arguments(digits, tmp_path / "run"))
    with pytest.raises(UserError, match="resume=never starts anew"):
        main(arguments(digits, tmp_path / "run", "resume=never"))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000004"]


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "\udcff"])
def test_a_damaged_config_of_an_earlier_run_is_another_run(digits, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "runs/digits-lt-supervised-seed0"
    old.mkdir(parents=True)
    (old / "config.yaml").write_bytes(content.encode(errors="surrogateescape"))
    plain = [a for a in arguments(digits, "x", "steps=2", "method=supervised") if not a.startswith("run_dir")]
    main(plain)
    assert (tmp_path / "runs/digits-lt-supervised-seed0-2/summary.json").exists()


def test_more_labeled_images_a_step_than_there_are(digits, tmp_path):
    assert main(arguments(digits, tmp_path / "run", "batch=150", "steps=2")).steps == 2


def test_a_diverging_loss_stops_the_run_and_keeps_the_checkpoints(digits, tmp_path, capsys):
    assert cli(arguments(digits, tmp_path / "run", "optim.lr=1e30", "save_every=1", "log_every=1")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The loss is not finite at step")
    assert "loss/labeled" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["data=nowhere"], "No data set at nowhere (manifest.json is missing)"),
        (["net=resnet51"], "Did you mean 'resnet50'?"),
        (["precision=fp16"], "precision=fp16 needs a GPU"),
        (["run_dir={file}"], "is a file"),
        (["batch=0"], "batch: input should be greater than or equal to 2"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(digits, tmp_path, capsys, extra, message):
    if "fp16" in extra[0] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "file").touch()
    extra = [text.format(file=tmp_path / "file") for text in extra]
    assert cli(arguments(digits, tmp_path / "run", *extra)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_lists_every_setting_and_option(capsys):
    assert cli(["--help"]) == 0
    out = capsys.readouterr().out
    for text in (
        "optim.weight_decay=0.0005",
        "method.tau=0.7",
        "Options of method=fixmatch",
        "cifar10_lt",
        "net.bn_momentum",
    ):
        assert text in out


@pytest.fixture
def plain_environment():
    hidden = ("OMP_NUM_THREADS", "MPLBACKEND")
    return {k: v for k, v in os.environ.items() if k not in hidden} | {"WANDB_MODE": "disabled"}


def test_accelerate_launch_builds_the_digits_set_and_uses_all_cores(root, tmp_path, plain_environment):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(root / "semi_fast/train.py")]
    done = subprocess.run(
        [*command, "steps=4", "batch=8", "log_every=2"],
        cwd=tmp_path,
        env=plain_environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data/digits-lt/manifest.json").exists()
    assert (tmp_path / "runs/digits-lt-semi-seed0/summary.json").exists()
    cores = usable_cores()
    assert f"cpu, {cores} threads" in done.stdout or torch.cuda.is_available()
    assert "step 4/4 | loss" in done.stdout


def test_the_script_itself_exits_with_2(root, tmp_path, plain_environment):
    done = subprocess.run(
        [sys.executable, str(root / "semi_fast/train.py"), "stepz=4"],
        cwd=tmp_path,
        env=plain_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == done.stderr.splitlines()[0] + "\n"
    assert "Did you mean 'steps'?" in done.stderr


# Dynamo looks at .grad of every input it wraps; inputs of the objective are results of the network, not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("extra", [["precision=bf16"], pytest.param(["compile=on"], marks=pytest.mark.slow)])
def test_precision_and_compilation_change_speed_not_learning(digits, tmp_path, extra):
    plain = main(arguments(digits, tmp_path / "plain", "precision=fp32"))
    AcceleratorState._reset_state(True)
    other = main(arguments(digits, tmp_path / "other", *extra))

    def losses(run):
        lines = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        return [e["loss/total"] for e in lines if e["kind"] == "train"]

    assert losses("other") == pytest.approx(losses("plain"), rel=0.05)
    assert other.steps == plain.steps


def test_both_back_ends_train_the_same_to_the_bit(tmp_path):
    pytest.importorskip("ffcv", reason="needs the extra ffcv", exc_type=ImportError)
    folder = tmp_path / "data/digits-lt"
    build_dataset("digits-lt", folder, formats=["ffcv"], progress=False, say=lambda line: None)
    runs = [main(arguments(folder, tmp_path / name, f"data.backend={name}")) for name in ("resident", "ffcv")]
    assert runs[0].confusion == runs[1].confusion
    one, two = (
        load_file(tmp_path / name / "checkpoints/step-000000008/model.safetensors") for name in ("resident", "ffcv")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_whose_pseudo_labels_are_never_used_is_warned_of(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("semi_fast.observe.health.IDLE_STEPS", 4)
    main(arguments(digits, tmp_path / "run", "method=fixmatch", "method.tau=1.0", "ceiling=off"))
    out = capsys.readouterr().out
    assert out.count("warning: no pseudo-label has been used for 4 steps (mean confidence 0.") == 1
    assert "threshold method.tau=1.0). Lower method.tau if that does not change." in out
