"""All that is known of one run: what its folder holds, and what its model makes of the data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from pipelines import Info
from pipelines.arrays import Arrays, open_arrays
from semi_fast.reporting.probe import Probe, probe
from semi_fast.reporting.runlog import RunLog, read_log
from semi_fast.run.saved import DataFacts, Step, Trained, find_facts, load_trained, read_config
from semi_fast.training.evaluate import class_groups


@dataclass
class RunData:
    """One run. What could not be had is None, and a sentence in `notes` or under `why` says why.

    config: settings as plain values, {} where unreadable. summary: of a finished run. why: reason by what is missing
    ("facts", "model", "data"). chosen: step of the checkpoint that was asked for; None: none in particular.
    """

    folder: Path
    config: dict[str, Any]
    log: RunLog
    summary: dict[str, Any] | None
    facts: DataFacts | None = None
    trained: Trained | None = None
    arrays: Arrays | None = None
    probe: Probe | None = None
    notes: list[str] = field(default_factory=list)
    why: dict[str, str] = field(default_factory=dict)
    chosen: int | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def info(self) -> Info | None:
        """The facts about the data set, as far as they are known."""
        return self.facts.info if self.facts else None

    @property
    def method(self) -> str:
        """The method's name; "?" where the settings cannot be read."""
        return str(self.get("method.name", "?"))

    def get(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def order(self) -> list[int]:
        """Classes from the one with the most labeled images to the one with the fewest."""
        counts = self.info.labeled_counts if self.info else ()
        return sorted(range(len(counts)), key=lambda k: -counts[k])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, fit for a drawing: no control characters, not longer than 18 letters."""
        return list(_labels(self.info.class_names)) if self.info else []

    @property
    def groups(self) -> dict[str, list[int]]:
        """Classes of "many", "medium" and "few"."""
        return class_groups(self.info.labeled_counts) if self.info else {}

    @property
    def has_test_labels(self) -> bool:
        """Whether there is anything to measure accuracy on."""
        return self.info is None or self.info.num_test > 0

    def confusion(self) -> NDArray[np.int64] | None:
        """(K, K), rows true, of the reported head after the last step, or of the checkpoint that was asked for."""
        saved = self.summary.get("confusion") if self.summary and self.chosen is None else None
        if saved is not None:
            return np.asarray(saved, np.int64)
        if self.probe is None or self.probe.test is None or self.info is None:
            return None
        return confusion_of(self.probe.test.labels, next(iter(self.probe.test.classes.values())), self.info.num_classes)


def confusion_of(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Counts (K, K) of true class (rows) and predicted class; unknown labels (-1) are left out."""
    known = labels >= 0
    cells = np.bincount(labels[known] * classes + predicted[known], minlength=classes * classes)
    return cells.reshape(classes, classes)


@lru_cache(maxsize=8)
def _labels(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(label(name) for name in names)


def label(name: str, most: int = 18) -> str:
    """A class name fit for a drawing."""
    clean = "".join(letter if letter.isprintable() else " " for letter in name).strip() or "(no name)"
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def gather_run(folder: Path, *, look: bool = True, data: Path | None = None, step: Step = None) -> RunData:
    """Everything about the run in a folder.

    Args:
        folder: the run's folder, finished or not.
        look: whether to run the model over the data for confusion, embeddings and pictures.
        data: the data folder; None: the one of the settings.
        step: of the checkpoint; "best", or None: the newest.

    Raises: UserError when the folder is no run at all (neither settings nor log), or has no checkpoint of that step.
    """
    config, problem = _config(folder)
    log = read_log(folder / "log.jsonl")
    run = RunData(folder, config, log, _summary(folder))
    if problem:
        run.notes.append(problem)
    run.notes += [*_state(run), *log.problems]
    try:
        run.facts = find_facts(folder, data or run.get("data.path", ""))
    except UserError as error:
        run.why["facts"] = str(error)
        run.notes.append(f"What is known of the data is missing: {error}")
    if look:
        _look(run, data, step)
    return run


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        return read_config(folder), ""
    except UserError as error:
        if (folder / "log.jsonl").exists() or (folder / "checkpoints").is_dir():
            return {}, f"The settings are missing: {error}"
        raise


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _state(run: RunData) -> list[str]:
    """Sentences about a run that is not finished."""
    if run.summary is not None:
        return []
    if (run.folder / "summary.json").exists():
        return ["summary.json cannot be read: the closing figures are missing."]
    steps = run.get("steps")
    done = f"{run.log.last_step:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")
    path = run.folder / "log.jsonl"
    when = f"; its log was last written {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}" * path.exists()
    return [f"This run is not finished: {done} steps are logged{when}. The report shows what there is."]


def _look(run: RunData, data: Path | None, step: Step) -> None:
    """Load a checkpoint and the data, and run the one over the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        run.trained = load_trained(run.folder, step=step, data=data, device=device)
    except UserError as error:
        if step is not None:
            raise
        run.why["model"] = str(error)
    else:
        if run.trained.note:
            run.notes.append(run.trained.note)
        if step is not None:
            run.chosen = run.trained.step
            run.notes.append(
                f"Confusion, accuracy of the classes, embeddings and pictures are those of step {run.chosen:,}; "
                "curves and closing figures are those of the whole run."
            )
    try:
        run.arrays = _same_data(run, data or Path(run.get("data.path", "")))
    except UserError as error:
        run.why["data"] = str(error)
        run.notes.append(
            f"Pictures and embeddings need the data: {error} Where it has moved, name its folder by --data."
        )
    if run.trained is not None and run.arrays is not None:
        run.probe = probe(run.trained, run.arrays, device)


def _same_data(run: RunData, folder: Path) -> Arrays:
    arrays = open_arrays(folder)
    if run.facts is not None and arrays.info.fingerprint != run.facts.info.fingerprint:
        raise UserError(f"{folder} does not hold the data that the run was trained on (its fingerprint differs).")
    return arrays


def percent(value: Any) -> float:
    """A share as percent; NaN where it is no number."""
    return 100.0 * float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan
