"""How good the pseudo-labels are, counted on the device at every step against labels that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semi_fast.observe.metrics import EASY_FROM
from semi_fast.parts.figures import CONFIDENCE, USED
from semi_fast.parts.statistics import class_counts
from semi_fast.training.evaluate import class_groups

MOST_STEPS = 256  # kept before they are counted
IDLE_STEPS = 500  # without a pseudo-label in use, after which that is said


class Health:
    """Counts a method's pseudo-labels: how many are used, of which classes, and how many are right.

    Unlabeled images fall into three kinds. *choice*: easy, used and so confident (EASY_FROM) that FixMatch's usual
    threshold would take them too; hard, used thanks to a lower threshold alone; ultra-hard, not used. The three shares
    sum to 1.

    Args:
        labeled_counts: (K) labeled images a class, for the groups of classes.
        hidden: (N,) int64, class of every row of train.npy, -1 where unknown.
        unlabeled_rows: (U,) int64, the rows of the unlabeled images.
        device: where the pseudo-labels are.
    """

    def __init__(
        self,
        labeled_counts: Sequence[int],
        hidden: NDArray[np.int64],
        unlabeled_rows: NDArray[np.int64],
        device: torch.device,
    ) -> None:
        self.classes, self._groups = len(labeled_counts), class_groups(labeled_counts)
        truth = hidden_counts(hidden, unlabeled_rows, self.classes)
        self._truth = None if truth is None else [count / sum(truth) for count in truth]
        self._hidden = torch.from_numpy(hidden).to(device)
        # Used pseudo-labels by their class; used and right ones by hidden class; then seen, used and easy images.
        self._counts = torch.zeros(3 * self.classes + 3, dtype=torch.int64, device=device)
        self._steps: list[Tensor] = []  # (4, B) float64 each, not counted yet

    @torch.no_grad()
    def add(self, pseudo: Tensor) -> None:
        """Take in one step, a copy of it. Never waits for the device.

        Args:
            pseudo: (4, B) float64, `PseudoLabels.table` of B unlabeled images.
        """
        # One copy a step, counted many steps at a time: small operations are what logging costs.
        self._steps.append(pseudo.clone())
        if len(self._steps) >= MOST_STEPS:
            self._count()

    def take(self) -> Tensor:
        """The counts since the last call, (3 K + 3,) int64 on the device, of this process; counting starts anew."""
        self._count()
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        return counts

    @torch.no_grad()
    def _count(self) -> None:
        if not self._steps:
            return
        confidence, *exact = torch.cat(self._steps, dim=1)
        target, rows, mask = (values.long() for values in exact)
        self._steps, used = [], mask > 0
        truth = self._hidden[rows]
        known = used & (truth >= 0)
        slots = torch.cat([target, self.classes + truth.clamp_min(0), 2 * self.classes + truth.clamp_min(0)])
        kept = torch.cat([used, known, known & (target == truth)])
        counts = class_counts(slots, kept, 3 * self.classes)
        # In float32, as the confidence was, lest a boundary move.
        easy = used & (confidence.float() >= EASY_FROM)
        totals = torch.stack([torch.ones_like(easy), used, easy]).sum(1)
        self._counts += torch.cat([counts, totals])

    def figures(self, counts: Sequence[float]) -> dict[str, float | list[float]]:
        """Figures from the counts of all processes together; what is not known is left out."""
        K = self.classes
        target, known, right = counts[:K], counts[K : 2 * K], counts[2 * K : 3 * K]
        seen, used, easy = counts[3 * K :]
        if not seen:
            return {}
        figures: dict[str, float | list[float]] = {
            "pseudo/easy": easy / seen,
            "pseudo/hard": (used - easy) / seen,
            "pseudo/ultra_hard": (seen - used) / seen,
        }
        groups = {"": range(K), **{f"_{name}": members for name, members in self._groups.items()}}
        for name, members in groups.items():
            if total := sum(known[k] for k in members):
                figures[f"pseudo/accuracy{name}"] = 100.0 * sum(right[k] for k in members) / total
        if used:
            shares = [count / used for count in target]
            figures["pseudo_histogram"] = shares
            if self._truth is not None:
                gaps = (abs(a - b) for a, b in zip(shares, self._truth, strict=True))
                figures["pseudo/class_gap"] = sum(gaps) / 2
        return figures


class Idleness:
    """Warns once where no pseudo-label is used for IDLE_STEPS on end, so that the run may train for hours in vain.

    Args:
        threshold: the method's option `tau`; None where it has none.
        step: steps done so far.
        say: takes the warning.
    """

    def __init__(self, threshold: float | None, step: int, say: Callable[[str], None]) -> None:
        self._threshold, self._step, self._say = threshold, step, say
        self._idle, self._said = 0, False

    def read(self, step: int, figures: Mapping[str, Any]) -> None:
        """Take in the figures of the log window that ends after `step` steps."""
        self._idle = self._idle + step - self._step if figures.get(USED.name) == 0 else 0
        self._step = step
        if self._idle < IDLE_STEPS or self._said:
            return
        self._said = True
        confidence = [f"mean confidence {figures[CONFIDENCE.name]:.3f}"] if CONFIDENCE.name in figures else []
        threshold = [] if self._threshold is None else [f"threshold method.tau={self._threshold}"]
        facts = f" ({', '.join(confidence + threshold)})" if confidence + threshold else ""
        advice = " Lower method.tau if that does not change." if threshold else ""
        self._say(f"warning: no pseudo-label has been used for {self._idle:,} steps{facts}.{advice}")


def hidden_counts(hidden: NDArray[np.int64], rows: NDArray[np.int64], classes: int) -> list[int] | None:
    """Unlabeled images a class, (K) by their hidden labels; None where there are none, or one of them is unknown.

    Args:
        hidden: (N,) int64, class of every row of train.npy, -1 where unknown.
        rows: (U,) int64, those of the unlabeled images.
    """
    labels = hidden[rows]
    known = len(labels) > 0 and labels.min() >= 0
    return np.bincount(labels, minlength=classes).tolist() if known else None
