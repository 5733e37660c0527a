"""How good the pseudo-labels are, counted on the device at every step against labels that training never sees."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines import Info
from semi_fast.observe.metrics import EASY_FROM
from semi_fast.parts.losses import PseudoLabels
from semi_fast.parts.statistics import class_counts
from semi_fast.training.evaluate import class_groups

MOST_STEPS = 256  # kept before they are counted


class Health:
    """Counts a method's pseudo-labels: how many are used, of which classes, and how many are right.

    Unlabeled images fall into three kinds. *choice*: easy, used and so confident (EASY_FROM) that FixMatch's usual
    threshold would take them too; hard, used thanks to the lower threshold alone; ultra-hard, not used (those L_EA
    learns from). The three shares sum to 1.

    Args:
        info: the data set.
        hidden: (N,) int64, class of every row of train.npy, -1 where unknown; on the device the counting is done on.
    """

    def __init__(self, info: Info, hidden: Tensor) -> None:
        self.classes, self._hidden = info.num_classes, hidden
        self._groups = class_groups(info.labeled_counts)
        truth = info.unlabeled_counts
        self._truth = [n / sum(truth) for n in truth] if truth and sum(truth) else None
        # Used pseudo-labels by their class; used and right ones by hidden class; then seen, used and easy images.
        self._counts = torch.zeros(3 * self.classes + 3, dtype=torch.int64, device=hidden.device)
        self._steps: list[Tensor] = []  # (4, B) float64 each, not counted yet

    @torch.no_grad()
    def add(self, pseudo: PseudoLabels, rows: Tensor) -> None:
        """Take in one step. Never waits for the device.

        Args:
            pseudo: of B unlabeled images. rows: (B,) int64, the rows of train.npy they are.
        """
        # One copy a step, counted many steps at a time: small operations are what logging costs.
        self._steps.append(torch.stack([pseudo.confidence.double(), pseudo.target, rows, pseudo.mask]))
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

    def figures(self, counts: list[float]) -> dict[str, float | list[float]]:
        """Figures from the counts of all processes together; what is not known is left out."""
        K = self.classes
        target, known, right = counts[:K], counts[K : 2 * K], counts[2 * K : 3 * K]
        seen, used, easy = counts[3 * K :]
        if not seen:
            return {}
        found: dict[str, float | list[float]] = {
            "pseudo/easy": easy / seen,
            "pseudo/hard": (used - easy) / seen,
            "pseudo/ultra_hard": (seen - used) / seen,
        }
        groups = {"": range(K), **{f"_{name}": members for name, members in self._groups.items()}}
        for name, members in groups.items():
            if total := sum(known[k] for k in members):
                found[f"pseudo/accuracy{name}"] = 100.0 * sum(right[k] for k in members) / total
        if used:
            shares = [count / used for count in target]
            found["pseudo_histogram"] = shares
            if self._truth is not None:
                gaps = (abs(a - b) for a, b in zip(shares, self._truth, strict=True))
                found["pseudo/class_gap"] = sum(gaps) / 2
        return found
