"""Every figure a run logs: title, unit and meaning, in one table that log, W&B, dashboard and report share."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

# Pseudo-labels from here on would pass FixMatch's usual threshold too; see `semi_fast.observe.health`.
EASY_FROM = 0.95

When = Literal["always", "unlabeled", "semi", "hidden labels", "cuda", "evaluated", "saved", "ceiling", "guarded"]


class Figure(NamedTuple):
    """One figure, or a family of them with `*` in the name."""

    name: str  # "group/figure"
    title: str
    unit: str  # "" for pure numbers; "share" is in [0, 1], "%" in [0, 100]
    meaning: str
    when: When = "always"  # which runs log it
    better: Literal["max", "min", ""] = ""  # which extreme is kept in W&B's summary beside the last value
    per_class: bool = False  # a list of K numbers instead of one

    @property
    def group(self) -> str:
        """What stands before the first slash; lists have their own name."""
        return self.name.partition("/")[0]


FIGURES = (
    Figure("throughput/images_per_s", "Images per second", "images/s", "views through the network, all processes"),
    Figure("throughput/samples_per_s", "Samples per second", "samples/s", "labeled and unlabeled images, not views"),
    Figure(
        "throughput/ceiling_share",
        "Share of the model-only ceiling",
        "share",
        "rate against forward, backward and update alone on ready images; measured once at the start",
        "ceiling",
    ),
    Figure("time/step_ms", "Step", "ms", "mean time of a step, without evaluation and saving"),
    Figure("time/slowest_step_ms", "Slowest step", "ms", "longest step of the window"),
    Figure("time/data_wait_share", "Data wait", "share", "of a step spent on the next batch, augmentation included"),
    Figure("time/data_wait_ms", "Data wait", "ms", "waiting for the next batch in a step, without augmentation"),
    Figure("time/augment_ms", "Augmentation", "ms", "views made in a step; may overlap where it runs beside the model"),
    Figure("time/forward_backward_ms", "Forward and backward", "ms", "network and loss of a step, without the bank"),
    Figure("time/bank_ms", "Memory bank", "ms", "the bank's push of a step, if the loss is not compiled", "semi"),
    Figure("time/optimizer_ms", "Optimizer and EMA", "ms", "update of weights and their average in a step"),
    Figure("time/evaluation_s", "Evaluation", "s", "seconds of evaluation in the window", "evaluated"),
    Figure("time/checkpoint_s", "Checkpoint", "s", "seconds of saving since the window before", "saved"),
    Figure("memory/host_mb", "Host memory", "MiB", "resident memory of the first process"),
    Figure("memory/device_mb", "Device memory", "MiB", "most that tensors took so far on the first device", "cuda"),
    Figure("gpu/utilization", "GPU utilization", "%", "as NVML tells it, at the moment of logging", "cuda"),
    Figure("optim/lr", "Learning rate", "", "of the last step of the window"),
    Figure("guard/skipped", "Skipped steps", "steps", "left out so far because a number was not finite", "guarded"),
    Figure("loss/total", "Loss", "", "sum of all parts", better="min"),
    Figure("loss/*", "Loss: *", "", "a part, as it enters the sum"),
    Figure("pseudo/used", "Pseudo-labels used", "share", "unlabeled images whose pseudo-label is used", "unlabeled"),
    Figure("pseudo/easy", "Easy", "share", f"used, with a confidence of {EASY_FROM} or more", "unlabeled"),
    Figure("pseudo/hard", "Hard", "share", f"used, with a confidence below {EASY_FROM}", "unlabeled"),
    Figure("pseudo/ultra_hard", "Ultra-hard", "share", "not used: confidence below the threshold", "unlabeled"),
    Figure("pseudo/accuracy", "Pseudo-labels right", "%", "of those used, by hidden labels", "hidden labels", "max"),
    Figure(
        "pseudo/accuracy_*",
        "Pseudo-labels right: * classes",
        "%",
        "of those used on images whose hidden label is in the group, by labeled count",
        "hidden labels",
        "max",
    ),
    Figure(
        "pseudo/class_gap",
        "Class gap of pseudo-labels",
        "share",
        "half the summed difference between class shares of used pseudo-labels and of the unlabeled images",
        "hidden labels",
        "min",
    ),
    Figure("pseudo/confidence", "Confidence", "share", "mean confidence of all pseudo-labels", "unlabeled"),
    Figure("pseudo/hardness", "Hardness weight", "share", "mean weight of the used pseudo-labels", "semi"),
    Figure("pseudo/mixing", "PLCE mixing weight", "share", "mean weight of the semantic pseudo-label", "semi"),
    Figure("pseudo/balanced_used", "Used by the balanced head", "share", "unlabeled images it trains on", "semi"),
    Figure("bank/fill", "Bank fill", "share", "slots in use", "semi"),
    Figure("bank/confidence_q10", "Bank confidence, lowest tenth", "share", "quantile 0.1 of what is stored", "semi"),
    Figure("bank/confidence_q50", "Bank confidence, median", "share", "quantile 0.5 of what is stored", "semi"),
    Figure("bank/confidence_q90", "Bank confidence, highest tenth", "share", "quantile 0.9 of what is stored", "semi"),
    Figure(
        "pseudo_histogram",
        "Classes of pseudo-labels",
        "share",
        "of those used, each class",
        "unlabeled",
        per_class=True,
    ),
    Figure("prior", "Prior", "share", "class distribution the logits are adjusted by", "semi", per_class=True),
    Figure("eval/accuracy", "Test accuracy", "%", "reported head, averaged weights", better="max"),
    Figure("eval/*/*/accuracy", "Test accuracy: *", "%", "share of test images that are right", better="max"),
    Figure("eval/*/*/balanced", "Balanced accuracy: *", "%", "mean of the classes' accuracies", better="max"),
    Figure("eval/*/*/many", "Many: *", "%", "accuracy of the third of classes with most labels", better="max"),
    Figure("eval/*/*/medium", "Medium: *", "%", "accuracy of the classes between", better="max"),
    Figure("eval/*/*/few", "Few: *", "%", "accuracy of the third of classes with fewest labels", better="max"),
)


def find_figure(name: str) -> Figure:
    """The figure of that name, with the `*` of its title filled in; an exact name wins over a family.

    A name that is not in the table (a method of one's own may log what it likes) is its own title, without a unit.
    """
    for figure in FIGURES:
        if figure.name == name:
            return figure
    for figure in FIGURES:
        if fnmatchcase(name, figure.name):
            return figure._replace(name=name, title=figure.title.replace("*", _filling(name)))
    return Figure(name, name, "", "")


def _filling(name: str) -> str:
    # eval/ema/balanced/accuracy -> "ema balanced"; loss/balanced_labeled -> "balanced labeled"
    _, *middle, last = name.split("/")
    return " ".join(middle or [last.removeprefix("accuracy_").replace("_", " ")])


def axis_label(name: str) -> str:
    """`Step (ms)`: title and unit of a figure."""
    figure = find_figure(name)
    return f"{figure.title} ({figure.unit})" if figure.unit else figure.title
