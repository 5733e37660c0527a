"""Figure 3: which class is taken for which."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting.drawing import INK, MUTED, PALETTE, WIDTH, Figure, figure
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.sections import Table

NAMED = 18  # classes whose names fit beside the cells
NUMBERED = 12  # classes whose cells of the confusion matrix carry numbers
CELLS = 160  # cells a side of a drawn confusion matrix; more classes are taken together


def confusion_figure(run: RunData, counts: NDArray[np.int64], name: str, title: str) -> Figure:
    """Figure 3: share of each true class (row) by predicted class (column), classes by labeled images."""
    order = run.order
    labels = run.class_names
    names = [labels[k] for k in order]
    shares, step = merged(counts[np.ix_(order, order)].astype(float), CELLS)
    few = len(names) <= NAMED
    left = 22 + round(6.6 * max(map(len, names))) if few else 34
    bottom = left if few and len(names) > NUMBERED else 26
    if few and max(map(len, names)) > 3:
        bottom = left

    def draw(axes: Any) -> None:
        if len(names) <= NUMBERED:
            _cells(axes, shares)
        else:
            rgba = np.empty((*shares.shape, 4))
            rgba[..., :3] = [int(PALETTE["c0"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
            rgba[..., 3] = np.nan_to_num(shares) ** 0.5
            axes.imshow(rgba, extent=(0, len(names), len(names), 0), interpolation="nearest", aspect="auto")
        if few:
            axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90 if bottom == left else 0)
            axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.set_xlim(0, len(names))
        axes.set_ylim(len(names), 0)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
        axes.annotate("true ↓   predicted →", (0, 1), (0, 6), xycoords="axes fraction",
                      textcoords="offset pixels", color=MUTED)  # fmt: skip

    caption = "Percent of each true class."
    if step > 1:
        caption = (
            f"Classes by labeled images, most first; a cell stands for {step} x {step}, darkened by the square root."
        )
    elif len(names) > NUMBERED:
        caption = "Classes by labeled images, most first; darkened by the square root of the share."
    table = [(names[i], *row) for i, row in enumerate(counts[np.ix_(order, order)].tolist())]
    width = WIDTH
    height = 22 + bottom + (width - left - 14)
    size: dict[str, Any] = {"left": left, "bottom": bottom, "top": 22, "height": height}
    return figure(name, title, draw, ("true", *names), table, caption=caption, **size)


def _cells(axes: Any, shares: NDArray[np.float64]) -> None:
    from matplotlib.patches import Rectangle

    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if not share > 0:
                continue
            # Opacity, not a color map: the page behind it may be light or dark.
            axes.add_patch(
                Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, color=PALETTE["c0"], alpha=float(share) ** 0.7, lw=0)
            )
            if share >= 0.005:
                color = PALETTE["card"] if share > 0.45 else INK
                axes.text(j + 0.5, i + 0.5, f"{100 * share:.0f}", ha="center", va="center", color=color, gid="cell")


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
    rows = []
    for cell in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        i, j = divmod(int(cell), len(wrong))
        if wrong[i, j]:
            rows.append(
                (
                    run.info.class_names[i],
                    run.info.class_names[j],
                    f"{wrong[i, j]:,}",
                    f"{100 * wrong[i, j] / total[i]:.1f}",
                )
            )
    caption = "Test images, and percent of the true class's."
    return Table(("true", "taken for", "images", "%"), rows, (2, 3), title="Most frequent confusions", caption=caption)
