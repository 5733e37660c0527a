"""The report of one run: its sections, each with what it lacks and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semi_fast.reporting import curves_over_time as curves
from semi_fast.reporting.class_figures import accuracy_figure, count_figure, histogram_figure
from semi_fast.reporting.confusion import confused_pairs, confusion_figure
from semi_fast.reporting.drawing import Figure
from semi_fast.reporting.embedding import embedding_figures
from semi_fast.reporting.gallery import gallery_section
from semi_fast.reporting.page import write_page
from semi_fast.reporting.rundata import RunData, confusion_of
from semi_fast.reporting.runlog import lists
from semi_fast.reporting.sections import Section
from semi_fast.reporting.summary import overview, settings_table, tiles
from semi_fast.reporting.time_figures import time_figures


def write_single(run: RunData, path: Path) -> Path:
    """Write the report of one run to `path`. Raises: OSError when it cannot be written."""
    sections = [
        overview(run),
        learning(run),
        pseudo_labels(run),
        classes(run),
        confusion(run),
        embeddings(run),
        gallery_section(run),
        throughput(run),
    ]
    return write_page(
        path,
        title=run.name,
        subtitle=subtitle(run),
        state="finished" if run.summary is not None else "not finished",
        tiles=tiles(run),
        notes=run.notes,
        sections=sections,
        facts=[],
        settings=[settings_table(run)],
    )


def subtitle(run: RunData) -> str:
    """What was run, in a line."""
    info = run.info
    data = info.name if info else Path(str(run.get("data.path", "unknown data"))).name
    seed = run.get("seed")
    return f"{run.method} on {data}, {run.get('net.name', 'unknown network')}" + (
        f", seed {seed}" if seed is not None else ""
    )


def learning(run: RunData) -> Section:
    """Accuracy and losses over training."""
    section = Section("learning", "Learning")
    evaluations = run.log.evaluations
    _add(section, curves.accuracy_figures(evaluations))
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
    """Figure 6 and the health of the method."""
    section = Section("pseudo-labels", "Pseudo-labels")
    _add(section, curves.pseudo_figures(run.log.train))
    if not section.figures:
        section.missing.append(f"No pseudo-labels: the method {run.method} logs none.")
        return section
    drawn = {figure.name for figure in section.figures}
    if "pseudo_accuracy" not in drawn:
        section.missing.append(
            "How many pseudo-labels were right over training is not in the log: the true classes of the unlabeled "
            "images are unknown, or the run is of an older version."
        )
    if "pseudo_kinds" not in drawn:
        section.missing.append("The shares of easy, hard and ultra-hard images are not in the log.")
    shares = _pseudo_shares(run)
    if "in use" in shares and run.info is not None:
        section.figures.append(histogram_figure(run, shares))
    else:
        section.missing.append("The classes of the pseudo-labels are not in the log, nor could the model be asked.")
    section.lead = _pseudo_lead(run)
    return section


def _pseudo_shares(run: RunData) -> dict[str, NDArray[np.float64]]:
    """Class shares (K) of pseudo-labels and of the truth, as far as they are known."""
    info = run.info
    shares: dict[str, NDArray[np.float64]] = {}
    if info is None:
        return shares
    _, logged = lists(run.log.train, "pseudo_histogram")
    _, prior = lists(run.log.train, "prior")
    asked = _asked(run)
    if len(logged) and logged.shape[1] == info.num_classes:
        shares["in use"] = logged[-1]
    elif asked is not None:
        predicted, mask, _ = asked
        shares["in use"] = np.bincount(predicted[mask], minlength=info.num_classes) / max(1, int(mask.sum()))
    if info.unlabeled_counts is not None and any(info.unlabeled_counts):
        shares["true"] = np.asarray(info.unlabeled_counts) / sum(info.unlabeled_counts)
    if len(prior) and prior.shape[1] == info.num_classes:
        shares["prior"] = prior[-1]
    return shares


def _asked(run: RunData) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]] | None:
    """Predictions of the trained standard head for the unlabeled images: classes, in use or not, true labels."""
    unlabeled = run.probe.unlabeled if run.probe else None
    if unlabeled is None:
        return None
    head = "standard" if "standard" in unlabeled.heads else unlabeled.heads[0]
    return unlabeled.classes[head], unlabeled.confidences[head] >= float(run.get("method.tau", 0.0)), unlabeled.labels


def _pseudo_lead(run: RunData) -> str:
    asked = _asked(run)
    if asked is None:
        return ""
    predicted, mask, labels = asked
    known = mask & (labels >= 0)
    lead = f"The standard head with averaged weights is confident of {100 * mask.mean():.1f}% of the unlabeled images"
    if not mask.any():
        return lead + "."
    if not known.any():
        return lead + "; how many of them it gets right is unknown, since their true classes are."
    which = "those" if known.sum() == mask.sum() else f"the {known.sum():,} of them whose class is known"
    return lead + f"; {100 * (predicted[known] == labels[known]).mean():.1f}% of {which} it gets right."


def classes(run: RunData) -> Section:
    """Figure 5: how many images each class has, and how well it is recognized."""
    section = Section("classes", "Classes")
    _add(section, [count_figure(run)])
    if run.info is None:
        section.missing.append(f"No classes: {run.why.get('facts', 'the data set is unknown.')}")
        return section
    if run.info.unlabeled_counts is None:
        section.missing.append("Unlabeled images of each class: unknown, the data set has no labels for them.")
    accuracy = class_accuracy(run)
    if accuracy:
        section.figures.append(accuracy_figure(run, accuracy))
    else:
        section.missing.append("No accuracy of the classes: no evaluation, or no test images with labels.")
    return section


def class_accuracy(run: RunData) -> dict[str, list[float]]:
    """Accuracy (K) in percent by head, the reported one first; NaN where a class has no test images."""
    classes = run.info.num_classes if run.info else 0
    found: dict[str, list[float]] = {}
    test = run.probe.test if run.probe else None
    if test is not None and (test.labels >= 0).any():
        for head, predicted in test.classes.items():
            found[head] = _diagonal(confusion_of(test.labels, predicted, classes))
    counts = run.confusion()
    if counts is not None and len(counts) == classes and counts.sum():
        found[next(iter(found), "accuracy")] = _diagonal(counts)
    elif not found and run.log.evaluations:
        values = run.log.evaluations[-1].get("per_class") or []
        if len(values) == classes and any(v is not None for v in values):
            found["accuracy"] = [float("nan") if v is None else v for v in values]
    return found


def _diagonal(counts: NDArray[np.int64]) -> list[float]:
    total = counts.sum(1)
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, 100 * counts.diagonal() / total, np.nan).tolist()


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
    test = run.probe.test if run.probe else None
    title = f"Reported head ({test.heads[0]})" if test else "Reported head"
    section.figures.append(confusion_figure(run, counts, "confusion", title))
    for other in test.heads[1:] if test else []:
        assert test is not None
        theirs = confusion_of(test.labels, test.classes[other], run.info.num_classes)
        section.figures.append(confusion_figure(run, theirs, f"confusion_{other}", f"The {other} head"))
    pairs = confused_pairs(run, counts)
    if pairs is not None:
        section.tables.append(pairs)
    return section


def embeddings(run: RunData) -> Section:
    """Figure 4: the test images as the network sees them."""
    section = Section("embeddings", "Embeddings")
    test = run.probe.test if run.probe else None
    if test is not None:
        _add(section, embedding_figures(run, test))
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
    _add(section, time_figures(run))
    if not run.log.train:
        section.missing.append("No throughput: the log has no training lines.")
    elif "time_parts" not in {figure.name for figure in section.figures}:
        section.missing.append("Where the time of a step goes is not in the log; waiting for data is.")
    return section


def _add(section: Section, figures: Sequence[Figure | None] | Any) -> None:
    section.figures += [figure for figure in figures if figure is not None]
