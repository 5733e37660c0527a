"""The panels of the W&B workspace: which figures stand together, and under which title where they are several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from semi_fast.observe.metrics import FIGURES, title
from semi_fast.observe.wandb_run import CONFUSION, PER_CLASS
from semi_fast.parts.figures import Figure


class Lines(NamedTuple):
    """Figures over the steps, in one panel; a name with `*` stands for all that fit."""

    names: tuple[str, ...]
    title: str = ""  # default: that of its only figure
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


def _one(*names: str) -> tuple[Lines, ...]:
    return tuple(Lines((name,)) for name in names)


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Throughput": (
        *_one("throughput/images_per_s", "throughput/samples_per_s", "throughput/ceiling_share"),
        Lines(
            ("time/forward_backward_ms", "time/augment_ms", "time/data_wait_ms", "time/optimizer_ms"),
            "Where a step's time goes (ms)",
            log=True,
        ),
        Lines(("time/step_ms", "time/slowest_step_ms"), "Step (ms)"),
        *_one("time/data_wait_share"),
        Lines(("memory/host_mb", "memory/device_mb"), "Memory (MiB)"),
        *_one("gpu/utilization"),
        Lines(("time/evaluation_s", "time/checkpoint_s"), "Evaluation and checkpoints (s)"),
    ),
    "Learning": (
        *_one("eval/accuracy"),
        Lines(("eval/ema/*/accuracy",), "Test accuracy of every head, averaged weights (%)"),
        Lines(("eval/raw/*/accuracy",), "Test accuracy of every head, raw weights (%)"),
        Lines(("eval/ema/*/many",), "Many: classes with most labels (%)"),
        Lines(("eval/ema/*/medium",), "Medium (%)"),
        Lines(("eval/ema/*/few",), "Few: classes with fewest labels (%)"),
        Lines(("loss/total",), log=True),
        Lines(("loss/*",), "Parts of the loss", log=True),
        *_one("optim/lr", "guard/skipped"),
        Matrix("Confusion matrix", f"{CONFUSION}_table"),
        Table(PER_CLASS),
    ),
    "Pseudo-labels": (
        *_one("pseudo/used"),
        Lines(("pseudo/easy", "pseudo/hard", "pseudo/ultra_hard"), "Easy, hard and ultra-hard (share)"),
        *_one("pseudo/accuracy"),
        Lines(("pseudo/accuracy_*",), "Right, by class size (%)"),
        *_one("pseudo/class_gap", "pseudo/confidence"),
    ),
    "Method": (),  # a panel each for what the methods declare
    "Comparison across runs": (
        Lines(("eval/accuracy",), "Test accuracy by method, mean and spread over runs (%)", by_method=True),
        Bars("Accuracy, mean of the last 20 evaluations (%)", "accuracy_mean20"),
        Bars("Best accuracy (%)", "accuracy_best"),
        Bars("Images per second", "images_per_s"),
        Scatter("Accuracy (%) against seconds", "seconds", "accuracy_last"),
        Differences(),
    ),
}


def sections(declared: Iterable[Figure]) -> dict[str, tuple[Panel, ...]]:
    """All panels by section, those of figures that methods declare among them."""
    method = {figure.name: Lines((figure.name,), title(figure)) for figure in declared if figure not in FIGURES}
    return {**SECTIONS, "Method": tuple(method.values())}
