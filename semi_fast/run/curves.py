"""curves.png: a run's accuracy, losses and share of pseudo-labels used, drawn from its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.folder.preview import missing_glyphs, plain

INK, FAINT = "#22272e", "#c9d1d9"
COLORS = ["#0b6e99", "#d9730d", "#448361", "#9065b0", "#c4554d", "#73726e"]


def draw_curves(folder: Path, class_names: Sequence[str], labeled_counts: Sequence[int]) -> Path:
    """Draw `folder/curves.png` from `folder/log.jsonl`: accuracy, per-class accuracy, losses, pseudo-labels.

    Args:
        folder: the run's folder.
        class_names, labeled_counts: (K) for the panel of per-class accuracy.
    """
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    train = [e for e in entries if e["kind"] == "train"]
    evaluations = [e for e in entries if e["kind"] == "eval"]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _accuracy(panels[0, 0], evaluations)
    _per_class(panels[0, 1], evaluations, class_names, labeled_counts)
    _lines(panels[1, 0], train, [k for k in _keys(train) if k.startswith("loss/")], "Losses", log=True)
    shares = [k for k in _keys(train) if k.startswith(("pseudo/", "bank/"))]
    if shares:
        _lines(panels[1, 1], train, shares, "Pseudo-labels and memory bank (shares)", log=False)
    else:
        _lines(panels[1, 1], train, ["throughput/images_per_s"], "Images per second", log=False)
    figure.suptitle(plain(folder.name), fontsize=14, color=INK, x=0.01, ha="left", weight="bold")
    path = folder / "curves.png"
    with missing_glyphs():
        figure.savefig(path, dpi=110)
    return path


def _keys(entries: list[dict[str, Any]]) -> list[str]:
    return sorted({key for entry in entries for key in entry})


def _accuracy(panel: Any, evaluations: list[dict[str, Any]]) -> None:
    steps = [e["step"] for e in evaluations]
    names = [k for k in _keys(evaluations) if k.startswith("eval/") and k.count("/") == 3 and k.endswith("/accuracy")]
    for color, name in zip(COLORS, names, strict=False):
        _, weights, head, _ = name.split("/")
        style = "-" if weights == "ema" else ":"
        panel.plot(
            steps, [e[name] for e in evaluations], style, color=color, marker="o", ms=3, label=f"{weights} {head}"
        )
    _finish(panel, "Test accuracy (%)")


def _per_class(
    panel: Any, evaluations: list[dict[str, Any]], class_names: Sequence[str], counts: Sequence[int]
) -> None:
    values = [v or 0.0 for v in evaluations[-1]["per_class"]] if evaluations else []
    places = range(len(values))
    panel.bar(places, values, color=COLORS[0], width=0.7)
    if len(class_names) <= 20:
        labels = [f"{plain(name)}\n{count}" for name, count in zip(class_names, counts, strict=True)]
        panel.set_xticks(list(places), labels, fontsize=8, rotation=45 if max(map(len, class_names)) > 6 else 0)
    panel.set_ylim(0, 100)
    _finish(panel, "Accuracy of each class, with its labeled images (%)", steps=False)


def _lines(panel: Any, entries: list[dict[str, Any]], names: list[str], title: str, *, log: bool) -> None:
    for color, name in zip(COLORS * 3, names, strict=False):
        points = [(e["step"], e[name]) for e in entries if name in e and (not log or e[name] > 0)]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, lw=1.4, label=_label(name))
    if log and panel.lines:
        panel.set_yscale("log")
    _finish(panel, title)


def _label(name: str) -> str:
    # The panel's title says what losses are; shares need their group: "pseudo used", "bank fill".
    return name.removeprefix("loss/").replace("/", " ").replace("_", " ")


def _finish(panel: Any, title: str, *, steps: bool = True) -> None:
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.set_axisbelow(True)
    panel.grid(axis="y", color=FAINT, lw=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    if steps:
        panel.set_xlabel("step", color=INK)
    handles, _ = panel.get_legend_handles_labels()
    if handles:
        panel.legend(fontsize=8, frameon=False, ncols=2)
