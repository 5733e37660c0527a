"""Class scores of unit features by their similarity to labeled ones, and their propagation within a batch (CCL)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-6  # weight of one more key of every class, orthogonal to all features


class Projection(nn.Sequential):
    """Linear, BatchNorm, ReLU, linear, to unit length: (n, d) -> (n, 2 d).

    Its BatchNorm keeps no statistics, as nothing but training asks for projections.
    """

    def __init__(self, size: int) -> None:
        norm = nn.BatchNorm1d(size, track_running_stats=False)
        super().__init__(nn.Linear(size, size), norm, nn.ReLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(super().forward(x), dim=-1)


def class_scores(
    features: Tensor, keys: Tensor, members: Tensor, temperature: float, leave_out_self: bool = False
) -> Tensor:
    """ln of the class probabilities: softmax_k ln(sum_j Y_jk exp(f keys_j / T) / sum_j Y_jk), j over the keys.

    Args:
        features: f, (n, e). keys: (m, e). All of unit length.
        members: Y, (m, K), at least 0: how much each key counts for each class.
        temperature: T.
        leave_out_self: of feature i, leave out key i.

    Returns: (n, K). A class without keys scores as one whose keys are orthogonal to the feature.
    """
    kernel = (features @ keys.t() / temperature).exp()
    counts = members.sum(0)
    if leave_out_self:
        kernel = kernel * (1 - torch.eye(*kernel.shape, device=kernel.device))
        counts = (counts - members[: len(features)]).clamp_min(0.0)
    return ((kernel @ members + FLOOR) / (counts + FLOOR)).log().log_softmax(-1)


def propagate(features: Tensor, probabilities: Tensor, alpha: float) -> Tensor:
    """P = (I - alpha S)^-1 (1 - alpha) p, S the row-softmax of all dot products. (*, n, e), (*, n, K) -> (*, n, K).

    By its series, sum_i alpha^i S^i (1 - alpha) p, to float32's last digit: as the rows of S sum to 1, what is left
    out is below alpha^(number of terms). It has no pivots, for which a solver on a GPU would wait.
    """
    neighbors = (features @ features.mT).softmax(-1)
    result = term = (1 - alpha) * probabilities
    for _ in range(math.ceil(math.log(1e-8) / math.log(alpha)) if alpha else 0):
        term = alpha * (neighbors @ term)
        result = result + term
    return result
