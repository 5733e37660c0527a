"""What the machine is good at: threads, precision, compilation. Each choice comes with the reason that is printed."""

from __future__ import annotations

import os
import shlex
import shutil
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from data_prep.cores import usable_cores
from data_prep.errors import UserError
from data_prep.memory import keep_memory
from semi_fast.parts.bf16 import has_bf16
from semi_fast.processes.launch import check_launch, check_processes, process_handlers

COMPILE_PAYS_AFTER = 5_000  # steps: compiling takes a minute or so, and saves some 10 % of a step

OWN_GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record CUDA graphs


class Choice(NamedTuple):
    """A setting that was `auto`, resolved, and why."""

    value: str
    reason: str


def make_accelerator(precision: str, threads: int | None) -> tuple[Accelerator, Choice]:
    """Accelerate's handle on device, processes and mixed precision, with this process's threads set.

    Args:
        precision: "auto", "bf16", "fp16" or "fp32".
        threads: CPU threads of this process; None for its share of the cores.

    Returns: the Accelerator, and the precision chosen with the reason.
    Raises: UserError for fp16 on a CPU, and where the processes are not those that were asked for.
    """
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    check_launch(os.environ, torch.cuda.device_count() if on_gpu else None)
    chosen = choose_precision(precision, torch.device("cuda" if on_gpu else "cpu"))
    precision = "no" if chosen.value == "fp32" else chosen.value
    accel = Accelerator(mixed_precision=precision, cpu=not on_gpu, kwargs_handlers=process_handlers())
    check_processes(os.environ, accel.num_processes)
    torch.backends.cudnn.benchmark = True  # of a GPU: a run's shapes stay, so that it pays to try each algorithm once
    use_cores(threads, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if not on_gpu:
        keep_memory()
    return accel, chosen


def use_cores(threads: int | None, processes: int) -> int:
    """Give this process its threads and return their number.

    `accelerate launch` sets OMP_NUM_THREADS to 1 where nobody has set it, which would leave all cores but one idle;
    so the count is set here, by hand: `threads`, or OMP_NUM_THREADS where it says more than 1, or else an equal share
    of the cores this process may use.

    Args:
        threads: what the settings ask for; None for the share.
        processes: processes of the run on this machine.
    """
    cores = usable_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    count = threads or (int(asked) if asked.isdigit() and int(asked) > 1 else max(1, cores // processes))
    torch.set_num_threads(count)
    return count


def choose_precision(asked: str, device: torch.device) -> Choice:
    """bf16, fp16 or fp32 for `auto`: bf16 where the hardware multiplies it faster than float32, else what does."""
    if asked == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU, and this run is on a CPU. Use precision=bf16 or precision=fp32.")
    if asked == "bf16" and device.type == "cpu" and not has_bf16(device):
        return Choice(
            "bf16", "as set; this CPU has no bf16 instructions and emulates them, many times slower than fp32"
        )
    if asked != "auto":
        return Choice(asked, "as set")
    if device.type == "cuda":
        if has_bf16(device):
            return Choice("bf16", "this GPU has bf16 tensor cores")
        return Choice("fp16", "this GPU has no bf16")
    if has_bf16(device):
        return Choice("bf16", "this CPU multiplies bf16 natively")
    return Choice("fp32", "this CPU has no bf16 instructions and would emulate them, many times slower")


def choose_compile(asked: str, device: torch.device, precision: str, steps: int) -> Choice:
    """`on` or `off` for `auto`: on when a compiler exists and the run is long enough to repay it."""
    compiler = shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0])
    if asked == "on" and compiler is None:
        return Choice("off", "compile=on was asked for, but there is no C++ compiler (install g++)")
    if asked != "auto":
        return Choice(asked, "as set")
    if compiler is None:
        return Choice("off", "there is no C++ compiler")
    if device.type == "cpu" and precision == "fp32":
        return Choice("off", "float32 convolutions on a CPU gain nothing")
    if steps < COMPILE_PAYS_AFTER:
        return Choice("off", f"{steps:,} steps are fewer than the {COMPILE_PAYS_AFTER:,} that repay it")
    return Choice("on", f"{steps:,} steps repay it")


def choose_graph(asked: str, accel: Accelerator, compile_mode: str) -> Choice:
    """`step` or `off` for `auto`: whether whole steps are recorded and replayed.

    Args:
        compile_mode: of torch.compile; "" where nothing is compiled.
    """
    obstacles = {
        "fp16: the host reads the loss scale at every step": accel.scaler is not None,
        f"{accel.num_processes} processes exchange messages within a step": accel.num_processes > 1,
        f"compile.mode={compile_mode} records CUDA graphs itself": compile_mode in OWN_GRAPHS,
    }
    if asked == "off":
        return Choice("off", "as set")
    for reason, holds in obstacles.items():
        if holds:
            return Choice("off", reason)
    if accel.device.type != "cuda":
        reason = "as set; without a GPU the step only reads and writes the same tensors every time"
        return Choice("step", reason) if asked == "step" else Choice("off", "there is no GPU")
    return Choice("step", "a step is one launch" if asked == "auto" else "as set")


def image_dtype(precision: str) -> torch.dtype:
    """The dtype the pipeline writes images in; float16 runs start from float32 and let autocast cast."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
