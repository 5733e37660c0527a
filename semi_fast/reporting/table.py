"""A table of the paper with our figures in it: as markdown, and as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from semi_fast.reporting.drawing import INK, SERIES, Figure, figure
from semi_fast.reporting.paper import PaperFigure
from semi_fast.reporting.sweep_table import Row, Spread, conditions

ACROSS = 4  # panels beside each other
PALE = 0.4  # opacity
CHANGED = "not run as the row is to be (fewer steps, another network, another protocol; see below): the difference"
CHANGED += " says nothing about the method."


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table as the paper prints it, then a table for every data set with all there is to say of each figure.

    Args:
        rows: a cell each, see `semi_fast.commands.table.row_of`. notes: footnotes.
    """
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["row"], {})[row["cell"]] = row
    shown = [(name, own) for name, own in by_name.items() if any(r["paper"] or r["finished"] for r in own.values())]
    lines = [f"# Table {rows[0]['table']}", "", *_table(
        ["method", *cells], [[name, *(_short(own.get(cell)) for cell in cells)] for name, own in shown]
    )]  # fmt: skip
    lines += ["", "Ours; in brackets the paper's figure, and ours less that. Test accuracy in percent, mean ± standard"]
    lines[-1] += f" deviation (n - 1) over the seeds. \\*: {CHANGED}"
    for cell in cells:
        members = [row for row in rows if row["cell"] == cell]
        sources = list(dict.fromkeys(source for row in members for source in row["published"]))
        header = ["method", "ours", "mean of classes", "paper", "difference", *sources]
        header += ["protocol", "steps", "seeds", "commit"]
        lines += ["", f"## {cell}", "", *_table(header, [_details(row, sources) for row in members])]
        done = [f"- {row['row']}: {conditions(row)}{_apart(row)}" for row in members if row["finished"]]
        lines += ["", *done] if done else []
    lines += [
        "",
        "Ours is the figure that the protocol reports (last, best, mean20, median20), the mean of classes that of the "
        "last evaluation. Columns named by a source are figures published elsewhere, under other protocols.",
        "",
        *(f"- {note}" for note in notes),
        "",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _short(row: Row | None) -> str:
    if row is None or not (row["paper"] or row["finished"]):
        return "–"
    paper = str(PaperFigure(**row["paper"])) if row["paper"] else ""
    brackets = ", ".join(text for text in (paper, difference(row)) if text)
    return _ours(row) + (f" ({brackets})" if brackets else "")


def _ours(row: Row) -> str:
    return str(row["state"]) or Spread(**row["accuracy"]).text()


def difference(row: Row) -> str:
    """Ours less the paper's; a star where ours was not run as the row is to be. "" for none."""
    if row["difference"] is None:
        return ""
    return f"{row['difference']:+.2f}" + ("\\*" if row["changed"] else "")


def _apart(row: Row) -> str:
    return f"; \\*: {row['changed']}" if row["changed"] else ""


def _details(row: Row, sources: Sequence[str]) -> list[str]:
    finished, asked = row["finished"], len(row["finished"]) + len(row["missing"])
    done, seeds, steps = bool(finished), ", ".join(map(str, finished)), f"{row['steps']:,}" if finished else ""
    if 0 < len(finished) < asked:
        seeds += f" ({len(finished)} of {asked})"
    if done and row["steps"] != row["usual_steps"]:
        steps += f" of {row['usual_steps']:,}"
    return [
        row["row"],
        _ours(row) + (f" ({row['figure']})" if done else ""),
        Spread(**row["balanced"]).text() if done else "–",
        str(PaperFigure(**row["paper"])) if row["paper"] else "–",
        difference(row) or "–",
        *(row["published"].get(source, "–") for source in sources),
        row["protocol"] if done else "–",
        steps or "–",
        seeds or "–",
        " ".join(row["commits"]) or "–",
    ]


def _why_pale(row: Row) -> str:
    if row["steps"] != row["usual_steps"]:
        return f"{row['steps']:,} steps"
    return "other settings" if row["changed"] else ""


def picture(rows: Sequence[Row], title: str) -> Figure:
    """Bars of ours by method with the paper's mark, a panel a data set; pale: changed runs, which say so."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    names = list(dict.fromkeys(row["row"] for row in rows if row["paper"] or row["finished"]))
    across = min(ACROSS, len(cells))

    def draw(panels: Any) -> None:
        for axes, cell in zip(panels.flat, cells, strict=False):
            own = {row["row"]: row for row in rows if row["cell"] == cell}
            ours = [(names.index(n), Spread(**own[n]["accuracy"])) for n in names if n in own and own[n]["finished"]]
            marks = [(names.index(n), own[n]["paper"]["accuracy"]) for n in names if n in own and own[n]["paper"]]
            for place, spread in ours:
                row = own[names[place]]
                axes.barh(
                    place, spread.mean, 0.66, color=SERIES[0], alpha=PALE if row["changed"] else 1, xerr=spread.std
                )
                axes.text(1, place, _why_pale(row), va="center")
            axes.plot([mark for _, mark in marks], [place for place, _ in marks], "D", ms=5, color=SERIES[1])
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", labelcolor=INK)
            axes.set_xlim(0, 100)
            axes.set_xticks(range(0, 100, 20))
            axes.grid(axis="x")
            axes.grid(visible=False, axis="y")
            axes.set_title(f"{cell}, %")
        for axes in panels.flat[len(cells) :]:
            axes.set_visible(False)
        panels.flat[0].invert_yaxis()  # they share it

    table = [(r["cell"], r["row"], r["accuracy"]["mean"], (r["paper"] or {}).get("accuracy")) for r in rows]
    grid = (-(-len(cells) // across), across)
    width, height = 230 + 210 * across, grid[0] * (50 + 19 * len(names))
    header = ("data", "method", "ours", "paper")
    return figure(
        "table",
        f"{title}: ours (bars), the paper's (marks)",
        draw,
        header,
        table,
        grid=grid,
        width=width,
        height=height,
    )
