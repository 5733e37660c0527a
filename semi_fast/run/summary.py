"""summary.json and the closing lines: what came out of a run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipelines import Info
from semi_fast.config import Settings
from semi_fast.observe.console import duration
from semi_fast.run.curves import draw_curves
from semi_fast.run.log import write_text
from semi_fast.training.evaluate import Metrics

FILES = ("summary.json", "log.jsonl", "curves.png", f"checkpoints{os.sep}")  # that a user may look for
LAST = 20  # evaluations in the mean that is reported beside best and last


def summarize(
    settings: Settings,
    info: Info,
    history: Sequence[dict[str, Any]],
    last: dict[str, Metrics],
    *,
    seconds: float,
    images_per_s: float,
    skipped: int,
    ceiling: float = 0.0,
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        settings, info: of the run.
        history: one entry an evaluation, oldest first.
        last: figures of the last evaluation by head, the reported one first.
        seconds: wall time over all sessions. images_per_s: images through the network a second.
        skipped: steps left out because something was not finite.
        ceiling: images a second through the network alone; 0 where it was not measured.
    """
    accuracies = [entry["eval/accuracy"] for entry in history]
    recent = accuracies[-LAST:]
    reported = next(iter(last.values()))
    return {
        "data": info.name,
        "method": settings.method.name,
        "seed": settings.seed,
        "accuracy_best": max(accuracies),
        "accuracy_last": accuracies[-1],
        "accuracy_mean20": sum(recent) / len(recent),
        "evaluations_in_mean": len(recent),
        "heads": {name: figures.accuracy for name, figures in last.items()},
        "balanced": reported.balanced,
        "groups": reported.groups,
        "per_class": dict(zip(info.class_names, reported.per_class, strict=True)),
        "confusion": reported.confusion.tolist(),
        "steps": settings.steps,
        "steps_skipped": skipped,
        "seconds": seconds,
        "images_per_s": images_per_s,
        "ceiling_share": images_per_s / ceiling if ceiling else None,
        "data_fingerprint": info.fingerprint,
        "torch": torch.__version__,
    }


def write_results(folder: Path, info: Info, summary: dict[str, Any]) -> None:
    """Write curves.png, then summary.json, whose presence means that the run is finished.

    Raises: UserError when they cannot be written.
    """
    try:
        draw_curves(folder, info.class_names, info.labeled_counts)
        write_text(folder / "summary.json", json.dumps(summary, indent=1))
    except OSError as error:
        raise UserError(
            f"Training is done, but its results cannot be written to {folder}: {error.strerror}. "
            "Make room; the same command then goes on from the newest checkpoint."
        ) from None


def closing_rows(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """The figures that matter, each named for what it is; where everything is; what to do next."""
    groups = ", ".join(f"{name} {value:.1f}" for name, value in summary["groups"].items())
    heads = ", ".join(f"{name} {value:.1f}" for name, value in summary["heads"].items())
    skipped = f" ({summary['steps_skipped']:,} of them skipped)" if summary["steps_skipped"] else ""
    share = summary.get("ceiling_share")
    # More than all of it means that something else kept the machine busy while the ceiling was measured.
    ceiling = f", {100 * share:.0f}% of the model-only ceiling" if share and share <= 1 else ""
    rows = [
        (
            "accuracy",
            f"best {summary['accuracy_best']:.2f}, last {summary['accuracy_last']:.2f}, "
            f"mean of the last {summary['evaluations_in_mean']} evaluations {summary['accuracy_mean20']:.2f}",
        ),
        ("by class size", groups),
        ("by head", heads),
        (
            "speed",
            f"{summary['steps']:,} steps{skipped} in {duration(summary['seconds'])}, "
            f"{summary['images_per_s']:,.0f} images/s{ceiling}",
        ),
    ]
    there = [name for name in FILES if (folder / name).exists()]
    if there:
        rows.append(("written", f"{folder}{os.sep}{', '.join(there)}"))
    run = shlex.quote(str(folder))
    if (folder / "report.html").exists():
        rows.append(("report", f"{folder}{os.sep}report.html"))
    else:
        rows.append(("next", f"python -m semi_fast report {run} --open"))
    rows.append(("next", f"python -m semi_fast predict {run} IMAGES"))
    return rows
