"""Several processes: whether the launcher made those that were asked for, and how they are wired together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from data_prep.errors import UserError
from semi_fast.processes.gather import gather_objects

# How long a process waits for the others before it gives up: longer than one of them may be alone at work (building
# the digits set, compiling, saving a large checkpoint), far shorter than anybody wants to wait for a dead machine.
TIMEOUT = timedelta(minutes=10)

# What launchers tell a process about the number of processes of its run.
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

# Settings that may differ from machine to machine. (The run's folder is the first process's.)
OWN = ("threads", "quiet", "run_dir", "data.path", "data.build")

TORCHRUN = "torchrun --nproc_per_node N semi_fast/train.py"


class CommonError(UserError):
    """What all processes of a run meet together, so that one of them speaks for all."""


class NotAlikeError(CommonError):
    """The processes of a run would not train the same thing."""


def process_handlers() -> list[Any]:
    """What Accelerate passes to the process group."""
    return [InitProcessGroupKwargs(timeout=TIMEOUT)]


def keep_buffers(wrapped: nn.Module) -> None:
    """Let DistributedDataParallel leave buffers alone in forward; it has made them equal when it was built.

    All statistics in buffers stay the same on every rank by themselves, and the memory bank among them can be large.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        # PyTorch 2.13 renamed it, and warns of the older name.
        new = "forward_sync_buffers"
        setattr(wrapped, new if hasattr(wrapped, new) else "broadcast_buffers", False)


def check_launch(environment: Mapping[str, str], gpus: int | None) -> None:
    """Raise UserError when the launch cannot give the processes that were asked for; before any of them waits.

    Args:
        environment: of this process.
        gpus: those this process sees; None for a run on CPUs.
    """
    # Accelerate's launcher starts one process on a CPU, however many it was asked for; all it leaves is an address.
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "MASTER_ADDR" in environment and not any(name in environment for name in COUNTS):
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does on a CPU. For N processes: "
            f"{TORCHRUN}; for one: --num_processes 1, and MASTER_ADDR not set."
        )
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if gpus is not None and here > gpus:
        raise UserError(
            f"{here} processes were started on this machine, which shows {gpus} GPUs. Start one a GPU, or set "
            "ACCELERATE_USE_CPU=true to train on CPUs."
        )


def check_processes(environment: Mapping[str, str], made: int) -> None:
    """Raise UserError when a launcher started more processes than Accelerate put together.

    Each would take itself for the only one: it would train the whole run, and all would write to one folder.
    """
    asked = {name: int(environment[name]) for name in COUNTS if environment.get(name, "").isdigit()}
    most = max(asked, key=lambda name: asked[name], default=None)
    if made == 1 and most is not None and asked[most] > 1:
        raise UserError(
            f"The launcher started {asked[most]} processes ({most}), and each takes itself for the only one. "
            f"Start them with {TORCHRUN}, or with accelerate launch --multi_gpu."
        )


def check_alike(settings: dict[str, Any], fingerprint: str, step: int) -> None:
    """Raise NotAlikeError when the processes of a run differ in what they are about to do. All must call it.

    Args:
        settings: of this process, as plain values.
        fingerprint: of its data.
        step: where it goes on from, as it read the run's folder.
    """
    mine = {name: value for name, value in _flat(settings) if name not in OWN}
    first, *others = gather_objects((mine, fingerprint, step))
    for number, (theirs, data, start) in enumerate(others, 1):
        for name in sorted(first[0].keys() | theirs.keys()):
            ours, other = first[0].get(name), theirs.get(name)
            if ours != other:
                raise NotAlikeError(
                    f"Process {number} has {name}={other}, the first {ours}. Give all the same settings."
                )
        if data != first[1]:
            raise NotAlikeError(f"Process {number} found other data than the first. Give all the same data folder.")
        if start != first[2]:
            raise NotAlikeError(
                f"Process {number} would start from step {start:,}, the first from step {first[2]:,}: they read "
                "different folders. Name a run_dir that all machines share, and start all from the same place."
            )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def rank() -> int:
    """This process among those of the run, as its launcher numbered it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def process_name() -> str:
    """` (process 3)` for a message of a process that is not the main one, nothing for that of the main one."""
    return f" (process {rank()})" if rank() else ""


def speaks_for(error: UserError) -> bool:
    """Whether this process is the one to print an error that others meet, too.

    Until the processes are joined, an error is one of the command line or the machine: one process a machine prints it.
    A CommonError is met by all of them together. Any other error may be this process's own.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return os.environ.get("LOCAL_RANK", "0") == "0"
    return rank() == 0 or not isinstance(error, CommonError)


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether an error of PyTorch's says that another process of the run does not answer any more."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    # gloo raises a bare RuntimeError.
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
