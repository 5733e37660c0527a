"""The report of one run: its sections, each with what it lacks and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from semi_fast.observe.console import duration
from semi_fast.reporting import curves_over_time as curves
from semi_fast.reporting.class_figures import by_class, confused_pairs, confusion_figure, count_figure
from semi_fast.reporting.drawing import Figure
from semi_fast.reporting.embedding import embedding_figures
from semi_fast.reporting.gallery import gallery_section
from semi_fast.reporting.page import Section, Table, write_page
from semi_fast.reporting.rundata import RunData, confusion_of
from semi_fast.reporting.sweep_table import ratio
from semi_fast.reporting.to_label import EACH, to_label_section
from semi_fast.run.summary import FIGURES, Summary
from semi_fast.training.evaluate import metrics

PAPER_STEPS = 250_000


def write_single(run: RunData, path: Path, each: int = EACH) -> Path:
    """Write the report of one run to `path`, and beside it which images to label next, `each` a class.

    Raises: OSError when it cannot be written.
    """
    sections = [
        overview(run),
        learning(run),
        pseudo_labels(run),
        classes(run),
        confusion(run),
        embeddings(run),
        gallery_section(run),
        to_label_section(run, path.parent, each),
        throughput(run),
    ]
    data = run.info.name if run.info else Path(str(run.get("data.path", "unknown data"))).name
    seed = f", seed {run.get('seed')}" if run.get("seed") is not None else ""
    return write_page(
        path,
        title=run.name,
        subtitle=f"{run.method} on {data}, {run.get('net.name', 'unknown network')}{seed}",
        state="finished" if run.summary is not None else "not finished",
        tiles=tiles(run),
        notes=run.notes,
        sections=sections,
        settings=[Table(("setting", "value"), list(run.settings.items()))],
    )


def tiles(run: RunData) -> list[tuple[str, str, str, str]]:
    """The figures that matter, of the log where there is no summary: name, value, unit and a remark of each."""
    s = run.closing
    if s is None:
        return []
    by = f" ({choice(s)})" if s.figure == "best" else ""
    shown = [("Test accuracy", one(s.accuracy), "%", f"{s.figure}{by}; {s.head} head, {s.weights} weights")]
    for name, value in s.figures.items():
        if name != s.figure:
            remark = f"{s.evaluations_in_mean} evaluations" if name in ("mean20", "median20") else ""
            remark = choice(s) if name == "best" else remark
            shown.append((FIGURES[name].capitalize(), one(value), "%", remark))
    shown.append(("Balanced", one(s.balanced), "%", "mean of the classes"))
    if s.groups:
        shown.append((" / ".join(s.groups), " / ".join(map(one, s.groups.values())), "%", "by labeled images"))
    shown.append(("Throughput", f"{s.images_per_s:,.0f}", "images/s", "through the network"))
    return [*shown, ("Time", duration(s.seconds), "", f"{s.steps:,} steps")]


def choice(s: Summary) -> str:
    """How the best evaluation was chosen: where by the test images, its figure flatters."""
    return "chosen by test images" if s.validation is None else f"chosen by validation: {one(s.validation)}% there"


def overview(run: RunData) -> Section:
    """What was run and, for a data set that the paper has, its figures with ours among them."""
    section = Section("overview", "Overview", tables=[facts_table(run)])
    theirs = run.papers
    section.tables[0].wide = not theirs
    if not theirs:
        return section
    same, s, steps = run.paper, run.closing, run.get("steps", 0)
    if same is not None and s is not None:
        section.lead = f"{s.accuracy:.1f}% here, {same} in the paper for {same.name} (table {same.table}). "
    if isinstance(steps, int) and steps < PAPER_STEPS:
        section.lead += (
            f"The paper's figures are means of three runs of {PAPER_STEPS:,} steps; this run has {steps:,} steps, "
            "so the two cannot be compared yet."
        )
    rows = [(f.name, f.accuracy, str(f)) for f in theirs if f.table == theirs[0].table]
    rows += [("this run", s.accuracy, f"{s.accuracy:.1f} ({s.figure})")] if s is not None else []
    rows.sort(key=lambda row: -row[1])
    strong = [i for i, (name, *_) in enumerate(rows) if name in ("this run", same and same.name)]
    title = f"Table {theirs[0].table} of the paper, and this run"
    cells = [(name, text) for name, _, text in rows]
    section.tables.append(Table(("method", "accuracy, %"), cells, numeric=[1], strong=strong, title=title))
    return section


def facts_table(run: RunData) -> Table:
    """What was run, on what."""
    rows, info, steps = {}, run.info, run.get("steps")
    if info is not None and run.facts is not None:
        hidden = run.facts.unlabeled_counts
        held_out = f"{info.num_test:,} test" + (f", {info.num_validation:,} validation" if info.num_validation else "")
        rows = {
            "data": f"{info.name}: {info.num_classes:,} classes of {info.resolution}×{info.resolution} px",
            "images": f"{info.num_labeled:,} labeled, {info.num_unlabeled:,} unlabeled, {held_out}",
            "imbalance": f"labeled {ratio(info.labeled_counts)}, unlabeled {ratio(hidden) if hidden else 'unknown'}",
            "fingerprint": info.fingerprint[:16],
        }
        if overlap := run.facts.split.get("test_overlap", 0):
            rows["overlap"] = f"{overlap:,} test images are training images too"
    rows |= {"method": run.method, "protocol": run.get("protocol") or "none"}
    keys = {"net.name": "network", "batch": "labeled batch", "mu": "unlabeled : labeled", "seed": "seed"}
    rows |= {name: str(run.get(key)) for key, name in keys.items() if run.get(key) is not None}
    rows["steps"] = f"{run.log.last_step:,} of {steps:,}" if isinstance(steps, int) else "?"
    rows |= {"precision": str(run.get("precision"))} if run.get("precision") else {}
    rows |= {"torch": run.summary.torch} if run.summary else {}
    return Table(("", ""), list(rows.items()), title="What was run", kind="facts")


def one(value: float) -> str:
    """With one digit behind the point; a dash for what is no number."""
    return f"{value:.1f}" if math.isfinite(value) else "–"


def learning(run: RunData) -> Section:
    """Accuracy and losses over training."""
    section = Section("learning", "Learning")
    evaluations = run.log.evaluations
    _add(section, curves.accuracy_figures(evaluations, run.log.reported))
    if not run.has_test_labels:
        section.missing.append("No accuracy: the data set has no test images with labels.")
    elif not evaluations:
        section.missing.append("No accuracy yet: the log has no evaluation.")
    elif len(evaluations) == 1:
        section.lead = "The log has a single evaluation, so accuracies are dots rather than curves."
    if run.info is not None and len(set(run.info.labeled_counts)) == 1:
        section.missing.append(
            "All classes have equally many labeled images: many, medium and few are thirds in the order of the classes."
        )
    _add(section, curves.loss_figures(run.log.train, run.log.names()))
    return section


def pseudo_labels(run: RunData) -> Section:
    """Figure 6, and the figures that the method declares."""
    section = Section("pseudo-labels", "Pseudo-labels and method")
    _add(section, curves.pseudo_figures(run.log.train))
    drawn = {figure.name for figure in section.figures}
    if "pseudo_accuracy" not in drawn and run.log.names("pseudo/"):
        section.missing.append(
            "How many pseudo-labels were right over training is not in the log: the true classes of the unlabeled "
            "images are unknown."
        )
    _add(section, curves.declared_figures(run.log.train, run.declared))
    _add(section, _distributions(run))
    if not section.figures:
        section.missing.append(f"The method {run.method} logs neither pseudo-labels nor figures of its own.")
    section.lead = _pseudo_lead(run)
    return section


def _distributions(run: RunData) -> Iterator[Figure]:
    """Class shares of the pseudo-labels in use beside the truth, and the distributions that the method declares."""
    classes = run.info.num_classes if run.info else 0

    def newest(name: str) -> list[float] | None:
        values: list[float] = next((e[name] for e in reversed(run.log.train) if isinstance(e.get(name), list)), [])
        return values if values and len(values) == classes else None

    used, hidden = newest("pseudo_histogram"), run.facts.unlabeled_counts if run.facts else None
    if used is not None:
        shares = {"in use": [100 * share for share in used]}
        if hidden is not None and any(hidden):
            shares["true"] = [100 * count / sum(hidden) for count in hidden]
        caption = "In use: of the pseudo-labels that are used; true: of the unlabeled images."
        yield by_class("pseudo_classes", "Pseudo-labels by class", run, shares, "% in each class", caption=caption)
    for declared in run.declared:
        values = newest(declared.name) if declared.unit == "distribution" else None
        if values is not None:
            title = curves.words(declared.name).capitalize()
            marks = {title.lower(): values}
            yield by_class(f"method_{declared.name}", title, run, marks, "of each class", caption=declared.meaning)


def _pseudo_lead(run: RunData) -> str:
    asked = run.unlabeled
    if asked is None:
        return ""
    head, known = asked.heads[0], asked.labels >= 0
    right = (asked.classes[head] == asked.labels)[known]
    share = (
        f"{100 * right.mean():.1f}% of the {len(right):,} whose class is known" if len(right) else "an unknown share"
    )
    return f"The {head} head as trained, asked about {len(known):,} unlabeled images, is right about {share}."


def classes(run: RunData) -> Section:
    """Figure 5: how many images each class has, and how well it is recognized."""
    section = Section("classes", "Classes")
    _add(section, [count_figure(run)])
    if run.facts is None:
        section.missing.append("No classes: the data set is unknown.")
        return section
    if run.facts.unlabeled_counts is None:
        section.missing.append("Unlabeled images of each class: unknown, the data set has no labels for them.")
    accuracy = class_accuracy(run)
    if accuracy:
        caption = "Classes from the most to the fewest labeled images."
        section.figures.append(
            by_class("class_accuracy", "Test accuracy of each class", run, accuracy, "%", caption=caption)
        )
    else:
        section.missing.append("No accuracy of the classes: no evaluation, or no test images with labels.")
    return section


def class_accuracy(run: RunData) -> dict[str, list[float]]:
    """Accuracy (K) in percent by head, the reported one first; NaN where a class has no test images."""
    info, counts, accuracy = run.info, run.confusion(), {}
    if run.test is not None and info is not None:
        guesses = run.test.classes.items()
        accuracy = {head: confusion_of(run.test.labels, guess, info.num_classes) for head, guess in guesses}
    if counts is not None:
        accuracy[run.test.heads[0] if run.test else "accuracy"] = counts
    if info is not None and any(counts.any() for counts in accuracy.values()):
        return {head: _numbers(metrics(counts, info.labeled_counts).per_class) for head, counts in accuracy.items()}
    values = (run.log.evaluations[-1].get("per_class") or []) if run.log.evaluations else []
    fits = info is not None and len(values) == info.num_classes and set(values) != {None}
    return {"accuracy": _numbers(values)} if fits else {}


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def confusion(run: RunData) -> Section:
    """Figure 3: which class is taken for which."""
    section = Section("confusion", "Confusion")
    counts = run.confusion()
    if counts is None or not counts.sum() or run.info is None or len(counts) != run.info.num_classes:
        section.missing.append(
            "No confusion matrix: the run is not finished and its model could not be run over labeled test images."
            if run.has_test_labels
            else "No confusion matrix: the data set has no test images with labels."
        )
        return section
    test = run.test
    title = f"Reported head ({test.heads[0]})" if test else "Reported head"
    section.figures.append(confusion_figure(run, counts, "confusion", title))
    if test is not None:
        for other in test.heads[1:]:
            theirs = confusion_of(test.labels, test.classes[other], run.info.num_classes)
            section.figures.append(confusion_figure(run, theirs, f"confusion_{other}", f"The {other} head"))
    pairs = confused_pairs(run, counts)
    if pairs is not None:
        section.tables.append(pairs)
    return section


def embeddings(run: RunData) -> Section:
    """Figure 4: the test images as the network sees them."""
    section = Section("embeddings", "Embeddings")
    if run.test is not None:
        _add(section, embedding_figures(run, run.test))
    if not section.figures:
        reason = run.why.get("model") or run.why.get("data") or "there are no test images."
        section.missing.append(f"No embeddings: {reason}")
    else:
        section.lead = (
            "Embeddings of test images by t-SNE. Near means alike to the network; distances between heaps mean little."
        )
    return section


def throughput(run: RunData) -> Section:
    """Images a second, and where the time goes."""
    section = Section("throughput", "Throughput")
    _add(section, curves.throughput_figures(run.log.train))
    _add(section, curves.time_figures(run.log))
    if not run.log.train:
        section.missing.append("No throughput: the log has no training lines.")
    elif "time_parts" not in {figure.name for figure in section.figures}:
        section.missing.append("Where the time of a step goes is not in the log; waiting for data is.")
    return section


def _add(section: Section, figures: Iterable[Figure | None]) -> None:
    section.figures += [figure for figure in figures if figure is not None]
