"""The class counts of unlabeled images, from how a network confuses labeled images that it has not learned from.

Source: Kim et al., DARP (NeurIPS 2020), released code (bbuing9/DARP, train_base_estim.py); the idea is that of Lipton
et al., "Detecting and Correcting for Label Shift with Black Box Predictors" (ICML 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST_CONDITION = 100.0  # condition number of a confusion matrix from which its estimate is left out


@torch.no_grad()
def confusion(probabilities: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """C_jk, the mean probability of class j over held-out images of class k. (n, K), (n,) -> (K, K) float64.

    Columns sum to 1. Every class must have an image.
    """
    members = nn.functional.one_hot(labels, num_classes).double()
    return probabilities.double().t() @ members / members.sum(0)


@torch.no_grad()
def estimate(matrix: Tensor, predicted: Tensor) -> tuple[Tensor, bool]:
    """q = C^-1 q~, and whether it is to be trusted: no negative count, and C well conditioned.

    Args:
        matrix: C, (K, K) float64. predicted: q~, (K,), the sum of the probabilities of all unlabeled images.
    """
    if not torch.linalg.cond(matrix) < MOST_CONDITION:
        return torch.full_like(predicted, torch.nan, dtype=torch.float64), False
    counts = torch.linalg.solve(matrix, predicted.double())
    return counts, bool((counts >= 0).all())


class CountEstimate(nn.Module):
    """The mean of the estimates that were to be trusted.

    Args:
        num_classes: K.
    """

    total: Tensor  # (K,) float32
    accepted: Tensor  # 0-dim int64, estimates in the total

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_classes))
        self.register_buffer("accepted", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def take(self, held_out: Tensor, labels: Tensor, unlabeled: Tensor) -> None:
        """Take in the logits (n, K) of held-out images, their labels (n,), and the logits (m, K) of the unlabeled."""
        matrix = confusion(held_out.softmax(1), labels, len(self.total))
        counts, trusted = estimate(matrix, unlabeled.softmax(1).sum(0))
        if trusted:
            self.total += counts
            self.accepted += 1

    def read(self) -> Tensor | None:
        """Share of each class among the unlabeled images, (K,) summing to 1; None while nothing was to be trusted."""
        return self.total / self.total.sum() if int(self.accepted) else None
