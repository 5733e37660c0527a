"""Figures that follow the page: vector drawings whose colors are the page's variables, and the same as files.

Every figure is drawn by matplotlib at the size in CSS pixels at which it is shown, with its colors from `PALETTE`. On
the page they are replaced by variables of the style sheet, so that one drawing serves light and dark; as a file the
light colors stay.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# The light colors of the style sheet, after Okabe and Ito: told apart by people of every color vision.
SHEET = Path(__file__).with_name("page.css").read_text()
PALETTE = dict(re.findall(r"--(\w+): (#\w{6});", SHEET[: SHEET.index("@media")]))
SERIES = [PALETTE[f"c{i}"] for i in range(6)]
INK, MUTED, GRID = PALETTE["ink"], PALETTE["muted"], PALETTE["grid"]
WIDTH, HEIGHT, BAND = 360, 230, 26  # px: a panel, and the band above it with the title that only files show

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "semi-fast",
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a class may be named $5
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 11.0),
    "text.color": INK,
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), GRID),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.linewidth": 1.0,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
}

Draw = Callable[[Any], None]
Rows = Iterable[Sequence[Any]]


@dataclass
class Figure:
    """One drawing of the report.

    name: of its files. title, caption: text for the page. svg: for the page, without the title.
    files: contents by suffix.
    """

    name: str
    title: str
    svg: str
    files: dict[str, bytes]
    caption: str = ""


def figure(
    name: str,
    title: str,
    draw: Draw,
    header: Sequence[str],
    rows: Rows,
    *,
    caption: str = "",
    width: int = WIDTH,
    height: int = HEIGHT,
    grid: tuple[int, int] | None = None,
) -> Figure:
    """Draw one panel and its files.

    Args:
        name: of the files, without suffix; what is no letter or digit becomes a `_`. title: in a few words.
        draw: takes matplotlib's axes and draws; what it names by `label=` is listed beside the axes.
        header, rows: the figures behind the drawing, as a table for the CSV file.
        width, height: of the panel in px.
        grid: rows and columns of panels with one y axis; `draw` takes them as an array of axes. None: one panel.
    """
    name = re.sub(r"\W", "_", name)
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # Letters that the font lacks become boxes, without a warning for each.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        total = height + BAND
        canvas = Canvas(figsize=(width / 72, total / 72))
        axes: Any = canvas.subplots(*grid, sharey=True, squeeze=False) if grid else canvas.subplots()
        draw(axes)
        if not grid and axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(1, 1),
                borderaxespad=0,
                labelcolor="linecolor",
                frameon=False,
                handlelength=1,
            )
        canvas.tight_layout(pad=0.3, rect=(0, 0, 1, height / total))
        canvas.text(8 / width, 1 - 17 / total, title, size=13, weight="bold", gid="title")
        svg, png = io.StringIO(), io.BytesIO()
        canvas.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        canvas.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    text = svg.getvalue()
    files = {"svg": text.encode(), "png": png.getvalue(), "csv": table_bytes(header, rows)}
    return Figure(name, title, for_page(text, name, width, total), files, caption)


def for_page(svg: str, name: str, width: int, height: int) -> str:
    """A matplotlib SVG as part of a page: no header, no title band, unique ids, the page's colors and font."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="title">.*?</g>', "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = body.replace('<g id="cell">', '<g class="cell">').replace("xlink:href", "href")
    view = f"0 {BAND} {width} {height - BAND}"
    opening = f'<svg viewBox="{view}" role="img" style="max-width:{1.15 * width:.0f}px">'
    body = re.sub(r"<svg[^>]*>", opening, body, count=1)
    # Ids are local to a file, a page holds many drawings.
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\1{name}-", body)
    body = re.sub(r"font:[^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family:[^;\"]*;?", "", body)
    for variable, color in PALETTE.items():
        body = body.replace(color, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", body).strip()


def table_bytes(header: Sequence[str], rows: Rows) -> bytes:
    """A CSV table; NaN and None become empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if cell is None or cell != cell else cell for cell in row])
    return text.getvalue().encode()


def log_scale(axes: Any) -> None:
    """A logarithmic y axis with plain numbers; 1, 2 and 5 of each decade are marked where few decades are shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """1,500 -> 1.5k, 2,000,000 -> 2M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def line(axes: Any, x: Any, y: Any, color: str, **more: Any) -> None:
    """A line; a single point, or one between gaps, is drawn as a dot, since a line through it would not be seen."""
    axes.plot(x, y, color=color, **{"lw": 1.8, "solid_capstyle": "round", **more})
    finite = np.isfinite(np.asarray(y, float))
    alone = finite & ~np.r_[False, finite[:-1]] & ~np.r_[finite[1:], False]
    if alone.any():
        axes.plot(np.asarray(x)[alone], np.asarray(y)[alone], "o", ms=4, color=color, mec="none")
