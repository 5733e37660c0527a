"""A run's folder opened again: its settings, the facts of its data, and the trained method with its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import yaml

from data_prep.errors import UserError, unknown
from data_prep.files import replacing
from data_prep.folder.manifest import Manifest, read_manifest
from data_prep.recipes.catalog import CATALOG
from pipelines import Info, read_info
from semi_fast.config import Settings, resolve
from semi_fast.methods import Method, build_method
from semi_fast.nets import build_net
from semi_fast.run.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, load_checkpoint, newest_checkpoint

CONFIG, DATA = "config.yaml", "data.json"
Weights = Literal["ema", "raw"]
Step = int | Literal["best"] | None  # of a checkpoint; None: the newest
STEP_HELP = "Step of the checkpoint, or best: of the highest accuracy at an evaluation. Default: the newest."


class DataFacts(NamedTuple):
    """What a run knows of its data without the data folder.

    split, source and command are the manifest's; resize_filter is what images of another size go through ("box" or
    "bilinear").
    """

    info: Info
    split: dict[str, Any]
    source: str
    command: str
    resize_filter: str


class Trained(NamedTuple):
    """A method with the weights of a checkpoint, in eval mode, and what came with them.

    step: optimizer steps done. note: "" or what the checkpoint lacks, in one sentence.
    """

    method: Method
    facts: DataFacts
    settings: Settings
    weights: Weights
    step: int
    checkpoint: Checkpoint
    note: str


def facts_from(data: str | Path) -> DataFacts:
    """The facts about the data set in a folder. Raises UserError when there is none, or it is damaged."""
    manifest = read_manifest(data)
    return DataFacts(read_info(data), manifest.split, manifest.source, manifest.command, resize_filter(manifest))


def resize_filter(manifest: Manifest) -> str:
    """The filter that the data set's recipe resizes by."""
    entry = CATALOG.get(str(manifest.split.get("dataset")))
    defaults = entry.defaults if entry is not None and entry.defaults is not None else {}
    return str(defaults.get("filter_name", "box"))


def write_facts(folder: Path, facts: DataFacts) -> None:
    """Keep the facts in the run's folder, so that the run is of use where its data is not."""
    with replacing(folder / DATA) as file:
        file.write(json.dumps({**facts._asdict(), "info": facts.info._asdict()}, indent=1).encode())


def read_facts(folder: Path) -> DataFacts | None:
    """The facts kept in a run's folder; None when there are none (runs of older versions).

    Raises: UserError for a file that is damaged.
    """
    path = folder / DATA
    try:
        raw = json.loads(path.read_text())
        info: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in raw.pop("info").items()
        }
        return DataFacts(info=Info(**info), **raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{path} is damaged or of another version ({error})"
        raise UserError(f"{problem}. Delete it to read the data folder instead.") from None


def find_facts(folder: Path, data: str | Path) -> DataFacts:
    """The facts kept in the run's folder or, where there are none, those of the data folder `data`.

    Raises: UserError when neither has them.
    """
    return read_facts(folder) or facts_from(data)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run as plain values, unchecked.

    Raises: UserError when the folder holds no run, or its config.yaml cannot be read.
    """
    path = folder / CONFIG
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        near = f" Runs there: {', '.join(names)}." if (names := _runs_near(folder)) else ""
        raise UserError(f"{folder} is no run's folder ({CONFIG} is missing). Name a folder of runs/.{near}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold `key: value` lines, got a {type(raw).__name__}.")
    return raw


def load_trained(
    folder: Path,
    *,
    weights: Weights = "ema",
    step: Step = None,
    data: Path | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Build a run's method and load a checkpoint into it.

    Args:
        folder: the run's folder.
        weights: "ema", the averaged ones that are reported, or "raw".
        step: of the checkpoint; "best": the one of the highest accuracy; None: the newest undamaged one.
        data: data folder to take the facts from where the run kept none; None: the one the run was trained on.

    Raises: UserError when the folder is no run, has no checkpoint (of that step), or is of another version.
    """
    raw = read_config(folder)
    try:
        settings = resolve(raw)
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is of another version of this program: {error}") from None
    checkpoint = _checkpoint(folder, step, device)
    facts = find_facts(folder, data or settings.data.path)
    net = build_net(**settings.net.model_dump())
    method = build_method(settings.method.name, net, facts.info, **settings.method.options)
    note = _fill(method, checkpoint, weights, folder)
    return Trained(method.to(device).eval(), facts, settings, weights, checkpoint.step, checkpoint, note)


def weights_named(name: str) -> Weights:
    """ "ema" or "raw" as a command line gives it. Raises: UserError for another word."""
    for known in get_args(Weights):
        if name == known:
            return known
    raise unknown("kind of weights", name, get_args(Weights))


def step_named(text: str | None) -> Step:
    """A step as a command line gives it: a number, "best", or nothing. Raises: UserError for anything else."""
    if text is None or text == "best":
        return text  # type: ignore[return-value]
    if text.isascii() and text.isdigit():
        return int(text)
    raise UserError(f"--step must be a number of steps or 'best', got '{text}'.")


def _checkpoint(folder: Path, step: Step, device: torch.device | str) -> Checkpoint:
    place = folder / "checkpoints"
    if step == "best":
        best = best_checkpoint(place)
        if best is None:
            raise UserError(f"{folder} has no checkpoint of an evaluated step yet. Leave --step out for the newest.")
        return load_checkpoint(best, device)
    if step is None:
        found = newest_checkpoint(place, device)
        if found is None:
            raise UserError(f"{folder} has no checkpoint yet: the run saves one every save_every steps.")
        return found
    known = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(place)}
    if step not in known:
        there = ", ".join(str(n) for n in known) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}. Steps there: {there}.")
    return load_checkpoint(known[step], device)


def _fill(method: Method, checkpoint: Checkpoint, weights: Weights, folder: Path) -> str:
    """Load the weights; returns a note when statistics (never parameters) are missing."""
    state = dict(checkpoint.tensors["model"])
    if weights == "ema":
        state |= checkpoint.tensors["ema"]
    own = method.state_dict()
    wrong = [name for name, tensor in state.items() if name in own and own[name].shape != tensor.shape]
    needed = {name for name in own if name.startswith("net.")} | {name for name, _ in method.named_parameters()}
    lacking = own.keys() - state.keys()
    if wrong or (needed & lacking):
        first = sorted([*wrong, *(needed & lacking)])[0]
        raise UserError(
            f"The checkpoint of step {checkpoint.step} in {folder} does not fit this version of the method "
            f"({first} differs). Use the version that trained it."
        )
    method.load_state_dict({name: tensor for name, tensor in state.items() if name in own}, strict=False)
    return f"The checkpoint was saved by an older version: it has no {', '.join(sorted(lacking))}." if lacking else ""


def _runs_near(folder: Path) -> list[str]:
    for place in (folder, folder.parent):
        if place.is_dir():
            found = sorted(str(path.parent) for path in place.glob(f"*/{CONFIG}"))
            if found:
                return found[:8]
    return []
