"""Several runs side by side: those that differ in their seed alone are one group, with mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from semi_fast.observe.console import duration
from semi_fast.observe.metrics import symbol
from semi_fast.reporting.class_figures import by_class, count_figure
from semi_fast.reporting.curves_over_time import curve, over_steps, words
from semi_fast.reporting.drawing import SERIES
from semi_fast.reporting.page import Section, Table, write_page
from semi_fast.reporting.rundata import RunData, label
from semi_fast.reporting.single import class_accuracy, one
from semi_fast.reporting.sweep_table import GROUPS, Spread, spreads
from semi_fast.run.folder import deciding
from semi_fast.run.summary import FIGURES, Summary

LINES = len(SERIES)  # groups that get a color of their own
LONGEST = 24  # letters of a group's name in a drawing


class Group(NamedTuple):
    """Runs that differ in their seed alone."""

    name: str
    runs: list[RunData]
    color: str

    @property
    def closing(self) -> list[Summary]:
        """What came out of its runs, as far as they have been evaluated."""
        return [run.closing for run in self.runs if run.closing is not None]


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
        notes=notes,
        sections=[figures_table(groups), _curves(groups), class_section(groups, same_data=len(data) == 1), _runs(runs)],
        facts=[differences_table(runs)],
    )


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """The runs by setting, in the order in which the settings appear first; each named by what sets it apart."""
    by_setting: dict[tuple[tuple[str, str], ...], list[RunData]] = {}
    for run in runs:
        by_setting.setdefault(tuple(deciding(run.settings).items()), []).append(run)
    settings = [dict(key) for key in by_setting]
    groups = []
    for number, (setting, members) in enumerate(zip(settings, by_setting.values(), strict=True)):
        alike = [other for other in settings if other.get("method.name") == setting.get("method.name")]
        apart = [key for key in setting if key != "method.name" and len({other.get(key) for other in alike}) > 1]
        apart.sort(key=lambda key: key != "protocol")  # first: a protocol stands for the settings that it makes
        short = (f"{key.removeprefix('method.').removesuffix('.path')}={setting[key]}" for key in apart)
        name = ", ".join([setting.get("method.name", members[0].name), *short])
        groups.append(Group(name, members, SERIES[number % LINES]))
    return groups


def figures_table(groups: Sequence[Group]) -> Section:
    """Mean and spread of every figure, a line a setting."""
    rows, means = [], []
    for group in groups:
        first, closing, spread = group.runs[0], group.closing, spreads(group.closing)
        speed = Spread.of([s.images_per_s for s in closing]).mean, Spread.of([s.seconds for s in closing]).mean
        rate, seconds = f"{speed[0]:,.0f}" if speed[0] else "–", duration(speed[1]) if speed[1] else "–"
        head = (group.name, first.get("protocol") or "–", len(group.runs), closing[0].figure if closing else "–")
        rows.append((*head, *(s.text(1) for s in spread.values()), rate, seconds, str(first.paper or "–")))
        means.append(spread["accuracy"].mean or -1)
    shown = ("accuracy", *FIGURES.values(), "balanced", *GROUPS, "images/s", "time", "paper")
    header = ("setting", "protocol", "runs", "figure", *shown)
    caption = (
        "Test accuracy in percent, mean ± standard deviation over the runs of a setting: the figure that its protocol "
        "reports, and all four; in bold the best."
    )
    strong = [int(np.argmax(means))] if len(groups) > 1 else []
    table = Table(header, rows, [2, *range(4, len(header))], strong, caption=caption, wide=True)
    return Section("figures", "Figures", tables=[table])


def _curves(groups: Sequence[Group]) -> Section:
    section = Section("curves", "Curves", lead="A line a run; runs of one setting share a color.")
    wanted = [
        ("accuracy", "Test accuracy", "eval/accuracy", "% of the test images", ""),
        ("few", "Rare classes", "eval/{reported}/few", "%, mean of the third with the fewest labels", ""),
        ("pseudo_accuracy", "Pseudo-labels that are right", "pseudo/accuracy", "% of those in use", ""),
        ("loss", "Loss", "loss/total", "mean of a log window, logarithmic", ""),
        ("throughput", "Throughput", "throughput/images_per_s", "images through the network a second", ""),
    ]
    declared = {figure.name: figure for group in groups for run in group.runs for figure in run.declared}
    wanted += [
        (name, words(name).capitalize(), name, symbol(figure), figure.meaning)
        for name, figure in declared.items()
        if figure.unit != "distribution"
    ]
    return curve_figures(section, groups, wanted)


def curve_figures(section: Section, groups: Sequence[Group], wanted: Sequence[Sequence[str]]) -> Section:
    """Add curves to a section, a line a run. wanted: name, title, key in the log, unit and caption of each figure."""
    for name, title, key, unit, caption in wanted:
        curves = []
        for group in groups:
            for i, run in enumerate(group.runs):
                shown = label(group.name, LONGEST) if i == 0 else ""
                entries, logged = [*run.log.train, *run.log.evaluations], key.format(reported=run.log.reported)
                curves.append(curve(entries, logged, shown, group.color, lw=1.2 if i else 1.8))
        drawn = over_steps(f"compare_{name}", title, curves, unit, log=name == "loss", caption=caption)
        if drawn is not None:
            section.figures.append(drawn)
        else:
            section.missing.append(f"{title}: not in any of these logs.")
    return section


def class_section(groups: Sequence[Group], *, same_data: bool) -> Section:
    """Images and accuracy of each class; for several settings the gain over the first, too.

    same_data: whether they are of the same labeled and test images, so that classes compare. Images are counted once a
    data set, as unlabeled ones may differ.
    """
    section = Section("classes", "Classes")
    first = groups[0].runs[0]
    if not same_data or first.info is None:
        section.missing.append("Classes are not compared: the runs were trained on different or unknown data.")
        return section
    data: dict[str, RunData] = {}
    for run in (run for group in groups for run in group.runs):
        data.setdefault(run.info.fingerprint if run.info else "", run)
    for number, run in enumerate(data.values()):
        name = f"class_counts_{number}" if number else "class_counts"
        of = f", {Path(run.get('data.path', run.name)).name}" if len(data) > 1 else ""
        counts = count_figure(run, name, f"Images of each class{of}")
        section.figures += [counts] if counts else []
    means = {group.name: mean for group in groups[:LINES] if (mean := _class_mean(group)) is not None}
    if not means:
        section.missing.append("No accuracy of the classes in any of these runs.")
        return section
    marks = {label(name, LONGEST): mean.tolist() for name, mean in means.items()}
    section.figures.append(by_class("compare_classes", "Test accuracy of each class", first, marks, "%"))
    reference, *others = means
    if others:
        gains = {label(name, LONGEST): (means[name] - means[reference]).tolist() for name in others}
        title, style = f"Gain over {label(reference, LONGEST)}", {"colors": SERIES[1:], "zero": True}
        section.figures.append(by_class("compare_gain", title, first, gains, "percentage points", **style))
    if len(groups) > LINES:
        section.missing.append(f"Classes of the first {LINES} settings only.")
    return section


def _class_mean(group: Group) -> Any:
    accuracies = [np.asarray(next(iter(values.values()))) for run in group.runs if (values := class_accuracy(run))]
    return np.mean(accuracies, axis=0) if accuracies else None


def _runs(runs: Sequence[RunData]) -> Section:
    rows = []
    for run in runs:
        state = "finished" if run.summary is not None else f"step {run.log.last_step:,}"
        accuracy = one(run.closing.accuracy) if run.closing else "–"
        rows.append((run.name, run.method, run.get("protocol") or "–", str(run.get("seed", "?")), state, accuracy))
    header = ("run", "method", "protocol", "seed", "state", "accuracy")
    return Section("runs", "Runs", tables=[Table(header, rows, (3, 5), wide=True)])


def differences_table(runs: Sequence[RunData]) -> Table:
    """The settings in which the runs differ."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    apart = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    rows = [(key, *(setting.get(key, "–") for setting in settings)) for key in apart]
    return Table(("setting", *(run.name for run in runs)), rows, title="Settings in which the runs differ", wide=True)
