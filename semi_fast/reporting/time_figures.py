"""Where the time of a run goes: the parts of a step, and what comes between steps."""

from __future__ import annotations

from typing import Any

import numpy as np

from semi_fast.reporting.curves_over_time import words
from semi_fast.reporting.drawing import INK, MUTED, SERIES, Figure, figure
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.runlog import series

WHOLE = ("time/step_ms", "time/slowest_step_ms")  # of a step rather than of a part of it
REST = "the rest"


def time_figures(run: RunData) -> list[Figure | None]:
    """Milliseconds of a step by part, and seconds of the run by what was done."""
    parts, whole = step_parts(run), run_parts(run)
    return [
        _bars("time_parts", "Where a step's time goes", parts, "ms", "Mean over the log.") if len(parts) > 1 else None,
        _bars("time_run", "Where the run's time goes", whole, "s", "Sums over the log.") if len(whole) > 1 else None,
    ]


def step_parts(run: RunData) -> dict[str, float]:
    """Mean milliseconds of each part of a step; what no part accounts for is "the rest". {} where not logged."""
    names = [name for name in run.log.names("time/") if name.endswith("_ms") and name not in WHOLE]
    parts = {_title(name, "_ms"): mean for name in names if np.isfinite(mean := _mean(run, name))}
    rest = _mean(run, "time/step_ms") - sum(parts.values())
    return {**parts, REST: rest} if parts and rest > 0 else parts


def run_parts(run: RunData) -> dict[str, float]:
    """Seconds of the training steps and of what came between them over the whole log. {} where not logged."""
    names = [name for name in run.log.names("time/") if name.endswith("_s")]
    between = {_title(name, "_s"): float(np.nansum(series(run.log.train, name)[1])) for name in names}
    step = _mean(run, "time/step_ms")
    if not between or not np.isfinite(step):
        return between
    return {"training steps": step * run.log.last_step / 1000, **between}


def _title(name: str, unit: str) -> str:
    return words(name.removeprefix("time/").removesuffix(unit))


def _mean(run: RunData, name: str) -> float:
    values = series(run.log.train, name)[1]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _bars(name: str, title: str, parts: dict[str, float], unit: str, caption: str) -> Figure:
    total = max(sum(parts.values()), 1e-12)
    colors = [MUTED if part == REST else color for part, color in zip(parts, SERIES * 2, strict=False)]

    def draw(axes: Any) -> None:
        bars = axes.barh(list(parts), list(parts.values()), 0.62, color=colors)
        axes.bar_label(bars, [f"{v:,.3g} {unit}   {100 * v / total:.0f}%" for v in parts.values()], padding=7)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)

    rows = [(part, value, 100 * value / total) for part, value in parts.items()]
    header = ("part", unit, "percent")
    return figure(name, title, draw, header, rows, caption=caption, height=20 + 30 * len(parts))
