"""Figures over training: accuracy, losses, throughput, time, and the use of pseudo-labels (Figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semi_fast.observe.metrics import EASY_FROM
from semi_fast.reporting.drawing import (
    INK,
    MUTED,
    PALETTE,
    SERIES,
    Figure,
    figure,
    label_ends,
    line,
    log_scale,
    steps_axis,
)
from semi_fast.reporting.runlog import Entry, series

KINDS = (
    f"Easy: in use, with a confidence of {EASY_FROM} or more. Hard: in use, below that. "
    "Ultra-hard: not in use, its confidence is below the threshold."
)
GROUPS = {"many": SERIES[0], "medium": SERIES[4], "few": SERIES[1]}


class Curve(NamedTuple):
    """A line of a figure: points (n,) and how to draw it."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    color: str
    style: Mapping[str, Any]


def curve(entries: Sequence[Entry], key: str, name: str, color: str, scale: float = 1.0, **style: Any) -> Curve | None:
    """The curve of a logged figure, or None where the log has no finite value of it."""
    x, y = series(list(entries), key)
    return Curve(name, x, scale * y, color, style) if np.isfinite(y).any() else None


def over_steps(
    name: str,
    title: str,
    curves: Sequence[Curve | None],
    unit: str,
    *,
    limits: tuple[float | None, float | None] = (None, None),
    log: bool = False,
    caption: str = "",
    right: int = 0,
) -> Figure | None:
    """A figure of curves over the training steps, named at their ends; None where there is none to draw.

    limits: of the y axis, None where the data decide. right: margin for the names, 0: as they need.
    """
    shown = [c for c in curves if c is not None]
    if not shown:
        return None
    last = max(float(c.x[-1]) for c in shown)

    def draw(axes: Any) -> None:
        steps_axis(axes, last, unit)
        for c in shown:
            y = np.where(c.y > 0, c.y, np.nan) if log else c.y
            line(axes, c.x, y, c.color, **c.style)
        if log and any((c.y > 0).any() for c in shown):
            log_scale(axes.yaxis)
        axes.set_ylim(*limits)
        if len(shown) > 1 or shown[0].name:
            label_ends(axes, [_end(c, log) for c in shown])

    longest = max(len(c.name) for c in shown)
    rows = [(c.name or title, int(x), y) for c in shown for x, y in zip(c.x, c.y, strict=True)]
    margin = right or 16 + round(6.2 * longest)
    return figure(name, title, draw, ("line", "step", unit), rows, caption=caption, right=margin)


def _end(c: Curve, log: bool) -> tuple[float, float, str, str]:
    good = np.flatnonzero(np.isfinite(c.y) & ((c.y > 0) | (not log)))
    return (float(c.x[good[-1]]), float(c.y[good[-1]]), c.name, c.color) if len(good) else (0.0, np.nan, c.name, INK)


def accuracy_figures(evaluations: Sequence[Entry]) -> list[Figure | None]:
    """Accuracy of every head and of the raw weights; accuracy of the class groups of the reported head."""
    heads = _heads(evaluations)
    curves: list[Curve | None] = []
    for color, head in zip((SERIES[0], SERIES[1], *SERIES[2:]), heads, strict=False):
        width = 2.4 if head == heads[0] else 1.8
        curves.append(curve(evaluations, f"eval/ema/{head}/accuracy", head, color, lw=width))
        curves.append(curve(evaluations, f"eval/raw/{head}/accuracy", f"{head}, raw", color, lw=1.1, ls=(0, (3, 2))))
    reported = f"eval/ema/{heads[0]}/" if heads else ""
    groups = [curve(evaluations, reported + name, name, color) for name, color in GROUPS.items()]
    caption = "Averaged weights (EMA); dashed: the raw weights. The thick line is the reported head."
    thirds = "Mean accuracy of the classes with the most, the middling and the fewest labeled images, a third each."
    unit = "% of the test images"
    return [
        over_steps("accuracy", "Test accuracy", curves, unit, caption=caption if curves else ""),
        over_steps("groups", "Frequent and rare classes", groups, "%, mean of the classes", caption=thirds),
    ]


def _heads(evaluations: Sequence[Entry]) -> list[str]:
    keys = dict.fromkeys(key for entry in evaluations for key in entry)
    return [k.split("/")[2] for k in keys if k.startswith("eval/ema/") and k.endswith("/accuracy")]


def loss_figures(train: Sequence[Entry], names: Sequence[str]) -> list[Figure | None]:
    """The loss and its parts, and the learning rate."""
    parts = [n for n in names if n.startswith("loss/")]
    curves = []
    for number, key in enumerate(parts):
        name = key.removeprefix("loss/").replace("_", " ")
        color = INK if name == "total" else SERIES[(number - 1) % len(SERIES)]
        curves.append(curve(train, key, name, color, lw=2.2 if name == "total" else 1.4))
    rate = [curve(train, "optim/lr", "", SERIES[5])]
    return [
        over_steps("losses", "Loss and its parts", curves, "mean of a log window, logarithmic", log=True),
        over_steps("learning_rate", "Learning rate", rate, "of SGD", limits=(0, None)),
    ]


def throughput_figures(train: Sequence[Entry]) -> list[Figure | None]:
    """Images a second over training; the share of the model's own ceiling; memory."""
    rate = curve(train, "throughput/images_per_s", "", SERIES[0])
    if rate is not None:
        median = float(np.nanmedian(rate.y))
        middle = Curve(
            f"median {median:,.0f}", rate.x, np.full_like(rate.y, median), MUTED, {"lw": 1, "ls": (0, (2, 2))}
        )
    ceiling = curve(train, "throughput/ceiling_share", "", SERIES[2], 100)
    wait = curve(train, "time/data_wait_share", "", SERIES[1], 100)
    memory = [
        curve(train, "memory/host_mb", "host", SERIES[0]),
        curve(train, "memory/device_mb", "device", SERIES[1]),
    ]
    gpu = curve(train, "gpu/utilization", "", SERIES[3])
    unit = "images through the network a second"
    return [
        over_steps("throughput", "Throughput", [rate, middle] if rate else [], unit, limits=(0, None)),
        over_steps("data_wait", "Waiting for data", [wait], "% of the time of training", limits=(0, None)),
        over_steps(
            "ceiling",
            "Share of the ceiling",
            [ceiling],
            "% of the bare model's images a second",
            limits=(0, None),
            caption=_ceiling_caption(ceiling),
        ),
        over_steps("memory", "Memory in use", memory, "MiB", limits=(0, None)),
        over_steps("gpu", "Load of the GPU", [gpu], "%", limits=(0, 100)),
    ]


def _ceiling_caption(ceiling: Curve | None) -> str:
    measured = "The bare model was timed once, at the start."
    if ceiling is None or np.nanmax(ceiling.y) <= 100:
        return measured
    return (
        f"{measured} More than 100% means that other work slowed the machine while it was: these shares are too high."
    )


def pseudo_figures(train: Sequence[Entry]) -> list[Figure | None]:
    """Figure 6: share of the unlabeled images in use, and how many of their pseudo-labels are right; with the rest."""
    used = [
        curve(train, "pseudo/used", "standard head", SERIES[1], 100),
        curve(train, "pseudo/balanced_used", "balanced head", SERIES[0], 100),
    ]
    right = [curve(train, "pseudo/accuracy", "all", INK, lw=2.4)]
    right += [curve(train, f"pseudo/accuracy_{name}", name, color) for name, color in GROUPS.items()]
    kinds = [
        curve(train, "pseudo/easy", "easy", SERIES[2], 100),
        curve(train, "pseudo/hard", "hard", SERIES[4], 100),
        curve(train, "pseudo/ultra_hard", "ultra-hard", SERIES[1], 100),
    ]
    weights = [
        curve(train, "pseudo/confidence", "confidence", SERIES[0]),
        curve(train, "pseudo/hardness", "hardness weight", SERIES[1]),
        curve(train, "pseudo/mixing", "mixing weight", SERIES[3]),
    ]
    bank = [curve(train, "bank/fill", "filled", PALETTE["c2"], lw=2.4)]
    for q, name in (("q90", "confidence, 90%"), ("q50", "median confidence"), ("q10", "confidence, 10%")):
        bank.append(curve(train, f"bank/confidence_{q}", name, SERIES[5], lw=1.2))
    whole = (0, 1.02)
    return [
        over_steps("pseudo_used", "Unlabeled images in use", used, "% of the unlabeled images", limits=(0, 102)),
        over_steps("pseudo_accuracy", "Pseudo-labels that are right", right, "% of those in use", limits=(None, 101)),
        over_steps("pseudo_kinds", "Easy, hard, ultra-hard", kinds, "% of the unlabeled images", caption=KINDS),
        over_steps("pseudo_weights", "Confidence and weights", weights, "mean, 0 to 1", limits=whole),
        over_steps("bank", "The memory bank", bank, "share of its places; confidence", limits=whole),
    ]
