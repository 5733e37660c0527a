"""Figures over classes: how many images each has, how well it is recognized (5), and which is taken for which (3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting.drawing import HEIGHT, INK, MUTED, PALETTE, SERIES, WIDTH, Figure, figure, line, log_scale
from semi_fast.reporting.page import Table
from semi_fast.reporting.rundata import RunData

NAMED = 40  # classes that are named below the axis; more are drawn over their rank
NAMED_CELLS = 18  # classes whose names fit beside the cells of a confusion matrix
NUMBERED = 12  # classes whose cells carry numbers
CELLS = 160  # cells a side of a drawn confusion matrix; more classes are taken together


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
    """Values of each class, in the order given: a dot a class and series; where they are many, with a smooth line.

    marks: values (K,) by series name; NaN where unknown. log: a logarithmic scale. zero: a line at 0.
    """
    few = len(names) <= NAMED
    if not few:
        caption = f"{caption} A dot a class; the lines are means over neighbors in this order.".strip()

    def draw(axes: Any) -> None:
        x = np.arange(1, len(names) + 1)
        for (series, values), color in zip(marks.items(), colors, strict=False):
            y = np.asarray(values, float)
            y = np.where(y > 0, y, np.nan) if log else y
            size, alpha = (6.5, 0.85) if few else (2.6, 0.35)
            axes.plot(x, y, "o", ms=size, alpha=alpha, color=color, mec="none", label=series if few else None)
            if not few:
                line(axes, x, moving_mean(y, max(3, len(y) // 20)), color, label=series)
        if few:
            axes.set_xticks(x, names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.tick_params(axis="x", labelcolor=INK, length=0, labelsize=min(11, 320 / len(names)))
        else:
            axes.set_xlabel("class, by its number of labeled images, most first", labelpad=2)
        if log:
            log_scale(axes)
        elif not zero:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        if zero:
            axes.axhline(0, color=MUTED, lw=1)
        axes.set_title(unit)

    rows = [(name, *values) for name, *values in zip(names, *marks.values(), strict=True)]
    height = HEIGHT + (4 * max(map(len, names)) if few else 0)
    return figure(name, title, draw, ("class", *marks), rows, caption=caption, height=height)


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


def count_figure(run: RunData, name: str = "class_counts", title: str = "Images of each class") -> Figure | None:
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
    return by_class(name, title, run, marks, unit, log=log, colors=colors)


def confusion_figure(run: RunData, counts: NDArray[np.int64], name: str, title: str) -> Figure:
    """Figure 3: share of each true class (row) by predicted class (column), classes by labeled images."""
    names, counts = [run.class_names[k] for k in run.order], counts[np.ix_(run.order, run.order)]
    shares, step = merged(counts.astype(float), CELLS)

    def draw(axes: Any) -> None:
        # Opacity, not a color map: the page behind it may be light or dark.
        rgba = np.empty((*shares.shape, 4))
        rgba[..., :3] = [int(PALETTE["c0"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        rgba[..., 3] = np.nan_to_num(shares) ** 0.5
        axes.imshow(rgba, extent=(0, len(names), len(names), 0), interpolation="nearest", aspect="auto")
        if len(names) <= NAMED_CELLS:
            axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90 if max(map(len, names)) > 2 else 0)
            axes.set_yticks(np.arange(len(names)) + 0.5, names)
        if len(names) <= NUMBERED:
            for (i, j), share in np.ndenumerate(shares):
                if share >= 0.005:
                    color = PALETTE["card"] if share > 0.45 else INK
                    axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=color, gid="cell")
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_title("true ↓   predicted →")

    caption = "Percent of each true class; darkened by the square root of the share."
    if step > 1:
        caption = f"{caption} A cell stands for {step} x {step} classes, by labeled images, most first."
    rows = [(name, *row) for name, row in zip(names, counts.tolist(), strict=True)]
    return figure(name, title, draw, ("true", *names), rows, caption=caption, height=WIDTH)


def merged(counts: NDArray[np.float64], most: int) -> tuple[NDArray[np.float64], int]:
    """Row shares of a confusion matrix in [0, 1], neighbors taken together until at most `most` a side; and how many.

    Rows without images are NaN.
    """
    step = -(-len(counts) // most)
    padded = np.pad(counts, (0, -len(counts) % step))
    side = len(padded) // step
    blocks = padded.reshape(side, step, side, step).sum((1, 3))
    with np.errstate(invalid="ignore"):
        return blocks / blocks.sum(1, keepdims=True), step


def confused_pairs(run: RunData, counts: NDArray[np.int64], most: int = 10) -> Table | None:
    """The classes most often taken for another one."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    if run.info is None or not wrong.any():
        return None
    total = counts.sum(1)
    names, cells = run.info.class_names, np.argsort(-wrong, axis=None, kind="stable")[:most]
    places = [divmod(int(cell), len(wrong)) for cell in cells]
    numbers = [(i, j, wrong[i, j]) for i, j in places if wrong[i, j]]
    rows = [(names[i], names[j], f"{count:,}", f"{100 * count / total[i]:.1f}") for i, j, count in numbers]
    caption = "Test images, and percent of the true class's."
    return Table(("true", "taken for", "images", "%"), rows, (2, 3), title="Most frequent confusions", caption=caption)
