"""Features of rare classes made of others (CoSSL, Fan et al., CVPR 2022; released code YUE-FAN/CoSSL, tfe_init.py)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIXUP = 0.75  # alpha of Beta(alpha, alpha)


def blending_chance(labeled_counts: Tensor) -> Tensor:
    """P_k = (N_max - N_k) / N_max: how likely a feature of class k is blended within a step. (K,) -> (K,) in [0, 1)."""
    most = labeled_counts.max()
    return (most - labeled_counts) / most


@torch.no_grad()
def enhance(labeled: Tensor, labels: Tensor, unlabeled: Tensor, seed: int) -> Tensor:
    """As many features of every class as the largest has: its own, then blended ones (offline enhancement).

    A head whose rows are the classes' mean features, of unit length, scores all features. Of class k, the j-th blended
    one is l a + (1 - l) b: a is one of its own, drawn with replacement; b the one j-th most probable for k among the
    labeled features of other classes and all unlabeled ones (from the first again where they are too few); l ~
    Beta(0.75, 0.75), not folded. *choice*: all views are plain (*released*: weak for labeled, strong for unlabeled).

    Args:
        labeled: (n, d). labels: (n,) int64, every class at least once. unlabeled: (m, d). seed: decides all draws.

    Returns: (K, N_max, d) float32.
    """
    random = np.random.default_rng(seed)
    members = F.one_hot(labels).to(labeled.dtype)
    head = F.normalize(members.t() @ labeled / members.sum(0).unsqueeze(1), dim=1)
    every = torch.cat([labeled, unlabeled])
    classes = torch.cat([labels, labels.new_full((len(unlabeled),), -1)])
    scores = (every @ head.t()).softmax(1)
    most, rows = int(members.sum(0).max()), []
    for k in range(len(head)):
        own, others = labeled[labels == k], (classes != k).nonzero().flatten()
        missing = most - len(own)
        first = torch.from_numpy(random.integers(len(own), size=missing)).to(own.device)
        share = torch.from_numpy(random.beta(MIXUP, MIXUP, (missing, 1))).to(own)
        nearest = others[scores[others, k].argsort(descending=True, stable=True)]
        second = nearest[torch.arange(missing, device=own.device) % len(nearest)]
        rows.append(torch.cat([own, share * own[first] + (1 - share) * every[second]]))
    return torch.stack(rows)
