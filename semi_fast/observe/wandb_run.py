"""A run at Weights & Biases: figures with their steps and summaries, tables and the report; trouble ends it alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import Info
from semi_fast.training.evaluate import class_groups

STEP = "step"  # the x-axis of every figure
PER_CLASS, CONFUSION = "per_class", "confusion"  # keys of the two tables
BEST = {"eval/*": "max", "pseudo/accuracy*": "max", "loss/total": "min", "pseudo/class_gap": "min"}  # kept, too
FILES = ("report.html", "curves.png", "summary.json", "config.yaml")  # of the run's folder, those that exist
MOST_BINS = 512  # of a histogram at W&B
MOST_CELLS = 10_000  # of a table that W&B draws a chart from


class WandbTracker:
    """Records figures at W&B. Whatever W&B raises is said once; the run then goes on without it.

    Args:
        run: what `wandb.init` returned.
        say: takes one line about trouble.
        logged: the last step that is there already; a run that goes on comes by those since its checkpoint again.
    """

    def __init__(self, run: Any, say: Callable[[str], None], logged: int = 0) -> None:
        self._run, self._say, self._logged = run, say, logged
        self._defined: set[str] = set()
        self._try(lambda: run.define_metric(STEP, hidden=True))

    def log(self, data: Mapping[str, Any], step: int) -> None:
        """Record all figures of a step, which is later than any before; one number a class becomes a histogram."""
        if step > self._logged:
            self._try(lambda: self._log(data, step))

    def publish(self, summary: dict[str, Any], info: Info, unlabeled: Sequence[int] | None, folder: Path) -> None:
        """Record what came out: the closing figures, accuracy by class, the confusion matrix, the report's files.

        Args:
            summary: what summary.json holds.
            unlabeled: (K) unlabeled images a class; None where their classes are unknown.
            folder: the run's.
        """
        self._try(lambda: self._publish(summary, info, unlabeled, folder))

    def finish(self) -> None:
        """Close the run."""
        self._try(lambda: self._run.finish())

    def _try(self, act: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # whatever it is: training matters more than its record
            self._run = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"warning: W&B failed and records nothing more ({reason}); log.jsonl goes on.")

    def _log(self, data: Mapping[str, Any], step: int) -> None:
        for name in data.keys() - self._defined:
            self._define(name, per_class=isinstance(data[name], list))
        shown = {name: _histogram(value) if isinstance(value, list) else value for name, value in data.items()}
        # W&B's own step is the run's, too: a row it has already is then never added a second time.
        row = {STEP: step, **{name: value for name, value in shown.items() if value is not None}}
        self._run.log(row, step=step, commit=True)

    def _define(self, name: str, *, per_class: bool) -> None:
        self._defined.add(name)
        kept = [*(extreme for pattern, extreme in BEST.items() if fnmatchcase(name, pattern)), "last"]
        self._run.define_metric(name, step_metric=STEP, summary="none" if per_class else ",".join(kept))

    def _publish(self, summary: dict[str, Any], info: Info, unlabeled: Sequence[int] | None, folder: Path) -> None:
        import wandb

        numbers = {name: value for name, value in summary.items() if isinstance(value, (int, float))}
        self._run.summary.update(numbers)
        rows = confusion_rows(summary["confusion"], info.class_names)
        table = wandb.Table(columns=["Actual", "Predicted", "nPredictions"], data=rows)
        fields = {name: name for name in ("Actual", "Predicted", "nPredictions")}
        chart = wandb.plot_table("wandb/confusion_matrix/v1", table, fields, {"title": "Confusion matrix"})
        # W&B keeps the table of a chart under the chart's key and "_table".
        confusion = {CONFUSION: chart} if len(rows) <= MOST_CELLS else {f"{CONFUSION}_table": table}
        by_class = per_class_table(summary["per_class"], info, unlabeled)
        self._run.log({PER_CLASS: by_class, **confusion}, step=summary["steps"] + 1, commit=True)
        artifact = wandb.Artifact(f"{self._run.id}-report", type="report", description=f"Results of {folder.name}")
        for name in FILES:
            if (folder / name).exists():
                artifact.add_file(str(folder / name))
        self._run.log_artifact(artifact)


def per_class_table(accuracies: Mapping[str, float | None], info: Info, unlabeled: Sequence[int] | None) -> Any:
    """A wandb.Table with one row a class: labeled and unlabeled images, group, test accuracy in percent."""
    import wandb

    group_of = {k: name for name, members in class_groups(info.labeled_counts).items() for k in members}
    rows = [
        [name, info.labeled_counts[k], unlabeled and unlabeled[k], group_of[k], accuracies[name]]
        for k, name in enumerate(info.class_names)
    ]
    return wandb.Table(columns=["class", "labeled", "unlabeled", "group", "accuracy"], data=rows)


def confusion_rows(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> list[list[Any]]:
    """True class, predicted class and number of each cell; of a matrix too large for a chart those above 0 alone."""
    cells = [[names[i], names[j], n] for i, row in enumerate(confusion) for j, n in enumerate(row)]
    return cells if len(cells) <= MOST_CELLS else [cell for cell in cells if cell[2]]


def _histogram(shares: list[float]) -> Any:
    import wandb

    if len(shares) > MOST_BINS:
        return None
    return wandb.Histogram(np_histogram=(np.asarray(shares), np.arange(len(shares) + 1)))
