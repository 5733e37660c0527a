"""Class priors and logit adjustment: one vector, three uses (Menon et al., ICLR 2021).

In training, ``+ strength * log(prior)`` is added to the logits inside the cross-entropy; of a pseudo-label or of a
prediction (post hoc) it is subtracted before the softmax or the argmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PRIOR_FLOOR = 1e-12  # a class without labels or pseudo-labels still has a finite logarithm


def class_prior(counts: Sequence[int]) -> Tensor:
    """Share of each class among the images counted. (K,) -> (K,) float32 summing to 1."""
    exact = torch.tensor(counts, dtype=torch.float64)
    return (exact / exact.sum()).float()


def adjust_logits(logits: Tensor, prior: Tensor, strength: float | Tensor) -> Tensor:
    """logits + strength * log(prior). logits (B, K), prior (K,) -> (B, K).

    Zero entries of the prior are floored at 1e-12.
    """
    logarithm = prior.clamp_min(PRIOR_FLOOR).log()
    return logits + strength * logarithm if isinstance(strength, Tensor) else logits.add(logarithm, alpha=strength)
