"""The table of a sweep: one row a method, with the paper's figure beside it and the conditions of its runs."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import replacing
from pipelines.reading import DataFacts
from semi_fast.config import Settings, flatten
from semi_fast.reporting.paper import PaperFigure, paper_figure
from semi_fast.run.folder import FREE
from semi_fast.run.summary import FIGURES, Summary, logged_name


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float | None  # None without a finished run
    std: float | None  # of the sample (n - 1); None below two runs

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = statistics.fmean(values) if values else None
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        if self.mean is None:
            return "–"
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


class Row(NamedTuple):
    """A method's results. Accuracies in percent of the test images."""

    method: str
    protocol: str  # "" without one
    figure: str  # that is reported, a name of FIGURES
    evaluated: str  # weights and head that are reported, "ema/standard"; "" before a run is finished
    finished: list[int]  # seeds
    missing: list[int]
    accuracy: Spread  # the reported figure
    figures: dict[str, Spread]  # all of FIGURES
    groups: dict[str, Spread]  # many, medium, few at the last evaluation
    by_seed: dict[int, dict[str, float]]  # FIGURES of each finished run
    paper: PaperFigure | None
    data: dict[str, Any]
    settings: dict[str, str]  # in dotted form; those that decide the result

    @property
    def difference(self) -> float | None:
        """Mean of the reported figure, less the paper's."""
        mean = self.accuracy.mean
        return None if mean is None or self.paper is None else mean - self.paper.accuracy


def make_row(settings: Settings, facts: DataFacts, runs: Mapping[int, Summary | None]) -> Row:
    """A row of the runs of one method by seed; None where a run is not finished."""
    done = {seed: summary for seed, summary in sorted(runs.items()) if summary is not None}
    summaries = list(done.values())
    groups = [name for name in ("many", "medium", "few") if any(name in s.groups for s in summaries)]
    info, method = facts.info, settings.method
    return Row(
        method=method.name,
        protocol=settings.protocol,
        figure=settings.figure,
        evaluated=logged_name(summaries[0].head, summaries[0].weights) if summaries else "",
        finished=list(done),
        missing=[seed for seed, summary in runs.items() if summary is None],
        accuracy=Spread.of([s.accuracy for s in summaries]),
        figures={name: Spread.of([s.figures[name] for s in summaries]) for name in FIGURES},
        groups={name: Spread.of([s.groups[name] for s in summaries if name in s.groups]) for name in groups},
        by_seed={seed: summary.figures for seed, summary in done.items()},
        paper=paper_figure(facts.split, info.resolution, method.name, method.options),
        data={
            "data": info.name,
            "split": facts.split,
            "resolution": info.resolution,
            "labeled": info.num_labeled,
            "unlabeled": info.num_unlabeled,
            "labeled_ratio": ratio(info.labeled_counts),
            "unlabeled_ratio": ratio(facts.unlabeled_counts) if facts.unlabeled_counts else "unknown",
        },
        settings=deciding(settings),
    )


def deciding(settings: Settings) -> dict[str, str]:
    """The settings, in dotted form, that decide a result beside data, method and seed."""
    rest = {*FREE, "seed", "data.path", "method.name"}
    values = flatten(settings.model_dump(mode="json"))
    return {key: str(value) for key, value in values.items() if not {key, key.split(".")[0]} & rest}


def ratio(counts: Sequence[int]) -> str:
    """Imbalance as first class to last: 500, ..., 5 is 100; 40, ..., 4000 is 1/100; n/a where either has none."""
    first, last = counts[0], counts[-1]
    if not first or not last:
        return "n/a"
    return f"{first / last:.3g}" if first >= last else f"1/{last / first:.3g}"


def write_table(out: Path, rows: Sequence[Row]) -> None:
    """Write results.md, results.csv and results.json into `out`, each whole or not at all."""
    texts = {"results.md": markdown(rows), "results.csv": as_csv(rows), "results.json": as_json(rows)}
    for name, text in texts.items():
        with replacing(out / name) as file:
            file.write(text.encode("utf-8"))


def markdown(rows: Sequence[Row]) -> str:
    """The table for people, the conditions below."""
    header = [
        "method",
        "protocol",
        "seeds",
        "accuracy",
        *FIGURES.values(),
        "many / medium / few",
        "paper",
        "difference",
    ]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        seeds = ", ".join(map(str, row.finished)) or "none"
        seeds += f" ({len(row.finished)} of {len(row.finished) + len(row.missing)})" if row.missing else ""
        groups = " / ".join(f"{s.mean:.1f}" for s in row.groups.values()) or "–"
        gap = "–" if row.difference is None else f"{row.difference:+.2f}"
        paper = "–" if row.paper is None else f"{row.paper} (Table {row.paper.table})"
        head = [f"`{row.method}`", row.protocol or "–", seeds, f"{row.accuracy} ({row.figure})"]
        lines.append(f"| {' | '.join([*head, *map(str, row.figures.values()), groups, paper, gap])} |")
    return "\n".join(
        [
            *lines,
            "",
            "Accuracy on the test images in percent, mean ± standard deviation (n - 1) over the seeds: the figure that "
            "the protocol reports, and all four. 20: evaluations, or all where there were fewer; many / medium / few: "
            "thirds of the classes by labeled images, at the last evaluation; difference: accuracy, less the paper's.",
            "",
            *(f"- `{row.method}`: {conditions(row)}" for row in rows),
            "",
        ]
    )


def conditions(row: Row) -> str:
    """Data, what was evaluated, and the settings that are not the defaults, in one line."""
    data, usual = row.data, deciding(Settings())
    settings = [f"{key}={value}" for key, value in row.settings.items() if usual.get(key) != value]
    return (
        f"{data['data']} at {data['resolution']} px, {data['labeled']:,} labeled (imbalance {data['labeled_ratio']}), "
        f"{data['unlabeled']:,} unlabeled (imbalance {data['unlabeled_ratio']}); "
        f"evaluated: {row.evaluated or 'not yet'}; {' '.join(settings) or 'default settings'}"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """One line a method, every figure in a column of its own."""
    table = []
    for row in rows:
        line: dict[str, Any] = {key: getattr(row, key) for key in ("method", "protocol", "figure", "evaluated")}
        line |= {"runs": len(row.finished), "missing": len(row.missing)}
        for key, value in {"accuracy": row.accuracy, **row.figures, **row.groups}.items():
            line |= {key: value.mean, f"{key}_std": value.std}
        p = row.paper
        line |= {"paper": p and p.accuracy, "paper_std": p and p.std, "paper_table": p and p.table}
        line |= {"difference": row.difference, **{key: v for key, v in row.data.items() if key != "split"}}
        table.append({**line, **row.settings})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in table for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_json(rows: Sequence[Row]) -> str:
    """Everything, every seed by itself too."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return plain(value._asdict())  # type: ignore[attr-defined]
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    table = [{**plain(row), "difference": row.difference} for row in rows]
    return json.dumps(table, indent=1, ensure_ascii=False) + "\n"
