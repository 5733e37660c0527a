"""The figures that every run logs: name, unit and meaning. What a method logs besides, it declares itself."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from semi_fast.parts.figures import CONFIDENCE, USED, Figure

# Pseudo-labels from here on would pass FixMatch's usual threshold too; see `semi_fast.observe.health`.
EASY_FROM = 0.95

SYMBOLS = {"percent": "%", "distribution": "share"}  # of units that are written another way

# A name with `*` is that of a family. What all processes have in common is of all of them, the rest of the first.
FIGURES = (
    Figure("throughput/images_per_s", "images/s", "Images through the network a second."),
    Figure("throughput/samples_per_s", "samples/s", "Labeled and unlabeled images a second."),
    Figure("throughput/ceiling_share", "share", "Speed as a share of the bare model's, measured at the start."),
    Figure("time/step_ms", "ms", "Mean time of a step, without evaluation and saving."),
    Figure("time/slowest_step_ms", "ms", "Longest step of the window."),
    Figure("time/data_wait_share", "share", "Share of a step spent on the next batch."),
    Figure("time/data_wait_ms", "ms", "Waiting for the next batch in a step, without augmentation."),
    Figure("time/augment_ms", "ms", "Making views in a step; on a GPU beside the rest."),
    Figure("time/forward_backward_ms", "ms", "Network, loss and gradient of a step; all of a recorded one."),
    Figure("time/optimizer_ms", "ms", "Update of weights and their average in a step."),
    Figure("time/evaluation_s", "s", "Evaluation in the window."),
    Figure("time/evaluation_share", "share", "Share of the session's time so far spent on evaluation."),
    Figure("time/checkpoint_s", "s", "Saving since the window before."),
    Figure("graph/replayed", "share", "Steps of the window replayed as one graph, of all its steps."),
    Figure("memory/host_mb", "MiB", "Resident memory of the process."),
    Figure("memory/device_mb", "MiB", "Most that tensors took so far on the device."),
    Figure("gpu/utilization", "percent", "GPU utilization when the window was logged."),
    Figure("optim/lr", "", "Learning rate of the window's last step."),
    Figure("guard/skipped", "steps", "Steps skipped so far: a number was not finite."),
    Figure("loss/total", "", "Loss, the sum of its parts."),
    Figure("loss/*", "", "Part of the loss, as it enters the sum."),
    USED,
    CONFIDENCE,
    Figure("pseudo/easy", "share", f"Unlabeled images used with a confidence of {EASY_FROM} or more."),
    Figure("pseudo/hard", "share", f"Unlabeled images used with a confidence below {EASY_FROM}."),
    Figure("pseudo/ultra_hard", "share", "Unlabeled images not used: confidence below the threshold."),
    Figure("pseudo/accuracy", "percent", "Used pseudo-labels that are right, by hidden labels."),
    Figure("pseudo/accuracy_*", "percent", "Used pseudo-labels that are right, by hidden labels in the group."),
    # Half the summed difference between the class shares of used pseudo-labels and those of the unlabeled images.
    Figure("pseudo/class_gap", "share", "Distance of the used pseudo-labels' classes from the hidden ones."),
    Figure("pseudo_histogram", "distribution", "Classes of the used pseudo-labels."),
    Figure("eval/accuracy", "percent", "Test accuracy of the reported head."),
    Figure("validation/accuracy", "percent", "Validation images that are right: by it the best is chosen."),
    Figure("validation/balanced", "percent", "Mean of the classes' accuracies on validation images."),
    Figure("validation/*", "percent", "Validation accuracy of a third of the classes, by labels."),
    Figure("eval/*/*/accuracy", "percent", "Test images that are right."),
    Figure("eval/*/*/balanced", "percent", "Mean of the classes' test accuracies."),
    Figure("eval/*/*/many", "percent", "Test accuracy of the third of classes with most labels."),
    Figure("eval/*/*/medium", "percent", "Test accuracy of the classes between."),
    Figure("eval/*/*/few", "percent", "Test accuracy of the third of classes with fewest labels."),
)


def find_figure(name: str, declared: Iterable[Figure] = ()) -> Figure | None:
    """The figure of that name, among `declared` too; an exact name wins over a family. None: there is none."""
    figures = (*declared, *FIGURES)
    exact = (figure for figure in figures if figure.name == name)
    family = (figure for figure in figures if fnmatchcase(name, figure.name))
    return next(exact, None) or next(family, None)


def title(figure: Figure) -> str:
    """A figure's meaning as a heading."""
    return figure.meaning.removesuffix(".")


def symbol(figure: Figure) -> str:
    """A figure's unit as it is written beside numbers."""
    return SYMBOLS.get(figure.unit, figure.unit)
