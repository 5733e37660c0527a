"""Several runs side by side: those that differ in their seed alone are one group, with mean and spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semi_fast.observe.console import duration
from semi_fast.reporting.class_figures import count_figure, dots
from semi_fast.reporting.curves_over_time import Curve, over_steps
from semi_fast.reporting.drawing import SERIES, Figure
from semi_fast.reporting.page import write_page
from semi_fast.reporting.paper import paper_figure
from semi_fast.reporting.rundata import RunData
from semi_fast.reporting.runlog import series
from semi_fast.reporting.sections import Section, Table
from semi_fast.reporting.single import class_accuracy
from semi_fast.reporting.summary import closing_figures, flat
from semi_fast.run.folder import FREE

LINES = len(SERIES)  # groups that get a color of their own


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: list[RunData]
    color: str

    def values(self, key: str) -> list[float]:
        """A closing figure of every run that has it; "groups.few" is the one of the rare classes."""
        found = []
        for run in self.runs:
            value: Any = closing_figures(run)
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, (int, float)) and np.isfinite(value):
                found.append(float(value))
        return found


def write_comparison(runs: Sequence[RunData], path: Path) -> Path:
    """Write the comparison of several runs to `path`. Raises: OSError when it cannot be written."""
    groups = grouped(runs)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    data = sorted({run.info.fingerprint for run in runs if run.info})
    if len(data) > 1:
        notes.insert(0, "These runs were trained on different data: their accuracies cannot be compared.")
    names = sorted({run.info.name for run in runs if run.info})
    open_runs = [run for run in runs if run.summary is None]
    return write_page(
        path,
        title=f"{len(groups)} settings compared" if len(groups) > 1 else f"{len(runs)} runs of one setting",
        subtitle=f"{len(runs)} runs on {', '.join(names) or 'unknown data'}",
        state="finished" if not open_runs else f"{len(open_runs)} not finished",
        tiles=[],
        notes=notes,
        sections=[_figures_table(groups), _curves(groups), _classes(groups, same_data=len(data) == 1), _runs(runs)],
        facts=[_differences(runs)],
        settings=[],
    )


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """The runs by setting, in the order in which the settings appear first; each named by what sets it apart."""
    by_setting: dict[tuple[tuple[str, str], ...], list[RunData]] = {}
    for run in runs:
        by_setting.setdefault(tuple(_setting(run).items()), []).append(run)
    settings = [dict(key) for key in by_setting]
    groups = []
    for number, (setting, members) in enumerate(zip(settings, by_setting.values(), strict=True)):
        alike = [other for other in settings if other.get("method.name") == setting.get("method.name")]
        apart = [key for key in setting if key != "method.name" and len({other.get(key) for other in alike}) > 1]
        name = ", ".join([setting.get("method.name", members[0].name), *(f"{_short(k)}={setting[k]}" for k in apart)])
        groups.append(Group(name, members, SERIES[number % LINES]))
    return groups


def _short(key: str) -> str:
    return key.removeprefix("method.").replace("data.path", "data")


def _setting(run: RunData) -> dict[str, str]:
    skipped = {"seed", *FREE}
    return {key: value for key, value in flat(run.config) if key.split(".")[0] not in skipped}


def _figures_table(groups: Sequence[Group]) -> Section:
    columns = {
        "last": "accuracy_last",
        "mean of last": "accuracy_mean20",
        "best": "accuracy_best",
        "balanced": "balanced",
        "many": "groups.many",
        "medium": "groups.medium",
        "few": "groups.few",
    }
    rows = []
    for group in groups:
        cells = [mean_and_spread(group.values(key)) for key in columns.values()]
        rate, seconds = group.values("images_per_s"), group.values("seconds")
        cells.append(f"{statistics.mean(rate):,.0f}" if rate else "–")
        cells.append(duration(statistics.mean(seconds)) if seconds else "–")
        rows.append((group.name, len(group.runs), *cells, _paper(group)))
    header = ("setting", "runs", *columns, "images/s", "time", "paper")
    means = [statistics.mean(values) if (values := group.values("accuracy_mean20")) else -1 for group in groups]
    caption = (
        "Test accuracy in percent, mean ± standard deviation over the runs of a setting; in bold the best mean of last."
    )
    strong = [int(np.argmax(means))] if len(groups) > 1 else []
    table = Table(header, rows, range(1, len(header)), strong, caption=caption, wide=True)
    return Section("figures", "Figures", tables=[table])


def mean_and_spread(values: Sequence[float]) -> str:
    """`85.1 ± 0.5`, the sample's standard deviation; without it for a single value, a dash for none."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _paper(group: Group) -> str:
    run = group.runs[0]
    if run.facts is None:
        return "–"
    options = {k: v for k, v in (run.get("method") or {}).items() if k != "name"}
    found = paper_figure(run.facts.split, run.facts.info.resolution, run.method, options)
    return "–" if found is None else f"{found.accuracy:.1f}" + (f" ± {found.std:.1f}" if found.std else "")


def _curves(groups: Sequence[Group]) -> Section:
    section = Section("curves", "Curves", lead="A line a run; runs of one setting share a color.")
    wanted = [
        ("accuracy", "Test accuracy", "eval/accuracy", "% of the test images", 1.0),
        ("few", "Rare classes", "eval/ema/{head}/few", "%, mean of the third with the fewest labels", 1.0),
        ("pseudo_used", "Unlabeled images in use", "pseudo/used", "% of the unlabeled images", 100.0),
        ("pseudo_accuracy", "Pseudo-labels that are right", "pseudo/accuracy", "% of those in use", 1.0),
        ("loss", "Loss", "loss/total", "mean of a log window, logarithmic", 1.0),
        ("throughput", "Throughput", "throughput/images_per_s", "images through the network a second", 1.0),
    ]
    for name, title, key, unit, scale in wanted:
        curves = [_curve(group, run, key, scale, first=run is group.runs[0]) for group in groups for run in group.runs]
        longest = max(len(group.name) for group in groups)
        drawn = over_steps(
            f"compare_{name}", title, curves, unit, log=name == "loss", right=16 + round(6.2 * min(longest, 24))
        )
        if drawn is not None:
            section.figures.append(drawn)
        else:
            section.missing.append(f"{title}: not in any of these logs.")
    return section


def _curve(group: Group, run: RunData, key: str, scale: float, *, first: bool) -> Curve | None:
    entries = [*run.log.train, *run.log.evaluations]
    newest = run.log.evaluations[-1] if run.log.evaluations else {}
    head = next((k.split("/")[2] for k in newest if k.startswith("eval/ema/")), "")
    x, y = series(entries, key.format(head=head))
    if not np.isfinite(y).any():
        return None
    name = group.name if len(group.name) <= 24 else group.name[:23] + "…"
    return Curve(name if first else "", x, scale * y, group.color, {"lw": 1.8 if first else 1.2})


def _classes(groups: Sequence[Group], *, same_data: bool) -> Section:
    section = Section("classes", "Classes")
    first = groups[0].runs[0]
    if not same_data or first.info is None:
        section.missing.append("Classes are not compared: the runs were trained on different or unknown data.")
        return section
    counts = count_figure(first)
    section.figures += [counts] if counts else []
    means = {group.name: mean for group in groups[:LINES] if (mean := _class_mean(group)) is not None}
    if not means:
        section.missing.append("No accuracy of the classes in any of these runs.")
        return section
    names = [first.class_names[k] for k in first.order]
    marks = {_clip(name): mean[first.order].tolist() for name, mean in means.items()}
    section.figures.append(dots("compare_classes", "Test accuracy of each class", names, marks, "%"))
    reference, *others = means
    if others:
        section.figures.append(_difference(first, means, reference, others))
    if len(groups) > LINES:
        section.missing.append(f"Classes of the first {LINES} settings only.")
    return section


def _difference(first: RunData, means: dict[str, Any], reference: str, others: Sequence[str]) -> Figure:
    names = [first.class_names[k] for k in first.order]
    marks = {_clip(name): (means[name] - means[reference])[first.order].tolist() for name in others}
    title = f"Gain over {_clip(reference)}"
    return dots("compare_gain", title, names, marks, "percentage points", colors=SERIES[1:], zero=True)


def _clip(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _class_mean(group: Group) -> Any:
    found = [np.asarray(next(iter(values.values()))) for run in group.runs if (values := class_accuracy(run))]
    return np.mean(found, axis=0) if found else None


def _runs(runs: Sequence[RunData]) -> Section:
    rows = []
    for run in runs:
        closing = closing_figures(run)
        accuracy = closing.get("accuracy_last")
        state = "finished" if run.summary is not None else f"step {run.log.last_step:,}"
        shown = f"{accuracy:.1f}" if isinstance(accuracy, (int, float)) else "–"
        rows.append((run.name, run.method, str(run.get("seed", "?")), state, shown))
    header = ("run", "method", "seed", "state", "accuracy, last")
    return Section("runs", "Runs", tables=[Table(header, rows, (2, 4), wide=True)])


def _differences(runs: Sequence[RunData]) -> Table:
    """The settings in which the runs differ."""
    settings = [dict(flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    apart = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    rows = [(key, *(setting.get(key, "–") for setting in settings)) for key in apart]
    return Table(("setting", *(run.name for run in runs)), rows, title="Settings in which the runs differ", wide=True)
