"""What a checkpoint holds of a run, when there is no room for one, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from data_prep.errors import UserError
from pipelines import Loaders
from semi_fast.config import Settings
from semi_fast.run.checkpoint import (
    Checkpoint,
    is_full,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from semi_fast.run.folder import check_same
from semi_fast.run.summary import score
from semi_fast.training.optim import optimizer_tensors, restore_optimizer
from semi_fast.training.step import Trainer

VERSIONS = ("torch", "numba", "numpy", "semi-fast")  # whatever computes or draws numbers


def save_run(
    folder: Path,
    step: int,
    trainer: Trainer,
    data: Loaders,
    progress: dict[str, Any],
    accel: Accelerator,
    cfg: Settings,
) -> bool:
    """Write a checkpoint of a run; returns whether there was room for it. Call it in one process only.

    Args:
        folder: the run's `checkpoints/`. step: optimizer steps done. cfg: the run's settings.
        progress: "history" of evaluations, and whatever else is to be given back; JSON-able.
    """
    history, info = progress["history"], data.info
    values = {
        **progress,
        "settings": cfg.model_dump(),
        "environment": environment(accel),
        "data_fingerprint": info.fingerprint,
        "class_names": info.class_names,
        "scaler": accel.scaler.state_dict() if accel.scaler is not None else None,
        "restarted": trainer.restarted,
    }
    measured = score(history[-1]) if history and history[-1]["step"] == step else None
    try:
        save_checkpoint(folder, step, tensors_of(trainer, data), values, score=measured, keep=cfg.keep)
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        return False
    return True


def resume_run(
    folder: Path, trainer: Trainer, data: Loaders, accel: Accelerator, run: Settings, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """Take over the newest undamaged checkpoint; returns its step and values, 0 and none where the run starts anew.

    `say` takes a line about damaged ones, and about what has changed since.

    Raises: UserError when it is one of other settings, other data or another version, or all are damaged.
    """
    newest = None if run.resume == "never" else newest_checkpoint(folder, accel.device, say)
    if newest is None:
        return 0, {}
    now, then = environment(accel), newest.values["environment"]
    check_same(run, newest.values, data.info, folder.parent, other_world=now["processes"] != then["processes"])
    restore(newest, trainer, data)
    if accel.scaler is not None and newest.values["scaler"]:
        accel.scaler.load_state_dict(newest.values["scaler"])
    for line in changes(now, then, run, newest.values["settings"]):
        say(line)
    return newest.step, newest.values


def way_on(folder: Path, on_nonfinite: str) -> str:
    """What can be done about a run that diverged: the last good one of its `checkpoints/` is named, the newest."""
    good = list_checkpoints(folder)
    where = f"The last good checkpoint is {good[-1]}." if good else "No checkpoint had been saved."
    other = "another run_dir with a lower optim.lr, or precision=fp32"
    if on_nonfinite == "skip" or not good:
        return f"{where} Start anew in {other}."
    return f"{where} Go on from there with on_nonfinite=skip, or start anew in {other}."


def tensors_of(trainer: Trainer, data: Loaders) -> dict[str, dict[str, Tensor]]:
    """The tensors of a run by group and name: parameters and statistics, averages, the optimizer's, labels chosen."""
    groups = {
        "model": dict(trainer.method.state_dict()),
        "ema": trainer.ema.state_dict(),
        "optimizer": optimizer_tensors(trainer.method, trainer.optimizer),
    }
    if data.relabeled:
        rows, labels = data.labeled
        groups["labeled"] = {"rows": torch.from_numpy(rows), "labels": torch.from_numpy(labels)}
    return groups


def restore(checkpoint: Checkpoint, trainer: Trainer, data: Loaders) -> None:
    """Put back what `tensors_of` took out.

    Raises: UserError when the tensors are those of another version of the method.
    """
    tensors, step = checkpoint.tensors, checkpoint.step
    trainer.restarted = checkpoint.values["restarted"]
    # A checkpoint from between two stages is of the one that ends.
    trainer.regroup(trainer.stages.at(max(0, step - 1)).number)
    try:
        trainer.method.load_state_dict(tensors["model"])
        trainer.ema.load_state_dict(tensors["ema"])
        restore_optimizer(trainer.method, trainer.optimizer, tensors["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The checkpoint of step {step:,} does not fit this version of the method ({reason}). "
            "Go on with the version that saved it, or start anew in another run_dir."
        ) from None
    if "labeled" in tensors:
        data.relabel(*(tensors["labeled"][name].cpu().numpy() for name in ("rows", "labels")))


def environment(accel: Accelerator) -> dict[str, Any]:
    """What besides the settings decides the last bit of a result: versions, device, threads, precision, processes."""
    on_gpu = accel.device.type == "cuda"
    return {
        **{name: version(name) for name in VERSIONS},
        "device": torch.cuda.get_device_name(accel.device) if on_gpu else accel.device.type,
        "threads": None if on_gpu else torch.get_num_threads(),
        "precision": accel.mixed_precision,
        "processes": accel.num_processes,
    }


def changes(now: dict[str, Any], then: dict[str, Any], settings: Settings, saved: dict[str, Any]) -> list[str]:
    """Lines to say on resumption about what has changed since and is allowed to.

    Args:
        now, then: `environment` of this process, and the one that was saved.
        settings, saved: the settings of this run, and the saved ones as plain values.
    """
    found = [f"{key} {now[key]}, saved with {then[key]}" for key in now if now[key] != then[key]]
    lines = []
    if found:
        lines.append(f"changed since the checkpoint: {'; '.join(found)}. The run goes on, though not to the same bits.")
    before, after = saved["batch"] * then["processes"], settings.batch * now["processes"]
    if before != after:
        lines.append(
            f"warning: a step now has {after:,} labeled images over all processes, and had {before:,} "
            f"({then['processes']} x {saved['batch']}): the learning rate was chosen for those. "
            + (
                f"batch={before // now['processes']} keeps them."
                if before % now["processes"] == 0
                else "No batch keeps them with this number of processes."
            )
        )
    return lines
