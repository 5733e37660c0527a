"""The head of a report: the figures that matter, beside the paper's, and what was run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipelines.reading import DataFacts
from semi_fast.observe.console import duration
from semi_fast.reporting.paper import paper_figure, paper_figures
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.sections import Section, Table
from semi_fast.run.summary import FIGURES

PAPER_STEPS = 250_000


class Tile(NamedTuple):
    """A number of the head: what it is, the number, its unit, and a remark."""

    name: str
    value: str
    unit: str = ""
    remark: str = ""


def tiles(run: RunData) -> list[Tile]:
    """The figures that matter, from the summary or, where the run is not finished, from the log."""
    s = run.closing
    if s is None:
        return []
    shown = [Tile("Test accuracy", one(s.accuracy), "%", f"{s.figure}; {s.head} head, {s.weights} weights")]
    for name, value in s.figures.items():
        if name != s.figure:
            remark = f"{s.evaluations_in_mean} evaluations" if name in ("mean20", "median20") else ""
            shown.append(Tile(FIGURES[name].capitalize(), one(value), "%", remark))
    shown.append(Tile("Balanced", one(s.balanced), "%", "mean of the classes"))
    if s.groups:
        shown.append(Tile(" / ".join(s.groups), " / ".join(map(one, s.groups.values())), "%", "by labeled images"))
    shown.append(Tile("Throughput", f"{s.images_per_s:,.0f}", "images/s", "through the network"))
    shown.append(Tile("Time", duration(s.seconds), "", f"{s.steps:,} steps"))
    return shown


def overview(run: RunData) -> Section:
    """What was run and, for a data set that the paper has, its figures with ours among them."""
    section = Section("overview", "Overview", tables=[facts_table(run)])
    if run.facts is not None:
        _beside_paper(run, run.facts, section)
    section.tables[0].wide = len(section.tables) == 1
    return section


def _beside_paper(run: RunData, facts: DataFacts, section: Section) -> None:
    theirs = paper_figures(facts.split, facts.info.resolution)
    if not theirs:
        return
    same = paper_figure(facts.split, facts.info.resolution, run.method, run.options)
    ours = run.closing.accuracy if run.closing else None
    steps = run.get("steps", 0)
    if same is not None and ours is not None:
        section.lead = f"{ours:.1f}% here, {same} in the paper for {same.name} (table {same.table}). "
    if isinstance(steps, int) and steps < PAPER_STEPS:
        section.lead += (
            f"The paper's figures are means of three runs of {PAPER_STEPS:,} steps; this run has {steps:,} steps, "
            "so the two cannot be compared yet."
        )
    rows = [(f.name, f.accuracy, str(f)) for f in theirs if f.table == theirs[0].table]
    strong = {same.name} if same else set()
    if ours is not None:
        rows.append(("this run", ours, f"{ours:.1f} ({run.closing.figure})" if run.closing else ""))
        strong.add("this run")
    rows.sort(key=lambda row: -row[1])
    section.tables.append(
        Table(
            ("method", "accuracy, %"),
            [(name, text) for name, _, text in rows],
            numeric=[1],
            strong=[i for i, (name, *_) in enumerate(rows) if name in strong],
            title=f"Table {theirs[0].table} of the paper, and this run",
        )
    )


def facts_table(run: RunData) -> Table:
    """What was run, on what."""
    rows: list[tuple[str, str]] = []
    if run.facts is not None:
        info = run.facts.info
        images = f"{info.num_labeled:,} labeled, {info.num_unlabeled:,} unlabeled, {info.num_test:,} test"
        ratios = f"labeled {_ratio(info.labeled_counts)}, unlabeled {_ratio(run.facts.unlabeled_counts)}"
        rows = [
            ("data", f"{info.name}: {info.num_classes:,} classes of {info.resolution}×{info.resolution} px"),
            ("images", images),
            ("imbalance", ratios),
            ("fingerprint", info.fingerprint[:16]),
        ]
        overlap = run.facts.split.get("test_overlap", 0)
        rows += [("overlap", f"{overlap:,} test images are training images too")] if overlap else []
    rows += [("method", run.method), ("protocol", run.get("protocol") or "none")]
    keys = {"net.name": "network", "batch": "labeled batch", "mu": "unlabeled : labeled", "seed": "seed"}
    rows += [(name, str(run.get(key))) for key, name in keys.items() if run.get(key) is not None]
    steps = run.get("steps")
    rows.append(("steps", f"{run.log.last_step:,} of {steps:,}" if isinstance(steps, int) else "?"))
    rows += [("precision", str(run.get("precision")))] if run.get("precision") else []
    rows += [("torch", run.summary.torch)] if run.summary else []
    return Table(("", ""), rows, title="What was run", kind="facts")


def settings_table(run: RunData) -> Table:
    """Every setting, in dotted form."""
    return Table(("setting", "value"), list(run.settings.items()))


def one(value: float) -> str:
    """With one digit behind the point; a dash for what is no number."""
    return f"{value:.1f}" if math.isfinite(value) else "–"


def _ratio(counts: Sequence[int] | None) -> str:
    if not counts:
        return "unknown"
    return f"{max(counts) / min(counts):.3g}" if min(counts) else f"{max(counts):,} : 0"
