"""preview.png: a few images of each class, and how many are labeled and unlabeled."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import replacing

SHOWN = 10  # images a class
INK, LABELED, UNLABELED = "#1f2933", "#d1495b", "#30638e"


def write_preview(
    path: Path,
    title: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    labeled_counts: Sequence[int],
    unlabeled_counts: Sequence[int] | None,
    unlabeled_total: int,
) -> None:
    """Draw the contact sheet (one line a class, or a few images of each for many classes) over the bars of counts.

    Args:
        images: (N, H, W, 3) uint8, memory-mapped or not.
        labels: (N,) class or -1.
        unlabeled_counts: None where the classes of the unlabeled images are unknown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    classes = len(class_names)
    columns = 1 if classes <= 12 else 3 if classes <= 40 else 6
    shown = {1: SHOWN, 3: 5, 6: 3}[columns]
    lines = -(-classes // columns)
    height = 0.62 * lines + 0.5
    figure = Figure(figsize=(11, height + 3.9), facecolor="white", layout="constrained")
    sheet, bars = figure.subplots(2, 1, height_ratios=[height, 3.2])
    figure.suptitle(title, fontsize=13, color=INK, fontweight="bold", x=0.012, ha="left")
    _draw_sheet(sheet, images, labels, class_names, columns, shown)
    _draw_bars(bars, class_names, labeled_counts, unlabeled_counts, unlabeled_total)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    with replacing(path) as file:
        file.write(buffer.getvalue())


def _draw_sheet(
    axes: Any, images: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str], columns: int, shown: int
) -> None:
    side, gap = images.shape[1], max(1, images.shape[1] // 16)
    cell, label_room = side + gap, int((1.1 if columns == 1 else 2.6) * side)
    block = label_room + shown * cell + 2 * gap
    lines = -(-len(names) // columns)
    canvas = np.full((lines * cell, columns * block, 3), 255, np.uint8)
    for k, name in enumerate(names):
        line, column = k % lines, k // lines
        top, left = line * cell, column * block
        short = name if len(name) <= 22 else name[:21] + "…"
        axes.text(left, top + side / 2, short, ha="left", va="center", fontsize=10 if columns == 1 else 7, color=INK)
        for place, row in enumerate(np.flatnonzero(labels == k)[:shown]):
            x = left + label_room + place * cell
            canvas[top : top + side, x : x + side] = images[row]
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()


def _draw_bars(
    axes: Any, names: Sequence[str], labeled: Sequence[int], unlabeled: Sequence[int] | None, unlabeled_total: int
) -> None:
    places, width = np.arange(len(names)), 0.4
    few = len(names) <= 20
    groups = [("labeled", labeled, LABELED)]
    if unlabeled is not None:
        groups.append(("unlabeled", unlabeled, UNLABELED))
    for number, (name, counts, color) in enumerate(groups):
        shift = width * (number - (len(groups) - 1) / 2)
        drawn = axes.bar(places + shift, counts, width, color=color, label=f"{name}: {sum(counts):,}")
        if few:
            axes.bar_label(drawn, [f"{c:,}" for c in counts], fontsize=7, color=INK, padding=1)
    if unlabeled is None:
        axes.bar([], [], color=UNLABELED, label=f"unlabeled, classes unknown: {unlabeled_total:,}")
    every = [count for _, counts, _ in groups for count in counts if count]
    if max(every) > 50 * min(every):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7 * min(every))
    axes.margins(x=0.01, y=0.12)
    if few:
        axes.set_xticks(places, names, rotation=20 if max(map(len, names)) > 6 else 0, fontsize=9, color=INK)
    else:
        axes.set_xlabel("class", color=INK)
    axes.set_ylabel("images", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
