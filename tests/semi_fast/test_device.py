"""Automatic choices: what is chosen where, and the reason that is printed."""

import os
import platform
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from data_prep.cores import usable_cores
from data_prep.errors import UserError
from semi_fast.parts.bf16 import has_bf16
from semi_fast.training import device
from semi_fast.training.device import choose_compile, choose_graph, choose_precision, image_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("native", "value"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_gets_bf16_only_where_it_has_instructions_for_it(monkeypatch, native, value):
    monkeypatch.setattr(device, "has_bf16", lambda _: native)
    assert choose_precision("auto", CPU).value == value


@pytest.mark.parametrize(("capability", "value"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_a_gpu_gets_bf16_from_ampere_on(monkeypatch, capability, value):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision("auto", GPU).value == value


def test_emulated_bf16_is_allowed_and_said(monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    choice = choose_precision("bf16", CPU)
    assert choice.value == "bf16"
    assert "emulates" in choice.reason


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="needs a GPU"):
        choose_precision("fp16", CPU)


def test_capability_flags_agree_with_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    assert has_bf16(CPU)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert not has_bf16(CPU)


@pytest.mark.parametrize(
    ("asked", "where", "precision", "steps", "compiler", "value"),
    [
        ("auto", GPU, "bf16", 250_000, True, "on"),
        ("auto", GPU, "bf16", 1_000, True, "off"),
        ("auto", GPU, "bf16", 250_000, False, "off"),
        ("auto", CPU, "fp32", 250_000, True, "off"),
        ("auto", CPU, "bf16", 250_000, True, "on"),
        ("on", CPU, "fp32", 1, True, "on"),
        ("on", CPU, "fp32", 1, False, "off"),
        ("off", GPU, "bf16", 250_000, True, "off"),
    ],
)
def test_compile(monkeypatch, asked, where, precision, steps, compiler, value):
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
    choice = choose_compile(asked, where, precision, steps)
    assert choice.value == value
    assert choice.reason


@pytest.mark.parametrize(
    ("asked", "where", "processes", "scaler", "mode", "value", "reason"),
    [
        ("auto", GPU, 1, None, "", "step", "a step is one launch"),
        ("auto", GPU, 1, None, "default", "step", "a step is one launch"),
        ("auto", GPU, 1, None, "reduce-overhead", "off", "compile.mode=reduce-overhead records CUDA graphs itself"),
        ("step", GPU, 1, object(), "", "off", "fp16: the host reads the loss scale at every step"),
        ("step", GPU, 2, None, "", "off", "2 processes exchange messages within a step"),
        ("step", GPU, 1, None, "", "step", "as set"),
        ("off", GPU, 1, object(), "", "off", "as set"),
        ("auto", CPU, 1, None, "", "off", "there is no GPU"),
        ("step", CPU, 1, None, "", "step", "as set; without a GPU the step only reads and writes the same tensors"),
    ],
)
def test_step_graph(asked, where, processes, scaler, mode, value, reason):
    accel = SimpleNamespace(device=where, num_processes=processes, scaler=scaler)
    choice = choose_graph(asked, accel, mode)
    assert choice.value == value
    assert choice.reason.startswith(reason)


def test_images_are_written_in_the_precision_of_the_run():
    assert [image_dtype(p) for p in ("bf16", "fp16", "fp32")] == [torch.bfloat16, torch.float32, torch.float32]


def test_cores_are_shared_between_processes_and_omp_num_threads_does_not_bind():
    code = """
import torch
from semi_fast.training.device import use_cores
print(use_cores(None, 1), torch.get_num_threads(), use_cores(None, 64), use_cores(3, 1))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    cores = usable_cores()
    assert done.stdout.split() == [str(cores), str(cores), "1", "3"]


def test_convolutions_of_a_gpu_are_chosen_by_trial(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    threads = torch.get_num_threads()
    device.make_accelerator("fp32", threads)
    assert torch.backends.cudnn.benchmark


def test_a_run_that_compiles_nothing_imports_no_compiler(tmp_path):
    """Whatever asks for torch's compiler costs each start a second."""
    code = """
import sys
from semi_fast.train import main
from semi_fast.config import OptimSettings
from semi_fast.training.optim import build_optimizer, torch
main(["steps=1", "batch=2", "wandb=off", "report=off", "ceiling=off", "quiet=on"])
for name in ("muon", "adam", "adamw"):
    optimizer = build_optimizer(torch.nn.Conv2d(1, 1, 1), OptimSettings(name=name))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print([name for name in ("torch._dynamo", "torch._inductor", "sympy", "sklearn", "wandb") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    for _ in range(2):  # the first builds the data set
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
@pytest.mark.usefixtures("fresh_accelerator")
def test_on_a_cpu_freed_memory_serves_the_next_tensors(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    device.make_accelerator("fp32", torch.get_num_threads())

    def pages() -> int:  # that the operating system gave for a large tensor, which is no more afterwards
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(pages() for _ in range(10)) < 2**24 * 4 // resource.getpagesize() // 10
