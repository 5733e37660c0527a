"""A run's folder opened again: its settings, the facts of its data, and the trained method with its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from data_prep.errors import UserError, unknown
from pipelines import Info
from pipelines.reading import DataFacts, read_facts
from semi_fast.config import Settings, read_run_config, resolve
from semi_fast.methods import Method, build_method
from semi_fast.nets import build_net
from semi_fast.nets.weights import described, misfits
from semi_fast.run.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint
from semi_fast.run.log import write_text
from semi_fast.run.summary import SUMMARY

DATA = "data.json"
Weights = Literal["averaged", "raw"]
Step = int | Literal["best"] | None  # of a checkpoint; None: the newest


class Trained(NamedTuple):
    """A method with the weights of a checkpoint, in eval mode, and what came with them. step: optimizer steps done."""

    method: Method
    facts: DataFacts
    settings: Settings
    weights: Weights
    step: int

    @torch.no_grad()
    def logits(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) of normalized images (n, 3, H, W) by head, the reported one first."""
        logits, reported = self.method.predict(images), self.method.reported
        return {reported: logits[reported], **logits}


def write_facts(folder: Path, facts: DataFacts) -> None:
    """Keep the facts in the run's folder, so that the run is of use where its data is not."""
    write_text(folder / DATA, json.dumps({**facts._asdict(), "info": facts.info._asdict()}, indent=1))


def run_facts(folder: Path, data: str | Path) -> DataFacts:
    """The facts kept in a run's folder or, where there are none, those of the data folder `data`.

    Raises: UserError when neither has them, or the file is damaged.
    """
    path = folder / DATA
    try:
        raw = json.loads(path.read_text())
        info = Info(**{key: _as_tuple(value) for key, value in raw.pop("info").items()})
        return DataFacts(info=info, **{key: _as_tuple(value) for key, value in raw.items()})
    except FileNotFoundError:
        return read_facts(data)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{path} is damaged or of another version ({error})"
        raise UserError(f"{problem}. Delete it to read the data folder instead.") from None


def load_trained(
    folder: Path,
    *,
    weights: Weights | None = None,
    step: Step = None,
    data: Path | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Build a run's method and load a checkpoint into it.

    Args:
        folder: the run's folder.
        weights: None: those that the method reports.
        step: of the checkpoint; "best": the one of the highest `score`; None: the newest undamaged one.
        data: data folder to take the facts from where the run kept none; None: the one the run was trained on.

    Raises: UserError when the folder is no run, has no checkpoint (of that step), or is of another version.
    """
    raw = read_run_config(folder)
    try:
        settings = resolve(raw)
    except UserError as error:
        raise UserError(f"The settings of {folder} are of another version of this program: {error}") from None
    checkpoint = _checkpoint(folder, step, device)
    facts = run_facts(folder, data or settings.data.path)
    net = build_net(**settings.net.structure(), info=facts.info)
    method = build_method(settings.method.name, net, facts.info, **settings.method.options)
    chosen = weights or method.weights
    try:
        method.load_state_dict(_tensors(checkpoint, chosen))
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint of step {checkpoint.step} in {folder} does not fit this version of the method "
            f"({' '.join(str(error).split())}). Use the version that trained it."
        ) from None
    return Trained(method.to(device).eval(), facts, settings, chosen, checkpoint.step)


def load_start(folder: Path, weights: Weights) -> dict[str, Tensor]:
    """The weights at the end of a finished run, parameters and buffers by name, on the CPU.

    Raises: UserError when the run is not finished, or has no checkpoint of its last step.
    """
    settings = read_run_config(folder)
    if not (folder / SUMMARY).exists():
        raise UserError(f"start_from={folder} is not finished ({SUMMARY} is missing). Let it run to its end first.")
    checkpoint = _checkpoint(folder, settings.get("steps"), "cpu")
    if weights == "averaged" and not checkpoint.tensors.get("ema"):
        raise UserError(f"start_from={folder} has no averaged weights. Start from start_weights=raw.")
    return _tensors(checkpoint, weights)


def fit_start(method: Method, tensors: Mapping[str, Tensor]) -> str:
    """Copy weights of another run into a method: its network, and every head that both have by the same name.

    Returns: a line about what was not taken over; "" when that is nothing.
    Raises: UserError, before anything is copied, which names what does not fit.
    """
    current = method.state_dict()
    shared = {_part(name) for name in current} & {_part(name) for name in tensors}
    parts = {"net", *(part for part in shared if part.startswith("heads."))}
    wanted, given = ({name for name in names if _part(name) in parts} for names in (current, tensors))
    problems = misfits({name: current[name] for name in wanted}, {name: tensors[name] for name in given})
    if problems:
        raise UserError(f"The weights of start_from do not fit: {problems}. Name a run of the same net and classes.")
    with torch.no_grad():
        for name in wanted:
            current[name].copy_(tensors[name])
    rest = {"as initialized": current.keys() - wanted, "not taken over": tensors.keys() - given}
    text = described({what: sorted({_part(name) for name in names}) for what, names in rest.items()})
    return text and f"start_from: {text}"


def weights_named(name: str | None) -> Weights | None:
    """Weights as a command line gives them, None where it gives none. Raises: UserError for another word."""
    if name is not None and name not in get_args(Weights):
        raise unknown("kind of weights", name, get_args(Weights))
    return name  # type: ignore[return-value]


def step_named(text: str | None) -> Step:
    """A step as a command line gives it: a number, "best", or nothing. Raises: UserError for anything else."""
    if text is None or text == "best":
        return text  # type: ignore[return-value]
    if text.isascii() and text.isdigit():
        return int(text)
    raise UserError(f"--step must be a number of steps or 'best', got '{text}'.")


def _checkpoint(folder: Path, step: Step, device: torch.device | str) -> Checkpoint:
    checkpoints = folder / "checkpoints"
    if step == "best":
        best = best_checkpoint(checkpoints)
        if best is None:
            raise UserError(f"{folder} has no checkpoint of an evaluated step yet. Leave --step out for the newest.")
        return load_checkpoint(best, device)
    if step is None:
        newest = newest_checkpoint(checkpoints, device)
        if newest is None:
            raise UserError(f"{folder} has no checkpoint yet: the run saves one every save_every steps.")
        return newest
    known = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(checkpoints)}
    if step not in known:
        steps = ", ".join(map(str, known)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}. Steps there: {steps}.")
    return load_checkpoint(known[step], device)


def _tensors(checkpoint: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    model = checkpoint.tensors["model"]
    averaged = checkpoint.tensors["ema"] if weights == "averaged" else {}
    return {**model, **{name: tensor for name, tensor in averaged.items() if name in model}}


def _part(name: str) -> str:
    """What a tensor belongs to: "heads.balanced", "bank"."""
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
