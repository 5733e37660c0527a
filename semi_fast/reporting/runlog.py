"""log.jsonl read with patience: a run that is still writing, was killed, or logged what is no number."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Entry = dict[str, Any]


class RunLog(NamedTuple):
    """The lines of a log by kind, ascending in step, the last of a step. `problems` are sentences for the reader."""

    train: list[Entry]
    evaluations: list[Entry]
    problems: list[str]

    @property
    def last_step(self) -> int:
        """The newest step that any line speaks of; 0 where there is none."""
        return max((entry["step"] for entry in (*self.train, *self.evaluations)), default=0)

    @property
    def reported(self) -> str:
        """The prediction that the newest evaluation reports ("ema/standard"), or its first one."""
        newest = self.evaluations[-1] if self.evaluations else {}
        names = (key.removeprefix("eval/").removesuffix("/accuracy") for key in newest if key.count("/") == 3)
        return str(newest.get("reported") or next(names, ""))

    def names(self, prefix: str = "") -> list[str]:
        """Figures of the training lines that start with `prefix`, in the order in which they appear first."""
        return [name for name in _names(self.train) if name.startswith(prefix)]


def read_log(path: Path) -> RunLog:
    """Read a run's log. Missing, cut and foreign lines become `problems`, never an exception."""
    problems: list[str] = []
    kinds: dict[str, dict[int, Entry]] = {"train": {}, "eval": {}}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return RunLog([], [], [f"{path.name} cannot be read ({error.strerror}): no curves."])
    broken = []
    for number, line in enumerate(lines, 1):
        entry = _parse(line)
        if entry is None:
            broken.append(number)
        elif entry["kind"] in kinds:
            kinds[entry["kind"]][entry["step"]] = entry
    if broken == [len(lines)]:
        problems.append("The log's last line is cut: the run was writing it, or was killed while it did.")
    elif broken:
        problems.append(f"{len(broken)} lines of the log are damaged and left out, the first is line {broken[0]}.")
    train, evaluations = ([entries[step] for step in sorted(entries)] for entries in kinds.values())
    log = RunLog(train, evaluations, problems)
    if not log.train and not log.evaluations:
        problems.append("The log is empty so far.")
    scalars = [name for name in _names(log.train) if not any(isinstance(e.get(name), list) for e in log.train)]
    missing = [name for name in scalars if not np.isfinite(series(log.train, name)[1]).all()]
    if missing:
        problems.append(f"The log has values that are no numbers, shown as gaps: {', '.join(missing)}.")
    return log


def series(entries: Sequence[Entry], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the lines that have the figure, (n,) each; NaN where the value is no number."""
    points = [(entry["step"], _number(entry[name])) for entry in entries if name in entry]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, np.float64), np.asarray(values, np.float64)


def _parse(line: str) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(entry, dict) and isinstance(entry.get("kind"), str) and isinstance(entry.get("step"), int)
    return entry if fits else None


def _names(entries: list[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in entry if name not in ("kind", "step", "time")))


def _number(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else math.nan
