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
from pipelines import Info, Loaders
from semi_fast.config import Settings
from semi_fast.run.checkpoint import (
    Checkpoint,
    clear_leftovers,
    is_full,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from semi_fast.run.folder import check_same
from semi_fast.training.optim import optimizer_tensors, restore_optimizer
from semi_fast.training.step import Trainer

VERSIONS = ("torch", "numba", "numpy", "semi-fast")  # whatever computes or draws numbers


class Saver:
    """The checkpoints of one run.

    Args:
        folder: the run's `checkpoints/`.
        settings, accel, info: the run's settings, processes and device, and data set.
        say: takes one line about what the user should know.
    """

    def __init__(
        self, folder: Path, settings: Settings, accel: Accelerator, info: Info, say: Callable[[str], None]
    ) -> None:
        self.folder, self.settings, self.accel, self.info, self.say = folder, settings, accel, info, say

    def save(self, step: int, trainer: Trainer, data: Loaders, progress: dict[str, Any]) -> bool:
        """Write a checkpoint; returns whether it was written.

        A full disk is said and survived, since the checkpoints before it are still there. Call it in one process only.

        Args:
            step: optimizer steps done.
            progress: "history" of evaluations, and whatever else `resume` is to give back; JSON-able.
        """
        scaler, history = self.accel.scaler, progress["history"]
        values = {
            **progress,
            "settings": self.settings.model_dump(),
            "environment": environment(self.accel),
            "data_fingerprint": self.info.fingerprint,
            "class_names": self.info.class_names,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "restarted": trainer.restarted,
        }
        score = history[-1]["eval/accuracy"] if history and history[-1]["step"] == step else None
        tensors = tensors_of(trainer, data)
        try:
            save_checkpoint(self.folder, step, tensors, values, score=score, keep=self.settings.keep)
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            self.say(f"warning: no checkpoint of step {step:,}: the disk is full. Make room; training goes on.")
            return False
        return True

    def resume(self, trainer: Trainer, data: Loaders) -> tuple[int, dict[str, Any]] | None:
        """Take over the newest undamaged checkpoint; returns its step and values, or None where the run starts anew.

        Raises: UserError when it is one of other settings, other data or another version, or all are damaged.
        """
        if self.settings.resume == "never":
            return None
        newest = newest_checkpoint(self.folder, self.accel.device, self.say)
        if newest is None:
            return None
        now, then = environment(self.accel), newest.values["environment"]
        other_world = now["processes"] != then["processes"]
        check_same(self.settings, newest.values, self.info, self.folder.parent, other_world=other_world)
        restore(newest, trainer, data)
        if self.accel.scaler is not None and newest.values["scaler"]:
            self.accel.scaler.load_state_dict(newest.values["scaler"])
        for line in changes(now, then, self.settings, newest.values["settings"]):
            self.say(line)
        return newest.step, newest.values

    def clear(self) -> None:
        """Delete what killed processes left of checkpoints. Call it in one process only."""
        clear_leftovers(self.folder)

    def way_on(self) -> str:
        """What can be done about a run that diverged: the last good checkpoint is named, the newest."""
        good = list_checkpoints(self.folder)
        where = f"The last good checkpoint is {good[-1]}." if good else "No checkpoint had been saved."
        other = "another run_dir with a lower optim.lr, or precision=fp32"
        if self.settings.on_nonfinite == "skip" or not good:
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
