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
from semi_fast.reporting.paper import PaperFigure, beside_paper
from semi_fast.run.folder import deciding
from semi_fast.run.summary import FIGURES, Summary, logged_name

GROUPS = ("many", "medium", "few")
Row = dict[str, Any]  # as results.json has it


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float | None  # None without a finished run
    std: float | None  # of the sample (n - 1); None below two runs

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = statistics.fmean(values) if values else None
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None)

    def text(self, digits: int = 2) -> str:
        """`85.13 ± 0.52`; without the deviation for a single run, a dash for none."""
        if self.mean is None:
            return "–"
        return f"{self.mean:.{digits}f}" + ("" if self.std is None else f" ± {self.std:.{digits}f}")


def spreads(summaries: Sequence[Summary]) -> dict[str, Spread]:
    """Of runs that differ in their seed: accuracy, the four figures and class groups, by name."""
    values = [{"accuracy": s.accuracy, **s.figures, "balanced": s.balanced, **s.groups} for s in summaries]
    names = ("accuracy", *FIGURES, "balanced", *GROUPS)
    return {name: Spread.of([v[name] for v in values if v.get(name, float("nan")) >= 0]) for name in names}


def make_row(
    settings: Settings, facts: DataFacts | None, runs: Mapping[int, Summary | None], paper: PaperFigure | None
) -> Row:
    """A row of the runs of one setting by seed; None where a run is not finished. Accuracies are in percent.

    facts: of the data, None where no run is finished. paper: the figure to compare with, where the protocol allows it.
    """
    done = {seed: summary for seed, summary in sorted(runs.items()) if summary is not None}
    summaries = list(done.values())
    spread = spreads(summaries)
    mean = spread["accuracy"].mean
    protocol = (summaries and summaries[0].protocol) or settings.protocol
    paper = paper if beside_paper(protocol) else None
    return {
        "method": settings.method.name,
        "protocol": protocol,
        "figure": settings.figure,
        "evaluated": logged_name(summaries[0].head, summaries[0].weights) if summaries else "",
        "finished": list(done),
        "missing": [seed for seed, summary in runs.items() if summary is None],
        "accuracy": spread["accuracy"]._asdict(),
        "balanced": spread["balanced"]._asdict(),
        "figures": {name: spread[name]._asdict() for name in FIGURES},
        "groups": {name: spread[name]._asdict() for name in GROUPS if spread[name].mean is not None},
        "by_seed": {seed: summary.figures for seed, summary in done.items()},
        "paper": paper and paper._asdict(),
        "difference": mean - paper.accuracy if mean is not None and paper else None,
        "steps": settings.steps,
        "commits": sorted({summary.commit for summary in summaries}),
        "data": _data(facts) if facts else {},
        "settings": _deciding(settings),
    }


def _data(facts: DataFacts) -> dict[str, Any]:
    info = facts.info
    return {
        "data": info.name,
        "split": facts.split,
        "resolution": info.resolution,
        "labeled": info.num_labeled,
        "unlabeled": info.num_unlabeled,
        "labeled_ratio": ratio(info.labeled_counts),
        "unlabeled_ratio": ratio(facts.unlabeled_counts) if facts.unlabeled_counts else "unknown",
    }


def _deciding(settings: Settings) -> dict[str, str]:
    values = flatten(settings.model_dump(mode="json"))
    return {key: str(value) for key, value in deciding(values, "data.path", "method.name").items()}


def ratio(counts: Sequence[int]) -> str:
    """Imbalance as first class to last: 500, ..., 5 is 100; 40, ..., 4000 is 1/100; n/a where either has none."""
    first, last = counts[0], counts[-1]
    if not first or not last:
        return "n/a"
    return f"{first / last:.3g}" if first >= last else f"1/{last / first:.3g}"


def write_files(path: Path, rows: Sequence[Row], text: str) -> str:
    """Write a table as `path`.md, .csv and .json, each whole or not at all; text: the first. Returns it."""
    as_json = json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    for suffix, content in {"md": text, "csv": as_csv(rows), "json": as_json}.items():
        with replacing(path.with_name(f"{path.name}.{suffix}")) as file:
            file.write(content.encode("utf-8"))
    return text


def markdown(rows: Sequence[Row]) -> str:
    """The table for people, the conditions below."""
    figures = [*FIGURES.values(), "many / medium / few", "paper", "difference"]
    header = ["method", "protocol", "seeds", "accuracy", *figures]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows:
        finished, missing, paper = row["finished"], row["missing"], row["paper"]
        seeds = ", ".join(map(str, finished)) or "none"
        cells = [
            f"`{row['method']}`",
            row["protocol"] or "–",
            seeds + (f" ({len(finished)} of {len(finished) + len(missing)})" if missing else ""),
            f"{Spread(**row['accuracy']).text()} ({row['figure']})",
            *(Spread(**spread).text() for spread in row["figures"].values()),
            " / ".join(f"{group['mean']:.1f}" for group in row["groups"].values()) or "–",
            "–" if paper is None else f"{PaperFigure(**paper)} (Table {paper['table']})",
            "–" if row["difference"] is None else f"{row['difference']:+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "Accuracy on the test images in percent, mean ± standard deviation (n - 1) over the seeds: the figure that "
            "the protocol reports, and all four. 20: evaluations, or all where there were fewer; many / medium / few: "
            "thirds of the classes by labeled images, at the last evaluation; difference: accuracy, less the paper's.",
            "",
            *(f"- `{row['method']}`: {conditions(row)}" for row in rows),
            "",
        ]
    )


def conditions(row: Row) -> str:
    """Data, what was evaluated, and the settings that are not the defaults, in one line."""
    data, usual = row["data"], _deciding(Settings())
    settings = [f"{key}={value}" for key, value in row["settings"].items() if usual.get(key) != value]
    return (
        f"{data['data']} at {data['resolution']} px, {data['labeled']:,} labeled (imbalance {data['labeled_ratio']}), "
        f"{data['unlabeled']:,} unlabeled (imbalance {data['unlabeled_ratio']}); "
        f"evaluated: {row['evaluated'] or 'not yet'}; {' '.join(settings) or 'default settings'}"
    )


def as_csv(rows: Sequence[Row]) -> str:
    """One line a row, every figure in a column of its own."""
    table = []
    for row in rows:
        line: Row = {key: value for key, value in row.items() if isinstance(value, str)}
        line |= {"runs": len(row["finished"]), "missing": len(row["missing"])}
        spreads = {key: row[key] for key in ("accuracy", "balanced")} | row["figures"] | row["groups"]
        for key, spread in spreads.items():
            line |= {key: spread["mean"], f"{key}_std": spread["std"]}
        paper = row["paper"] or {}
        line |= {"paper": paper.get("accuracy"), "paper_std": paper.get("std"), "paper_table": paper.get("table")}
        line |= {"difference": row["difference"], "commit": " ".join(row["commits"]), **row.get("published", {})}
        line |= {**row["data"], **row["settings"]}
        line.pop("split", None)
        table.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in table for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
