"""The panels of the W&B workspace: which figures stand together, under which title."""

from __future__ import annotations

from typing import NamedTuple

from semi_fast.observe.wandb_run import CONFUSION, PER_CLASS


class Lines(NamedTuple):
    """Figures over the steps, in one panel."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    by_method: bool = False  # one line a method, with the spread over its runs


class Bars(NamedTuple):
    """A closing figure of every run, side by side."""

    title: str
    name: str


class Scatter(NamedTuple):
    """One closing figure against another, a point a run."""

    title: str
    x: str
    y: str


class Table(NamedTuple):
    """A table of the runs, by its key."""

    name: str


class Matrix(NamedTuple):
    """The confusion matrix, by its key."""

    title: str
    name: str


class Differences(NamedTuple):
    """Settings of the runs, those that differ first."""


Panel = Lines | Bars | Scatter | Table | Matrix | Differences


def _each(group: str) -> tuple[str, ...]:
    return tuple(f"eval/ema/{head}/{group}" for head in ("balanced", "standard"))


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Throughput": (
        Lines("Images per second", ("throughput/images_per_s",)),
        Lines("Samples per second", ("throughput/samples_per_s",)),
        Lines("Share of the model-only ceiling", ("throughput/ceiling_share",)),
        Lines(
            "Where a step's time goes (ms)",
            ("time/forward_backward_ms", "time/augment_ms", "time/data_wait_ms", "time/optimizer_ms", "time/bank_ms"),
            log=True,
        ),
        Lines("Step (ms)", ("time/step_ms", "time/slowest_step_ms")),
        Lines("Share of a step spent on the next batch", ("time/data_wait_share",)),
        Lines("Memory (MiB)", ("memory/host_mb", "memory/device_mb")),
        Lines("GPU utilization (%)", ("gpu/utilization",)),
        Lines("Evaluation and checkpoints (s)", ("time/evaluation_s", "time/checkpoint_s")),
    ),
    "Learning": (
        Lines("Test accuracy (%)", ("eval/accuracy",)),
        Lines("Accuracy of both heads, averaged weights (%)", _each("accuracy")),
        Lines("Accuracy of both heads, raw weights (%)", tuple(n.replace("ema", "raw") for n in _each("accuracy"))),
        Lines("Many: classes with most labels (%)", _each("many")),
        Lines("Medium (%)", _each("medium")),
        Lines("Few: classes with fewest labels (%)", _each("few")),
        Lines("Loss", ("loss/total",), log=True),
        Lines(
            "Parts of the loss",
            tuple(f"loss/{part}" for part in ("labeled", "unlabeled", "ea", "balanced_labeled", "balanced_unlabeled")),
            log=True,
        ),
        Lines("Learning rate", ("optim/lr",)),
        Lines("Steps left out", ("guard/skipped",)),
        Matrix("Confusion matrix", f"{CONFUSION}_table"),
        Table(PER_CLASS),
    ),
    "Pseudo-labels": (
        Lines("Used (share of the unlabeled images)", ("pseudo/used", "pseudo/balanced_used")),
        Lines("Easy, hard and ultra-hard (share)", ("pseudo/easy", "pseudo/hard", "pseudo/ultra_hard")),
        Lines("Right, of those used (%)", ("pseudo/accuracy",)),
        Lines("Right, by class size (%)", tuple(f"pseudo/accuracy_{group}" for group in ("many", "medium", "few"))),
        Lines("Distance of their classes from the hidden ones", ("pseudo/class_gap",)),
        Lines("Mean confidence", ("pseudo/confidence",)),
        Lines("Mean hardness weight of those used", ("pseudo/hardness",)),
        Lines("Mean weight of the semantic pseudo-label", ("pseudo/mixing",)),
    ),
    "Memory bank": (
        Lines("Slots in use (share)", ("bank/fill",)),
        Lines("Stored confidence: quantiles 0.1, 0.5, 0.9", tuple(f"bank/confidence_q{q}" for q in (10, 50, 90))),
        Lines("Time of the bank in a step (ms)", ("time/bank_ms",)),
    ),
    "Comparison across runs": (
        Lines("Test accuracy by method, mean and spread over runs (%)", ("eval/accuracy",), by_method=True),
        Bars("Accuracy, mean of the last 20 evaluations (%)", "accuracy_mean20"),
        Bars("Best accuracy (%)", "accuracy_best"),
        Bars("Images per second", "images_per_s"),
        Scatter("Accuracy (%) against seconds", "seconds", "accuracy_last"),
        Differences(),
    ),
}


def keys_of(panel: Panel) -> tuple[str, ...]:
    """The keys a panel shows."""
    if isinstance(panel, Lines):
        return panel.names
    if isinstance(panel, Scatter):
        return panel.x, panel.y
    return () if isinstance(panel, Differences) else (panel.name,)
