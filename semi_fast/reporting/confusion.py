"""Figure 3: which class is taken for which."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting.drawing import INK, PALETTE, WIDTH, Figure, figure
from semi_fast.reporting.page import Table
from semi_fast.reporting.rundata import RunData

NAMED = 18  # classes whose names fit beside the cells
NUMBERED = 12  # classes whose cells of the confusion matrix carry numbers
CELLS = 160  # cells a side of a drawn confusion matrix; more classes are taken together


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
        if len(names) <= NAMED:
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
