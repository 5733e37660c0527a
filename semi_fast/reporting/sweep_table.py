"""The table of a sweep: one row a method, with the paper's figure beside it and the protocol it was measured by."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import replacing
from data_prep.folder.manifest import Manifest
from semi_fast.config import Settings
from semi_fast.reporting.paper import PaperFigure, paper_figure

FIGURES = {"accuracy_last": "last", "accuracy_mean20": "mean of the last 20", "accuracy_best": "best"}


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float | None  # None without a finished run
    std: float | None  # of the sample (n - 1); None below two runs

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


class Row(NamedTuple):
    """A method's results. Accuracies in percent of the test images."""

    method: str
    finished: list[int]  # seeds
    missing: list[int]
    figures: dict[str, Spread]  # by FIGURES
    groups: dict[str, Spread]  # many, medium, few after the last step
    accuracies: dict[int, dict[str, float]]  # FIGURES of each finished seed
    paper: PaperFigure | None
    protocol: dict[str, Any]

    @property
    def difference(self) -> float | None:
        """Mean accuracy after the last step, less the paper's."""
        mean = self.figures["accuracy_last"].mean
        return None if mean is None or self.paper is None else mean - self.paper.accuracy


def make_row(settings: Settings, manifest: Manifest, runs: list[tuple[int, dict[str, Any] | None]]) -> Row:
    """A row of the runs of one method: seed and summary.json, None where the run is not finished."""
    done = {seed: summary for seed, summary in runs if summary is not None}
    names = sorted(
        {name for summary in done.values() for name in summary["groups"]}, key=["many", "medium", "few"].index
    )
    split = manifest.split
    return Row(
        method=settings.method.name,
        finished=sorted(done),
        missing=[seed for seed, summary in runs if summary is None],
        figures={key: spread([summary[key] for summary in done.values()]) for key in FIGURES},
        groups={name: spread([s["groups"][name] for s in done.values() if name in s["groups"]]) for name in names},
        accuracies={seed: {key: summary[key] for key in FIGURES} for seed, summary in done.items()},
        paper=paper_figure(split, manifest.resolution, settings.method.name, settings.method.options),
        protocol=protocol(settings, manifest, next(iter(done.values()), None)),
    )


def spread(values: list[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def protocol(settings: Settings, manifest: Manifest, summary: dict[str, Any] | None) -> dict[str, Any]:
    """What must be the same for two figures to be comparable."""
    labeled, unlabeled, split = manifest.labeled_counts, manifest.unlabeled_counts, manifest.split
    heads = list(summary["heads"]) if summary else []
    return {
        "data": manifest.name,
        "split": split,
        "resolution": manifest.resolution,
        "labeled": sum(labeled),
        "unlabeled": None if unlabeled is None else sum(unlabeled),
        "labeled_ratio": ratio(labeled),
        "unlabeled_ratio": None if unlabeled is None else ratio(unlabeled),
        "network": settings.net.name,
        "bn_momentum": settings.net.bn_momentum,
        "steps": settings.steps,
        "batch": settings.batch,
        "mu": settings.mu,
        "lr": settings.optim.lr,
        "ema_decay": settings.ema.decay,
        "views": settings.views.model_dump(mode="json"),
        "evaluation": heads[0] if heads else None,  # weights/head of the reported accuracy
        "options": settings.method.options,
    }


def ratio(counts: list[int]) -> str:
    """Imbalance as first class to last: 500, ..., 5 is 100; 40, ..., 4000 is 1/100; n/a where either has none."""
    first, last = counts[0], counts[-1]
    if not first or not last:
        return "n/a"
    return f"{first / last:.3g}" if first >= last else f"1/{last / first:.3g}"


def write_table(out: Path, rows: list[Row]) -> None:
    """Write results.md, results.csv and results.json into `out`, each whole or not at all."""
    texts = {"results.md": markdown(rows), "results.csv": as_csv(rows), "results.json": as_json(rows)}
    for name, text in texts.items():
        with replacing(out / name) as file:
            file.write(text.encode("utf-8"))


def markdown(rows: list[Row]) -> str:
    """The table for people, its protocol below."""
    heads = ["method", "seeds", *FIGURES.values(), "many / medium / few", "paper", "difference"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        seeds = ", ".join(map(str, row.finished)) or "none"
        seeds += f" ({len(row.finished)} of {len(row.finished) + len(row.missing)})" if row.missing else ""
        groups = " / ".join("-" if s.mean is None else f"{s.mean:.1f}" for s in row.groups.values()) or "-"
        gap = "-" if row.difference is None else f"{row.difference:+.2f}"
        cells = [f"`{row.method}`", seeds, *map(str, row.figures.values()), groups, paper_text(row.paper), gap]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Accuracy on the test images in percent, mean ± standard deviation (n - 1) over the seeds; many / medium / "
        "few: thirds of the classes by labeled images, after the last step. 20: evaluations, or all where there were "
        "fewer; difference: last, less the paper's figure.",
        "",
        *(f"- `{row.method}`: {protocol_text(row.protocol)}" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def paper_text(figure: PaperFigure | None) -> str:
    """80.3 ± 0.41 (Table 1)"""
    if figure is None:
        return "-"
    return f"{figure.accuracy:g}" + ("" if figure.std is None else f" ± {figure.std:g}") + f" (Table {figure.table})"


def protocol_text(facts: dict[str, Any]) -> str:
    """The protocol in one line."""
    unlabeled = (
        "unlabeled images of unknown classes"
        if facts["unlabeled"] is None
        else f"{facts['unlabeled']:,} unlabeled (imbalance {facts['unlabeled_ratio']})"
    )
    options = ", ".join(f"{key}={value}" for key, value in facts["options"].items())
    return (
        f"{facts['data']} at {facts['resolution']} px, {facts['labeled']:,} labeled (imbalance "
        f"{facts['labeled_ratio']}), {unlabeled}; {facts['network']}, BatchNorm momentum {facts['bn_momentum']:g}; "
        f"{facts['steps']:,} steps of {facts['batch']} labeled and {facts['mu'] * facts['batch']} unlabeled images, "
        f"learning rate {facts['lr']:g}, EMA {facts['ema_decay']:g}; evaluated: {facts['evaluation'] or 'not yet'}"
        + ("" if facts["views"] == Settings().views.model_dump(mode="json") else f"; views {facts['views']}")
        + (f"; {options}" if options else "")
    )


def as_csv(rows: list[Row]) -> str:
    """One line a method, every figure in a column of its own."""
    table = []
    for row in rows:
        facts = {k: v for k, v in row.protocol.items() if k not in ("split", "views", "options")}
        line: dict[str, Any] = {"method": row.method, "runs": len(row.finished), "missing": len(row.missing)}
        for key, value in {**row.figures, **row.groups}.items():
            line |= {key: value.mean, f"{key}_std": value.std}
        p = row.paper
        line |= {"paper": p and p.accuracy, "paper_std": p and p.std, "paper_table": p and p.table}
        table.append({**line, "difference": row.difference, **facts})
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in table for key in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def as_json(rows: list[Row]) -> str:
    """Everything, every seed by itself too."""

    def plain(row: Row) -> dict[str, Any]:
        return {
            **row._asdict(),
            "figures": {key: value._asdict() for key, value in row.figures.items()},
            "groups": {key: value._asdict() for key, value in row.groups.items()},
            "paper": row.paper and row.paper._asdict(),
            "difference": row.difference,
        }

    return json.dumps([plain(row) for row in rows], indent=1, ensure_ascii=False) + "\n"
