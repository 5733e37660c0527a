"""Figures over classes: how many images each has and how well it is recognized (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting.drawing import (
    GRID,
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Figure,
    figure,
    label_ends,
    line,
    log_scale,
    unit_label,
)
from semi_fast.reporting.rundata import RunData

FEW = 40  # classes that get a line each; more are drawn over their rank


def dots(
    name: str,
    title: str,
    names: Sequence[str],
    marks: Mapping[str, Sequence[float]],
    unit: str,
    *,
    colors: Sequence[str] = SERIES,
    log: bool = False,
    zero: bool = False,
    caption: str = "",
) -> Figure:
    """Values of each class, in the order given: a line a class with a dot a series, or over the rank where many.

    marks: values (K,) by series name; NaN where unknown. log: a logarithmic scale. zero: a line at 0.
    """
    table = [(name, *values) for name, *values in zip(names, *marks.values(), strict=True)]
    many = len(names) > FEW
    if many:
        draw = _over_rank(marks, unit, log, colors)
        caption = f"{caption} A dot a class; the lines are means over neighbors in this order.".strip()
        size: dict[str, Any] = {"right": 16 + round(6.2 * max(map(len, marks)))}
    else:
        left = 22 + round(6.6 * max(map(len, names)))
        columns = max(1, int((WIDTH - left) // (28 + 6.2 * max(map(len, marks)))))
        top = 36 + 17 * ((len(marks) - 1) // columns)
        draw = _a_line_each(names, marks, unit, log, colors, columns)
        size = {"left": left, "right": 22, "top": top, "bottom": 38, "height": top + 38 + 19 * len(names)}

    def draw_all(axes: Any) -> None:
        draw(axes)
        if zero:
            (axes.axhline if many else axes.axvline)(0, color=MUTED, lw=1)

    return figure(name, title, draw_all, ("class", *marks), table, caption=caption, **size)


def _a_line_each(
    names: Sequence[str], marks: Mapping[str, Sequence[float]], unit: str, log: bool, colors: Any, columns: int
) -> Any:
    def draw(axes: Any) -> None:
        rows = np.arange(len(names))
        values = np.array([list(map(float, row)) for row in marks.values()])
        values = np.where(values > 0, values, np.nan) if log else values
        known = np.isfinite(values).any(0)
        low, high = np.nanmin(values[:, known], 0), np.nanmax(values[:, known], 0)
        axes.hlines(rows[known], low, high, color=GRID, lw=3, zorder=1)
        for name, row, color in zip(marks, values, colors, strict=False):
            axes.plot(row, rows, "o", ms=6.5, color=color, mec="none", zorder=2, label=name)
        axes.set_yticks(rows, names)
        axes.tick_params(axis="y", labelcolor=INK, pad=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        if log:
            log_scale(axes.xaxis)
        else:
            low, high = np.nanmin(values, initial=0.0), np.nanmax(values, initial=0.0)
            room = 0.03 * max(high - low, 1e-9)
            axes.set_xlim(low - room, high + room)
        spacing = {"handletextpad": 0.1, "columnspacing": 1.0, "borderaxespad": 0.3, "borderpad": 0}
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK, **spacing)
        axes.set_xlabel(unit, labelpad=2)

    return draw


def _over_rank(marks: Mapping[str, Sequence[float]], unit: str, log: bool, colors: Any) -> Any:
    def draw(axes: Any) -> None:
        ends = []
        for (name, values), color in zip(marks.items(), colors, strict=False):
            y = np.asarray(values, float)
            y = np.where(y > 0, y, np.nan) if log else y
            x = np.arange(1, len(y) + 1)
            axes.plot(x, y, "o", ms=2.6, color=color, alpha=0.35, mec="none")
            smooth = moving_mean(y, max(3, len(y) // 20))
            line(axes, x, smooth, color)
            ends.append((float(x[-1]), float(smooth[-1]), name, color))
        if log:
            log_scale(axes.yaxis)
        axes.set_xlim(0, len(x) + 1)
        axes.set_xlabel("class, by its number of labeled images, most first", labelpad=2)
        unit_label(axes, unit)
        label_ends(axes, ends)

    return draw


def moving_mean(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Mean of the finite values within size / 2 places of each; NaN where there is none."""
    half = size // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else np.nan for part in parts])


def by_class(
    name: str, title: str, run: RunData, marks: Mapping[str, Sequence[float]], unit: str, **style: Any
) -> Figure:
    """Values (K,) of each class by series, classes from the most to the fewest labeled images; style: see `dots`."""
    labels, order = run.class_names, run.order
    ordered = {key: [values[k] for k in order] for key, values in marks.items()}
    return dots(name, title, [labels[k] for k in order], ordered, unit, **style)


def count_figure(run: RunData) -> Figure | None:
    """Labeled and unlabeled images of each class."""
    if run.facts is None:
        return None
    marks = {"labeled": run.facts.info.labeled_counts}
    if run.facts.unlabeled_counts is not None:
        marks["unlabeled"] = run.facts.unlabeled_counts
    every = [count for counts in marks.values() for count in counts if count]
    log = bool(every) and max(every) > 20 * min(every)
    unit = f"images{', logarithmic' if log else ''}"
    colors = (SERIES[1], SERIES[0])
    return by_class("class_counts", "Images of each class", run, marks, unit, log=log, colors=colors)
