"""Where the time of a run goes: the parts of a step, and what comes between steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from semi_fast.reporting.drawing import INK, MUTED, SERIES, Figure, figure
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.runlog import series

PARTS = {
    "data_wait_ms": "waiting for data",
    "augment_ms": "augmentation",
    "forward_backward_ms": "forward and backward",
    "optimizer_ms": "optimizer and EMA",
}
BETWEEN = {"evaluation_s": "evaluation", "checkpoint_s": "checkpoints"}


def time_figures(run: RunData) -> list[Figure | None]:
    """Milliseconds of a step by part, and seconds of the run by what was done."""
    parts = step_parts(run)
    whole = run_parts(run)
    return [
        _bars("time_parts", "Where a step's time goes", parts, "ms", "Mean over the log.") if len(parts) > 1 else None,
        _bars("time_run", "Where the run's time goes", whole, "s", "Sums over the log.") if len(whole) > 1 else None,
    ]


def step_parts(run: RunData) -> dict[str, float]:
    """Mean milliseconds of each part of a step; what no part accounts for is "the rest". {} where not logged."""
    mean = {name: _mean(run, f"time/{name}") for name in (*PARTS, "step_ms")}
    found = {title: mean[name] for name, title in PARTS.items() if np.isfinite(mean[name])}
    if found and np.isfinite(mean["step_ms"]):
        rest = mean["step_ms"] - sum(found.values())
        if rest > 0:
            found["the rest"] = rest
    return found


def run_parts(run: RunData) -> dict[str, float]:
    """Seconds of training, evaluation and checkpoints over the whole log. {} where not logged."""
    found = {}
    entries = [*run.log.train, *run.log.evaluations]
    for name, title in BETWEEN.items():
        values = series(entries, f"time/{name}")[1]
        if np.isfinite(values).any():
            found[title] = float(np.nansum(values))
    step = _mean(run, "time/step_ms")
    if found and np.isfinite(step):
        found = {"training steps": step * run.log.last_step / 1000, **found}
    return found


def _mean(run: RunData, name: str) -> float:
    values = series(run.log.train, name)[1]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _bars(name: str, title: str, parts: dict[str, float], unit: str, caption: str) -> Figure:
    total = sum(parts.values())

    def draw(axes: Any) -> None:
        for place, (color, value) in enumerate(zip(SERIES * 2, parts.values(), strict=False)):
            axes.barh(place, value, 0.62, color=MUTED if list(parts)[place] == "the rest" else color)
            text = f"{value:,.3g} {unit}   {100 * value / max(total, 1e-12):.0f}%"
            axes.annotate(text, (value, place), (7, 0), textcoords="offset pixels", va="center", color=INK)
        axes.set_yticks(range(len(parts)), list(parts))
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(parts) - 0.4, -0.6)
        axes.set_xlim(0, 1.0 * max(parts.values()) or 1)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    rows = [(part, value, 100 * value / max(total, 1e-12)) for part, value in parts.items()]
    size: dict[str, Any] = {"left": 142, "right": 92, "top": 6, "bottom": 8, "height": 20 + 30 * len(parts)}
    return figure(name, title, draw, ("part", unit, "percent"), rows, caption=caption, **size)
