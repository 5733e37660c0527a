"""Checkpoints: safetensors and JSON in `<run_dir>/checkpoints/step-<n>/`, complete or absent.

A checkpoint is written into a temporary folder, fsynced, and renamed; `state.json` holds the sizes and SHA-256 of the
tensor files, so a damaged one is recognized before anything of it is used. Nothing is pickled. What is saved does not
depend on the number of processes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep import files as disk
from data_prep.errors import UserError

FORMAT = 1
STATE = "state.json"


class Checkpoint(NamedTuple):
    """What was saved: tensors by group ("model", "ema", "optimizer", ...) and name, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    *,
    score: float | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder/step-<step>`, then delete all but the newest `keep` and the best.

    Args:
        folder: the run's `checkpoints/`; made when missing.
        step: those of later steps are deleted too: the run has gone on from an earlier one than they.
        tensors: groups of tensors; each becomes one safetensors file.
        values: JSON-able values.
        score: how good the model is, more is better; None when it was not evaluated at this step.

    Returns: the new checkpoint's folder.
    Raises: OSError or SafetensorError when it cannot be written (see `is_full`); those before it are untouched.
    """
    target = folder / f"step-{step:09d}"
    temporary = folder / f"{target.name}.tmp-{os.getpid()}"
    clear_leftovers(folder)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, step, tensors, values, score)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        _delete(target)
    temporary.rename(target)
    disk.fsync_path(folder)
    keep_newest(folder, step, keep)
    return target


def keep_newest(folder: Path, step: int, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`, the best, and none later than that of `step`."""
    for path in list_checkpoints(folder):
        if path.name > f"step-{step:09d}":
            _delete(path)
    best = best_checkpoint(folder)
    for old in list_checkpoints(folder)[:-keep]:
        if old != best:
            _delete(old)


def clear_leftovers(folder: Path) -> None:
    """Delete what processes that were killed while saving or deleting have left in a run's `checkpoints/`."""
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover)


def _delete(path: Path) -> None:
    # Out of sight first: a process killed within leaves no half of a checkpoint that would look like a damaged one.
    hidden = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _write(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any], score: float | None
) -> None:
    files = {}
    for group, named in tensors.items():
        path = folder / f"{group}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, path)
        disk.fsync_path(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": disk.sha256_of(path)}
    state = folder / STATE
    content = {"format": FORMAT, "step": step, "score": score, "files": files, "values": values}
    state.write_text(json.dumps(content, indent=1))
    disk.fsync_path(state)
    disk.fsync_path(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints/`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and (path / STATE).is_file())


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest score in a run's `checkpoints/`, the earliest of equals; None without scores."""
    scores = {path: score for path in list_checkpoints(folder) if (score := _score(path)) is not None}
    return max(scores, key=lambda path: scores[path], default=None)


def _score(path: Path) -> float | None:
    try:
        score = json.loads((path / STATE).read_text()).get("score")
    except (OSError, ValueError, AttributeError):  # damaged: never the best
        return None
    return float(score) if isinstance(score, (int, float)) else None


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read and check one checkpoint.

    Raises: UserError when it is of another format, incomplete or damaged.
    """
    try:
        state = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise UserError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}.")
        for name, entry in state["files"].items():
            if disk.sha256_of(path / name) != entry["sha256"]:
                raise UserError(
                    f"{path / name} is damaged (its SHA-256 is not the one in {STATE}). "
                    f"Delete {path} to resume from an older one."
                )
        where = str(device).replace("cpu:0", "cpu")  # as a process of several is told, and safetensors does not know
        tensors = {Path(name).stem: load_file(path / name, device=where) for name in state["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no complete checkpoint ({error}). Delete it to resume from an older one.") from None
    return Checkpoint(state["step"], tensors, state["values"])


def newest_checkpoint(
    folder: Path, device: torch.device | str = "cpu", say: Callable[[str], None] = print
) -> Checkpoint | None:
    """The newest undamaged checkpoint of a run; None when the run has none at all.

    Raises: UserError when all are damaged. Where some are, `say` takes a line about each.
    """
    problem: UserError | None = None
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path, device)
        except UserError as error:
            problem = error
            say(f"warning: {error}")
    if problem is not None:
        raise problem
    return None


def is_full(error: Exception) -> bool:
    """Whether an error of `save_checkpoint` says that there is no room: disk, quota, or file size limit."""
    if isinstance(error, SafetensorError):  # carries the system's error as text alone
        return any(f"(os error {number})" in str(error) for number in disk.FULL)
    return isinstance(error, OSError) and disk.is_full(error)
