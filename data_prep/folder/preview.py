"""preview.png: a few images of each class, and how many are labeled and unlabeled."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import replacing

MOST_CLASSES = 240  # drawn; more would be specks
WIDTH = 11.0  # inches
CAPTION_LETTERS, TICK_LETTERS = 15, 24
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
    """Draw the contact sheet over the bars of counts.

    Args:
        images: (N, H, W, 3) uint8, memory-mapped or not.
        labels: (N,) class or -1.
        unlabeled_counts: None where the classes of the unlabeled images are unknown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    canvas, captions = _contact_sheet(images, labels, class_names)
    height = (WIDTH - 0.3) * canvas.shape[0] / canvas.shape[1]
    figure = Figure(figsize=(WIDTH, height + 4.0), facecolor="white", layout="constrained")
    sheet, bars = figure.subplots(2, 1, height_ratios=[height, 3.3])
    figure.suptitle(_plain(title), fontsize=13, color=INK, fontweight="bold", x=0.012, ha="left")
    sheet.imshow(canvas, interpolation="nearest")
    sheet.set_anchor("W")
    sheet.set_axis_off()
    for left, middle, name in captions:
        sheet.text(left, middle, name, va="center", fontsize=10 if len(class_names) <= 12 else 7, color=INK)
    _draw_bars(bars, class_names, labeled_counts, unlabeled_counts, unlabeled_total)
    buffer = io.BytesIO()
    with _missing_glyphs():
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    with replacing(path) as file:
        file.write(buffer.getvalue())


def _short(name: str, letters: int) -> str:
    """A name in one line of at most so many letters."""
    line = " ".join(name.split())
    return line if len(line) <= letters else line[: letters - 1] + "…"


def _plain(name: str) -> str:
    """A class name as matplotlib prints it letter by letter: two dollar signs are no formula."""
    return name.replace("$", r"\$")


@contextmanager
def _missing_glyphs() -> Iterator[None]:
    """Within: letters that matplotlib's font lacks become boxes, without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def _contact_sheet(
    images: NDArray[np.uint8], labels: NDArray[np.int64], names: Sequence[str]
) -> tuple[NDArray[np.uint8], list[tuple[float, float, str]]]:
    """The first images of each class, a line a class, in one to six columns; and the captions (x, y, class name)."""
    columns, shown, caption_cells = (1, 15, 2) if len(names) <= 12 else (3, 5, 2) if len(names) <= 40 else (6, 3, 4)
    names = names[:MOST_CLASSES]
    side = images.shape[1]
    gap = max(1, side // 16)
    cell, lines = side + gap, -(-len(names) // columns)
    block = (caption_cells + shown) * cell + 2 * gap
    canvas = np.full((lines * cell, columns * block - 2 * gap, 3), 255, np.uint8)
    captions = []
    for k, name in enumerate(names):
        top, left = (k % lines) * cell, (k // lines) * block
        captions.append((left, top + side / 2, _plain(_short(name, CAPTION_LETTERS))))
        for column, row in enumerate(np.flatnonzero(labels == k)[:shown], caption_cells):
            canvas[top : top + side, left + column * cell : left + column * cell + side] = images[row]
    return canvas, captions


def _draw_bars(
    axes: Any, names: Sequence[str], labeled: Sequence[int], unlabeled: Sequence[int] | None, unlabeled_total: int
) -> None:
    positions, few_classes = np.arange(len(names)), len(names) <= 20
    groups = [("labeled", labeled, LABELED)]
    if unlabeled is not None:
        groups.insert(0 if not few_classes else 1, ("unlabeled", unlabeled, UNLABELED))
    for number, (name, counts, color) in enumerate(groups):
        # Few classes: bars side by side, with their numbers. Many: the labeled ones drawn, slim, over the unlabeled.
        shift, width = (0.4 * (number - (len(groups) - 1) / 2), 0.4) if few_classes else (0.0, (0.9, 0.5)[number])
        drawn = axes.bar(positions + shift, counts, width, color=color, label=f"{name}: {sum(counts):,}")
        if few_classes:
            axes.bar_label(drawn, [f"{c:,}" for c in counts], fontsize=7, color=INK, padding=1)
    if unlabeled is None:
        axes.bar([], [], color=UNLABELED, label=f"unlabeled, classes unknown: {unlabeled_total:,}")
    every = [count for _, counts, _ in groups for count in counts if count]
    if max(every) > 50 * min(every):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7 * min(every))
    axes.margins(x=0.01, y=0.12)
    if few_classes:
        names = [_short(name, TICK_LETTERS) for name in names]
        axes.set_xticks(
            positions,
            [_plain(name) for name in names],
            rotation=20 if max(map(len, names)) > 6 else 0,
            fontsize=9,
            color=INK,
        )
    else:
        axes.set_xlabel("class", color=INK)
    axes.set_ylabel("images", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
