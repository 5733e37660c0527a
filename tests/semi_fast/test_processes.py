"""Several processes: the same run as one with the same global batch, on every rank, and all of them end together."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from data_prep.errors import UserError
from semi_fast.config import load_settings, read_run_config
from semi_fast.processes import launch as processes
from semi_fast.processes.launch import NotAlikeError, check_alike, check_launch, check_processes, speaks_for
from tests.semi_fast.process_runs import STEPS, free_port

# Processes that share a batch add its sums in another order: float32 rounding, which every step of training magnifies.
# Seen after these steps: 2e-5 of the losses, 1e-4 of the state.
LOSS, STATE = 5e-4, 1e-3


@pytest.fixture(scope="module")
def runs(digits, root, tmp_path_factory):
    """Runs of 1, 2 and 3 processes with the same global batch: folder of the runs, and what each rank was left with."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", "-m", "tests.semi_fast.process_runs", str(folder)]
    done = subprocess.run(
        [*command, str(digits)], env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    left = {world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)] for world in (1, 2, 3)}
    return folder, left, done.stdout


def log(folder, world, kind):
    lines = [json.loads(line) for line in (folder / f"{world}/log.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["kind"] == kind]


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_ends_with_the_same_bits(runs, world):
    first, *others = runs[1][world]
    assert first["method"]["bank.pushed"].sum() > 0
    for other in others:
        for group in ("method", "ema"):
            assert first[group].keys() == other[group].keys()
            for key, value in first[group].items():
                assert torch.equal(value, other[group][key]), key


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_protocol_is_followed_by_all_processes_together(runs, world):
    assert read_run_config(runs[0] / str(world))["protocol"] == "P-TEST"


def close(a, b, bound):
    """Equal up to `bound` times the largest value of the tensor."""
    return (a.double() - b.double()).abs().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_keep_the_state_of_one_with_the_same_global_batch(runs, world):
    (alone,), (shared, *_) = runs[1][1], runs[1][world]
    assert alone["method"]["bank.pushed"].max() > alone["method"]["bank.rows"].shape[1], "some entry must be replaced"
    assert torch.equal(shared["confusion"], alone["confusion"]), "every test image counts once"
    for key, value in alone["method"].items():
        if value.dtype == torch.int64:  # which images the bank holds, and what was counted
            assert torch.equal(shared["method"][key], value), key
        else:
            assert close(shared["method"][key], value, STATE), key
    for key, value in alone["ema"].items():
        assert close(shared["ema"][key], value, STATE), key


@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_curve_is_that_of_one_process_with_the_same_global_batch(runs, world):
    alone, shared = (log(runs[0], count, "train") for count in (1, world))
    assert [entry["step"] for entry in shared] == list(range(1, STEPS + 1)), "one process writes the log, once"
    for one, other in zip(alone, shared, strict=True):
        for name in (name for name in one if name.startswith(("loss/", "pseudo/", "bank/"))):
            assert other[name] == pytest.approx(one[name], rel=LOSS, abs=1e-6), (one["step"], name)
    shares = [entry["pseudo/used"] for entry in alone]
    assert any(0 < share < 1 for share in shares), "some pseudo-labels must be used and some not"


def test_only_one_process_speaks_and_saves(runs):
    folder, _, output = runs
    assert output.count("run: ") == 3
    assert output.count(f"step {STEPS}/{STEPS} | loss") == 3
    for world in (1, 2, 3):
        names = sorted(path.name for path in (folder / f"{world}/checkpoints").iterdir())
        assert names == ["step-000000004", "step-000000008"]
        assert [entry["step"] for entry in log(folder, world, "eval")] == [4, 8]


class Launched:
    """A run under torchrun, whose ranks can be found and ended; within a `with`, nothing of it outlives the block."""

    def __init__(self, root, run_dir, digits, processes, *more):
        settings = ["digits_lt", f"data={digits}", f"run_dir={run_dir}", "steps=1000000", "threads=1", "wandb=off"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port"]
        self.launcher = subprocess.Popen(
            [*command, str(free_port()), str(root / "semi_fast/train.py"), *settings, "ceiling=off", *more],
            env={key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
            | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""

    def wait_for(self, text):
        for line in self.launcher.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"it ended without '{text}':\n{self.output}")

    def rank(self, number):
        for process in psutil.Process(self.launcher.pid).children():
            if process.environ()["RANK"] == str(number):
                return process
        raise AssertionError(f"no rank {number}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.launcher.poll() is None:
            for process in [*psutil.Process(self.launcher.pid).children(recursive=True), self.launcher]:
                process.kill()
        self.launcher.wait()
        self.launcher.stdout.close()

    def end(self):
        """Wait for all to end; returns everything that was printed."""
        ranks = psutil.Process(self.launcher.pid).children()
        self.output += self.launcher.communicate(timeout=60)[0]
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive
        return self.output


def test_a_signal_to_one_process_saves_and_the_death_of_one_ends_all(digits, root, tmp_path):
    run = tmp_path / "run"
    with Launched(root, run, digits, 2, "batch=6", "log_every=2") as started:
        started.wait_for("step 2/")
        started.rank(1).send_signal(signal.SIGTERM)
        output = started.end()
    assert output.count("stopped by SIGTERM after step") == 1
    assert "the same command goes on from there" in output
    (saved,) = (run / "checkpoints").iterdir()

    # Another number of processes with the same global batch goes on, and is said.
    with Launched(root, run, digits, 3, "batch=4", "log_every=2") as again:
        again.wait_for("resumed at step")
        assert "processes 3, saved with 2" in again.output
        again.wait_for("| loss")
        again.rank(1).kill()
        output = again.end()
        assert again.launcher.returncode != 0
    assert "the connection to another process is gone" in output
    assert 'semi_fast/train.py", line' not in output, "no rank prints a traceback; the launcher prints its own"
    assert saved.exists()


ACCELERATED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        (ACCELERATED, None),
        ({"MASTER_ADDR": "node1"}, None),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"} | ACCELERATED, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, None),
    ],
)
def test_a_launch_that_can_work_passes(environment, gpus):
    check_launch(environment, gpus)


def test_a_launcher_that_started_one_process_of_several_is_noticed():
    with pytest.raises(UserError, match=r"asked for several processes and started one.*torchrun --nproc_per_node N"):
        check_launch(ACCELERATED | {"MASTER_ADDR": "127.0.0.1"}, None)


def test_more_processes_than_gpus_are_noticed_before_any_of_them_waits():
    with pytest.raises(UserError, match="4 processes were started on this machine, which shows 1 GPUs"):
        check_launch({"LOCAL_WORLD_SIZE": "4"}, 1)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_were_not_joined_are_noticed(name):
    check_processes({name: "1"}, 1)
    check_processes({name: "2"}, 2)
    with pytest.raises(UserError, match=rf"started 2 processes \({name}\), and each takes itself for the only one"):
        check_processes({name: "2"}, 1)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({}, None),
        ({"threads": 7, "run_dir": "elsewhere", "quiet": "on", "data": {"path": "/local", "backend": "auto"}}, None),
        ({"batch": 4}, "Process 2 has batch=4, the first 64."),
        ({"log_every": 7}, "Process 2 has log_every=7, the first 50."),
        ({"method": {"name": "fixmatch"}}, "Process 2 has method.alpha=None, the first 0.4."),
        ({"fingerprint": "b"}, "Process 2 found other data than the first."),
        ({"step": 0}, "Process 2 would start from step 0, the first from step 500: they read different folders."),
    ],
)
def test_processes_that_would_not_train_the_same_are_noticed_by_all(monkeypatch, there, said):
    """As two machines do that share no run_dir: the second would begin anew, and the weights drift apart unseen."""
    settings = load_settings(["cifar10_lt", "data.backend=auto"]).model_dump()
    facts = {"fingerprint": "a", "step": 500}
    flat = dict(processes._flat({**settings, **{k: v for k, v in there.items() if k not in facts}}))
    other = ({k: v for k, v in flat.items() if k not in processes.OWN}, *({**facts, **there}[k] for k in facts))
    monkeypatch.setattr(processes, "gather_objects", lambda mine: [mine, mine, other])
    if said is None:
        check_alike(settings, **facts)
        return
    with pytest.raises(NotAlikeError) as caught:
        check_alike(settings, **facts)
    assert str(caught.value).startswith(said)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    assert not speaks_for(caught.value), "the first says it"


def test_accelerate_launch_with_several_cpu_processes_says_so(root, tmp_path):
    """Accelerate's launcher starts one process then, and trains as if that had been asked for."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, str(root / "semi_fast/train.py"), "run_dir=run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "error: accelerate launch was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


def documented(launcher, root):
    """Arguments of the documented commands of a launcher."""
    blocks = re.findall(r"```bash\n(.*?)```", (root / "docs/processes.md").read_text(), flags=re.DOTALL)
    lines = [line.removeprefix("ACCELERATE_USE_CPU=true ") for block in blocks for line in block.splitlines()]
    assert all(line.startswith(("accelerate launch ", "torchrun ")) for line in lines)
    return [shlex.split(line.removeprefix(launcher)) for line in lines if line.startswith(launcher)]


def test_documented_commands_are_understood_by_the_launchers_and_the_trainer(root):
    for arguments in documented("accelerate launch", root):
        parsed = launch_command_parser().parse_args(arguments)
        assert parsed.training_script == "semi_fast/train.py"
        load_settings(parsed.training_script_args)
        assert not parsed.cpu, "accelerate launch starts one process on a CPU"
    for arguments in documented("torchrun", root):
        parsed = get_args_parser().parse_args(arguments)
        assert parsed.training_script == "semi_fast/train.py"
        load_settings(parsed.training_script_args)
        assert int(parsed.nproc_per_node) * int(parsed.nnodes.split(":")[-1]) in (2, 8, 16)
