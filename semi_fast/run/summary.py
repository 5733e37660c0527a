"""What came out of a run: its evaluations as they are logged, summary.json, and the closing lines."""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.errors import UserError
from pipelines import Info
from semi_fast.config import Settings
from semi_fast.observe.console import duration
from semi_fast.run.log import write_text
from semi_fast.training.evaluate import Metrics

SUMMARY = "summary.json"
FILES = (SUMMARY, "log.jsonl", "curves.png", f"checkpoints{os.sep}")  # that a user may look for
LAST = 20  # evaluations in mean20 and median20
FIGURES = {
    "last": "last",
    "best": "best",
    "mean20": f"mean of the last {LAST}",
    "median20": f"median of the last {LAST}",
}
LOGGED_AS = {"averaged": "ema", "raw": "raw"}  # weights, in the names of logged figures


class Summary(NamedTuple):
    """What came out of a run. Accuracies in percent of the test images.

    `accuracy` is the run's result: the figure that its protocol reports (a name of FIGURES) of the reported prediction,
    `head`, by the reported weights. The four figures beside it are all of that prediction; `balanced`, `groups`,
    `per_class` and `confusion` (K, K, rows true) are of its last evaluation. `chosen_by` says by which images the best
    evaluation was chosen, "test" or "validation", and `validation` is its accuracy on the latter. Chosen by the test
    images, the best accuracy is above what is to be expected of others.
    """

    data: str
    method: str
    protocol: str  # "" without one
    seed: int
    accuracy: float
    figure: str
    head: str
    weights: str  # "averaged" or "raw"
    figures: dict[str, float]  # by the names of FIGURES
    evaluations_in_mean: int  # LAST, or all where there were fewer
    balanced: float
    groups: dict[str, float]  # "many", "medium", "few"
    steps: int
    seconds: float  # wall time over all sessions
    images_per_s: float  # through the network
    heads: Mapping[str, float] = {}  # of the last evaluation, by weights and head: "ema/standard"
    per_class: Mapping[str, float | None] = {}  # by class name; None without test images
    confusion: Sequence[Sequence[int]] = ()
    chosen_by: str = "test"
    validation: float | None = None  # None without validation images
    best_step: int | None = None  # of the best evaluation; None: not known
    steps_skipped: int = 0  # left out because something was not finite
    ceiling_share: float | None = None  # of the rate of the network alone; None where that was not measured
    data_fingerprint: str = ""
    torch: str = ""
    commit: str = ""  # of the code that began the run, or went on with it; see `code_commit`

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, and the figures by names of their own: "accuracy_best"."""
        return {**self._asdict(), **{f"accuracy_{name}": value for name, value in self.figures.items()}}


def logged_name(head: str, weights: str) -> str:
    """How a prediction is called in logs and tables: "ema/standard"."""
    return f"{LOGGED_AS[weights]}/{head}"


def score(entry: Mapping[str, Any]) -> float:
    """How good an evaluation is: its accuracy on validation images or, without such, on test images."""
    return float(entry.get("validation/accuracy", entry["eval/accuracy"]))


def best_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of the best evaluation: how it was chosen, and its step."""
    validation = entry.get("validation/accuracy")
    by = "test" if validation is None else "validation"
    return {"chosen_by": by, "validation": validation, "best_step": entry["step"]}


def closing_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The four figures of a run, from its evaluations, oldest first, one at least. All are accuracies on test images;
    "best" is that of the evaluation of the highest `score`, the earliest of equals."""
    accuracies = [entry["eval/accuracy"] for entry in history]
    recent = accuracies[-LAST:]
    return {
        "last": accuracies[-1],
        "best": max(history, key=score)["eval/accuracy"],
        "mean20": statistics.fmean(recent),
        "median20": statistics.median(recent),
    }


def summarize(
    settings: Settings,
    info: Info,
    history: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Metrics],
    head: str,
    weights: str,
    **more: Any,
) -> Summary:
    """The summary of a run that is done.

    Args:
        settings, info: of the run.
        history: one entry an evaluation, oldest first.
        measured: metrics of the last evaluation by weights and head ("ema/standard").
        head, weights: what is reported. more: the other fields of `Summary`.
    """
    figures = closing_figures(history)
    reported = measured[logged_name(head, weights)]
    return Summary(
        data=info.name,
        method=settings.method.name,
        protocol=settings.protocol,
        seed=settings.seed,
        accuracy=figures[settings.figure],
        figure=settings.figure,
        head=head,
        weights=weights,
        figures=figures,
        evaluations_in_mean=min(LAST, len(history)),
        heads={name: metrics.accuracy for name, metrics in measured.items()},
        balanced=reported.balanced,
        groups=reported.groups,
        per_class=dict(zip(info.class_names, reported.per_class, strict=True)),
        confusion=reported.confusion.tolist(),
        steps=settings.steps,
        data_fingerprint=info.fingerprint,
        torch=torch.__version__,
        **best_of(max(history, key=score)),
        **more,
    )


def write_summary(folder: Path, summary: Summary) -> None:
    """Write summary.json, whose presence means that the run is finished.

    Raises: UserError when it cannot be written.
    """
    try:
        write_text(folder / SUMMARY, json.dumps(summary.to_json(), indent=1))
    except OSError as error:
        raise UserError(
            f"Training is done, but its results cannot be written to {folder}: {error.strerror}. "
            "Make room; the same command then goes on from the newest checkpoint."
        ) from None


def read_summary(folder: Path) -> Summary | None:
    """The summary of the run in a folder; None where it is not finished. Raises: UserError when it is damaged."""
    path = folder / SUMMARY
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Summary(**{name: values[name] for name in Summary._fields if name in values})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"{path} is damaged or of another version ({type(error).__name__}: {error})"
        raise UserError(f"{problem}. Delete {folder} to train it again.") from None


def code_commit() -> str:
    """Short commit of the checkout this code lies in, with `+` when it holds changes; `unknown` outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it is another project's
        return "unknown"
    try:
        name, changed = (
            subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+" if changed else "")


def closing_rows(summary: Summary, folder: Path) -> list[tuple[str, str]]:
    """The figures that matter, each named for what it is; where everything is; what to do next."""
    names = {**FIGURES, "mean20": f"mean of the last {summary.evaluations_in_mean} evaluations"}
    names["median20"] = "their median"
    names["best"] = f"best by {summary.chosen_by} images"
    accuracies = ", ".join(f"{names[name]} {value:.2f}" for name, value in summary.figures.items())
    protocol = f"{summary.protocol}: " if summary.protocol else ""
    skipped = f" ({summary.steps_skipped:,} of them skipped)" if summary.steps_skipped else ""
    steps = f"{summary.steps:,} steps{skipped}"
    share = summary.ceiling_share
    # More than all of it means that something else kept the machine busy while the ceiling was measured.
    ceiling = f", {100 * share:.0f}% of the model-only ceiling" if share and share <= 1 else ""
    rows = [
        ("result", f"{protocol}{summary.accuracy:.2f} ({summary.figure}, {summary.head}, {summary.weights} weights)"),
        ("accuracy", accuracies),
        ("by class size", ", ".join(f"{name} {value:.1f}" for name, value in summary.groups.items())),
        ("by head", ", ".join(f"{name} {value:.1f}" for name, value in summary.heads.items())),
        ("speed", f"{steps} in {duration(summary.seconds)}, {summary.images_per_s:,.0f} images/s{ceiling}"),
    ]
    files = [name for name in FILES if (folder / name).exists()]
    if files:
        rows.append(("written", f"{folder}{os.sep}{', '.join(files)}"))
    run = shlex.quote(str(folder))
    if (folder / "report.html").exists():
        rows.append(("report", f"{folder}{os.sep}report.html"))
    else:
        rows.append(("next", f"python -m semi_fast report {run} --open"))
    rows.append(("next", f"python -m semi_fast predict {run} IMAGES"))
    return rows
