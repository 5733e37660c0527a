"""Accuracy on the test set: one pass, shared by all processes, counted on the device, one transfer at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from semi_fast.methods import Method
from semi_fast.processes.gather import gather_objects

# Pixels of one forward. On a GPU, enough that launching costs nothing; on a CPU, few enough that activations stay in
# its caches: images of 32 px through WRN-28-2 take 0.93 of the time 128 at a time that they take 256 at a time, and
# 0.77 of that of 512.
PIXELS = {"cuda": 1 << 21, "cpu": 1 << 17}


class Metrics(NamedTuple):
    """Figures of one head on the test set; accuracies in percent."""

    accuracy: float  # share of all test images
    balanced: float  # mean of the classes' accuracies
    per_class: list[float | None]  # (K) accuracy of each class; None for a class without test images
    groups: dict[str, float]  # mean accuracy of the classes "many", "medium", "few" by labeled count
    confusion: NDArray[np.int64]  # (K, K): rows are true classes, columns predictions

    def scalars(self, prefix: str) -> dict[str, float]:
        """The figures for a log, without the per-class ones."""
        groups = {f"{prefix}/{name}": value for name, value in self.groups.items()}
        return {f"{prefix}/accuracy": self.accuracy, f"{prefix}/balanced": self.balanced, **groups}


@torch.no_grad()
def evaluate(
    method: Method,
    test: Iterable[tuple[Tensor, Tensor]],
    labeled_counts: Sequence[int],
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    predict: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> dict[str, Metrics]:
    """Metrics of every prediction of a method, the reported one first; the same on every rank.

    Args:
        method: its parameters as they stand; put into eval mode for the pass, and each module back to its own mode.
        test: this rank's share of the test set, in batches (x (n, 3, H, W), y (n,) int64) on the method's device; no
            image in two shares. A share may be empty while another is not.
        labeled_counts: (K) labeled images a class, for the groups.
        autocast: makes the context of a forward, for mixed precision.
        predict: the method's, where it is compiled. It gets images in one shape: a short batch is filled up with zeros.
    """
    predict = predict or method.predict
    rows, classes = 0, len(labeled_counts)
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    counts: dict[str, Tensor] = {}
    try:
        for x, y in test:
            rows = rows or len(x)
            with autocast():
                predictions = predict(x if len(x) == rows else _filled_up(x, rows))
            for name, logits in predictions.items():
                cells = torch.zeros(classes * classes, dtype=torch.int64, device=x.device)
                cells.scatter_add_(0, y * classes + logits[: len(y)].argmax(1), torch.ones_like(y))
                counts[name] = counts[name] + cells if name in counts else cells
    finally:
        for module, training in modes:
            module.training = training
    table = torch.stack(list(counts.values())).cpu().numpy() if counts else np.empty((0, classes * classes), np.int64)
    shares = gather_objects((list(counts), table))
    names = max((names for names, _ in shares), key=len)
    total = np.sum([table for share, table in shares if share], axis=0).reshape(len(names), classes, classes)
    figures = {name: metrics(total[i], labeled_counts) for i, name in enumerate(names)}
    return {name: figures[name] for name in sorted(figures, key=lambda name: name != method.reported)}


def _filled_up(x: Tensor, rows: int) -> Tensor:
    """The images (n, 3, H, W) and zeros behind them, `rows` in all, in the layout of the images."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, rows - len(x)))


def batch_size(images: int, side: int, device: torch.device) -> int:
    """How many of so many images to evaluate at a time: batches of one size, `PIXELS` at most, hardly filled up."""
    most = max(1, PIXELS["cuda" if device.type == "cuda" else "cpu"] // side**2)
    return max(1, -(-images // max(1, -(-images // most))))


def metrics(confusion: NDArray[np.int64], labeled_counts: Sequence[int]) -> Metrics:
    """Figures from a confusion matrix (K, K), rows true."""
    total = confusion.sum(1)
    with np.errstate(invalid="ignore"):
        per_class = np.where(total > 0, 100.0 * confusion.diagonal() / total, np.nan)
    seen = per_class[total > 0]
    groups = {
        name: float(np.nanmean(per_class[members]))
        for name, members in class_groups(labeled_counts).items()
        if np.isfinite(per_class[members]).any()
    }
    accuracy = 100.0 * confusion.diagonal().sum() / max(1, confusion.sum())
    shown = [float(value) if np.isfinite(value) else None for value in per_class]
    return Metrics(float(accuracy), float(seen.mean()), shown, groups, confusion)


def class_groups(labeled_counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes of the groups "many", "medium" and "few": the third with the most labeled images, the rest, the last.

    A third is K / 3 rounded (3-4-3 of 10 classes, 33-34-33 of 100); classes with equal counts keep their order.
    A group without classes is left out.
    """
    order = sorted(range(len(labeled_counts)), key=lambda k: -labeled_counts[k])
    third = round(len(order) / 3)
    groups = {"many": order[:third], "medium": order[third : len(order) - third], "few": order[len(order) - third :]}
    return {name: members for name, members in groups.items() if members}
