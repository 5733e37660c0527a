"""Figures 3 to 6 of the paper, of several runs on one data set beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from semi_fast.parts.figures import USED
from semi_fast.reporting.class_figures import confusion_figure
from semi_fast.reporting.comparison import (
    LONGEST,
    class_section,
    curve_figures,
    differences_table,
    figures_table,
    grouped,
)
from semi_fast.reporting.embedding import embedding_figures
from semi_fast.reporting.page import Section, write_page
from semi_fast.reporting.rundata import RunData, label


def write_figures(runs: Sequence[RunData], path: Path, data: str) -> Path:
    """Write the page to `path`, an .html file. Raises: OSError when it cannot be written.

    Args:
        runs: on the same labeled and test images, with what their models make of them, named by their folders.
        data: the data set's name.
    """
    groups = [g._replace(name=g.runs[0].name.rpartition("-seed")[0] or g.name) for g in grouped(runs)]
    names = {id(run): group.name for group in groups for run in group.runs}
    confusion = Section("figure-3", "Figure 3: which class is taken for which")
    maps = Section("figure-4", "Figure 4: embeddings of the test images, by t-SNE", lead="Colored by the true class.")
    for number, run in enumerate(runs):
        name, counts = names[id(run)], run.confusion()
        title = label(name, LONGEST)
        if counts is not None:
            confusion.figures.append(confusion_figure(run, counts, f"confusion_{number}", title))
        drawn = embedding_figures(run, run.test, name=f"tsne_{number}", title=title, heads=False) if run.test else []
        maps.figures += drawn
        if not drawn:
            maps.missing.append(f"{name}: {run.why.get('model') or run.why.get('data') or 'too few test images.'}")
    classes = replace(class_section(groups, same_data=True), title="Figure 5: images and accuracy of each class")
    used = [("used", "Unlabeled images in use", USED.name, "share of them", USED.meaning)]
    right = [("pseudo_accuracy", "Pseudo-labels that are right", "pseudo/accuracy", "% of those in use", "")]
    curves = Section("figure-6", "Figure 6: pseudo-labels over training", lead="A line a run.")
    curve_figures(curves, groups, used + right)
    return write_page(
        path,
        title="Figures 3 to 6 of the paper, of these runs",
        subtitle=f"{len(runs)} runs on {data}",
        state="finished",
        notes=[f"{run.name}: {note}" for run in runs for note in run.notes],
        sections=[figures_table(groups), confusion, maps, classes, curves],
        facts=[differences_table(runs)],
    )
