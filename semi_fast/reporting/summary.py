"""The head of a report: the figures that matter, beside the paper's, and what was run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from semi_fast.observe.console import duration
from semi_fast.reporting.drawing import INK, MUTED, SERIES, Figure, figure
from semi_fast.reporting.paper import PaperFigure, paper_figure, paper_figures
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.runlog import series
from semi_fast.reporting.sections import Section, Table
from semi_fast.run.saved import DataFacts


class Tile(NamedTuple):
    """A number of the head: what it is, the number, its unit, and a remark."""

    name: str
    value: str
    unit: str = ""
    remark: str = ""


def tiles(run: RunData) -> list[Tile]:
    """The figures that matter, from the summary or, where the run is not finished, from the log."""
    s = closing_figures(run)
    found = []
    if "accuracy_last" in s:
        head = next(iter(s.get("heads", {})), "").removeprefix("ema/")
        remark = f"{head} head, EMA" if head else ""
        found.append(Tile("Test accuracy", _one(s["accuracy_last"]), "%", remark))
        found.append(Tile("Best", _one(s.get("accuracy_best")), "%", "over all evaluations"))
        count = s.get("evaluations_in_mean", 1)
        found.append(Tile("Mean of the last", _one(s.get("accuracy_mean20")), "%", f"{count} evaluations"))
        found.append(Tile("Balanced", _one(s.get("balanced")), "%", "mean of the classes"))
        groups = s.get("groups", {})
        if groups:
            found.append(
                Tile(" / ".join(groups), " / ".join(_one(v) for v in groups.values()), "%", "by labeled images")
            )
    if s.get("images_per_s"):
        found.append(Tile("Throughput", f"{s['images_per_s']:,.0f}", "images/s", "through the network"))
    if s.get("seconds"):
        found.append(Tile("Time", duration(s["seconds"]), "", f"{s.get('steps', 0):,} steps"))
    return found


def closing_figures(run: RunData) -> dict[str, Any]:
    """The figures of the summary; where the run is not finished, those of the log so far."""
    return run.summary or _from_log(run)


def _from_log(run: RunData) -> dict[str, Any]:
    """What the summary would say, as far as the log goes."""
    found: dict[str, Any] = {"steps": run.log.last_step}
    _, accuracy = series(run.log.evaluations, "eval/accuracy")
    accuracy = accuracy[np.isfinite(accuracy)]
    if len(accuracy):
        newest = run.log.evaluations[-1]
        head = next((k.split("/")[2] for k in newest if k.startswith("eval/ema/")), "")
        recent = accuracy[-20:]
        found |= {"accuracy_last": accuracy[-1], "accuracy_best": accuracy.max(), "accuracy_mean20": recent.mean()}
        found |= {"evaluations_in_mean": len(recent), "heads": {f"ema/{head}": accuracy[-1]} if head else {}}
        found["balanced"] = newest.get(f"eval/ema/{head}/balanced")
        names = ("many", "medium", "few")
        found["groups"] = {n: newest[f"eval/ema/{head}/{n}"] for n in names if f"eval/ema/{head}/{n}" in newest}
    _, rate = series(run.log.train, "throughput/images_per_s")
    times, _ = series(run.log.train, "step")
    if np.isfinite(rate).any():
        found["images_per_s"] = float(np.nanmedian(rate))
    stamps = [e["time"] for e in run.log.train if isinstance(e.get("time"), (int, float))]
    if len(times) > 1 and len(stamps) > 1:
        found["seconds"] = stamps[-1] - stamps[0]
    return found


def overview(run: RunData) -> Section:
    """What was run and, for a data set that the paper has, its figures with ours among them."""
    section = Section("overview", "Overview", tables=[facts_table(run)])
    if run.facts is not None:
        _beside_paper(run, run.facts, section)
    section.tables[0].wide = not section.figures
    return section


def _beside_paper(run: RunData, facts: DataFacts, section: Section) -> None:
    theirs = paper_figures(facts.split, facts.info.resolution)
    options = {k: v for k, v in (run.get("method") or {}).items() if k != "name"}
    same = paper_figure(facts.split, facts.info.resolution, run.method, options)
    if not theirs:
        return
    ours = closing_figures(run).get("accuracy_mean20")
    steps = run.get("steps", 0)
    if isinstance(steps, int) and steps < 250_000:
        section.lead = (
            f"The paper's figures are means of three runs of 250,000 steps; this run has {steps:,} steps, "
            "so the two cannot be compared yet."
        )
    if same is not None and ours is not None:
        section.lead = (
            f"{ours:.1f}% here, {_pm(same)} in the paper for {same.name} (table {same.table}). {section.lead}".strip()
        )
    number = theirs[0].table
    rows: list[PaperFigure] = [f for f in theirs if f.table == number]
    section.figures.append(_ladder(rows, same, ours))


def _ladder(rows: list[PaperFigure], same: PaperFigure | None, ours: float | None) -> Figure:
    marks = [(f.name, f.accuracy, f.std, SERIES[5] if f != same else INK) for f in rows]
    if ours is not None and math.isfinite(ours):
        marks.append(("this run", ours, None, SERIES[1]))
    marks.sort(key=lambda mark: -mark[1])

    def draw(axes: Any) -> None:
        for place, (_, value, std, color) in enumerate(marks):
            if std:
                axes.plot((value - std, value + std), (place, place), color=color, lw=3, alpha=0.35)
            axes.plot(value, place, "o", ms=7, color=color, mec="none")
            axes.annotate(
                f"{value:.1f}", (1, place), (8, 0), xycoords=("axes fraction", "data"),
                textcoords="offset pixels", va="center", color=color,
            )  # fmt: skip
        axes.set_yticks(range(len(marks)), [name for name, *_ in marks])
        for text, (name, _, _, color) in zip(axes.get_yticklabels(), marks, strict=True):
            text.set_color(color if name == "this run" or color == INK else MUTED)
        axes.set_ylim(len(marks) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)

    table = [(name, value, std) for name, value, std, _ in marks]
    left = 24 + round(6.3 * max(len(name) for name, *_ in marks))
    title = f"Table {rows[0].table}, and this run"
    caption = "Accuracy in percent; bars: one standard deviation. This run: mean of its last evaluations."
    size: dict[str, Any] = {"left": left, "right": 46, "top": 10, "bottom": 26, "height": 44 + 20 * len(marks)}
    return figure("paper", title, draw, ("method", "accuracy", "std"), table, caption=caption, **size)


def facts_table(run: RunData) -> Table:
    """What was run, on what."""
    s, info = run.summary or {}, run.info
    rows: list[tuple[str, str]] = []
    if info is not None:
        rows.append(("data", f"{info.name}: {info.num_classes:,} classes of {info.resolution}×{info.resolution} px"))
        images = f"{info.num_labeled:,} labeled, {info.num_unlabeled:,} unlabeled, {info.num_test:,} test"
        rows += [("images", images), ("imbalance", _imbalance(info.labeled_counts, info.unlabeled_counts))]
        rows.append(("fingerprint", info.fingerprint[:16]))
    rows.append(("method", run.method))
    keys = {"net.name": "network", "batch": "labeled batch", "mu": "unlabeled : labeled", "seed": "seed"}
    rows += [(name, str(run.get(key))) for key, name in keys.items() if run.get(key) is not None]
    rows.append(
        ("steps", f"{run.log.last_step:,} of {run.get('steps'):,}" if isinstance(run.get("steps"), int) else "?")
    )
    for key in ("precision", "ema.decay"):
        if run.get(key) is not None:
            rows.append((key.replace(".", " "), str(run.get(key))))
    rows += [(name, str(s[name])) for name in ("torch",) if name in s]
    return Table(("", ""), rows, title="What was run", kind="facts")


def settings_table(run: RunData) -> Table:
    """Every setting, in dotted form."""
    return Table(("setting", "value"), list(flat(run.config)))


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings in dotted form, values as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield (f"{prefix}{key}", "none" if value is None else str(value))


def _imbalance(labeled: tuple[int, ...], unlabeled: tuple[int, ...] | None) -> str:
    def ratio(counts: tuple[int, ...]) -> str:
        return f"{max(counts) / min(counts):.3g}" if min(counts) else f"{max(counts):,} : 0"

    return f"labeled {ratio(labeled)}, unlabeled {ratio(unlabeled) if unlabeled else 'unknown'}"


def _one(value: Any) -> str:
    number = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.1f}" if number else "–"


def _pm(f: PaperFigure) -> str:
    return f"{f.accuracy:.1f}" + (f" ± {f.std:.2f}" if f.std else "")
