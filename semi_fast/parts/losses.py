"""The equations of SeMi as pure functions, one each, in the order of the paper.

Source: "SeMi: When Imbalanced Semi-Supervised Learning Meets Mining Hard Examples" (ACM MM 2025). Where a docstring
says *choice*, the paper is silent or contradicts itself and the line says what is done here; *released* says what the
authors' published code does instead.

Symbols: K classes, B labeled or unlabeled rows, V strong views, d feature size. A tensor over strong views is
view-major: row ``v * B + u`` is view v of image u. All inputs are float32; every mean over unlabeled rows divides by
all V * B of them, the masked ones counting as zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from semi_fast.parts.priors import adjust_logits


class PseudoLabels(NamedTuple):
    """Hard pseudo-labels of a batch, without gradient."""

    target: Tensor  # (B,) int64, class
    confidence: Tensor  # (B,) float32 in [0, 1]
    mask: Tensor  # (B,) bool, True where the pseudo-label is used

    def table(self, rows: Tensor) -> Tensor:
        """All of it in one tensor, (4, B) float64: confidence, class, row of train.npy (``rows``), used or not."""
        return torch.stack([self.confidence.double(), self.target, rows, self.mask])


def labeled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_S: mean cross-entropy of the labeled rows. logits (B, K), labels (B,) int64 -> scalar."""
    return F.cross_entropy(logits, labels)


def unlabeled_loss(strong_logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """L_U: weighted cross-entropy of the strong views against the pseudo-labels (Eq. 5 and 9).

    Args:
        strong_logits: (V * B, K), view-major.
        target: (B,) int64 hard pseudo-labels, or (B, K) float32 soft ones; every view of an image has the same.
        weight: (B,) float32, mask times hardness weight; takes no gradient.

    Returns: scalar, the mean over all V * B rows.
    """
    views = strong_logits.shape[0] // target.shape[0]
    per_row = F.cross_entropy(strong_logits, torch.cat([target] * views), reduction="none")
    return (per_row.view(views, -1) * weight.detach()).mean()


@torch.no_grad()
def linear_pseudo_label(weak_logits: Tensor) -> Tensor:
    """q = softmax(z^w) (sec. 3.3). (B, K) -> (B, K), rows sum to 1, no gradient."""
    return weak_logits.softmax(-1)


@torch.no_grad()
def semantic_pseudo_label(embeddings: Tensor, prototypes: Tensor, filled: Tensor, temperature: float) -> Tensor:
    """q^ = softmax(-distance / T_p) over the class prototypes (sec. 3.3).

    The paper prints distance / T_p; the minus is what its text means. Embeddings are not normalized. The distance is
    taken from differences, not through a matrix product, whose cancellation T_p = 0.1 would magnify.

    Args:
        embeddings: (B, d), the first strong view's.
        prototypes: (K, d); rows of classes that are not filled are ignored.
        filled: (K,) bool, True where the class has a prototype.
        temperature: T_p > 0.

    Returns: (B, K); a class without a prototype has probability 0, and when no class has one all are 0.
    """
    distance = torch.cdist(embeddings, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    # Finite, so that the softmax of a row without any class is not NaN.
    similarity = (distance / -temperature).masked_fill(~filled, torch.finfo(distance.dtype).min)
    return similarity.softmax(-1) * filled


@torch.no_grad()
def mix_pseudo_labels(linear: Tensor, semantic: Tensor, weight: Tensor) -> Tensor:
    """q' = (1 - a) q + a q^ (sec. 3.3). linear, semantic (B, K), weight a (B,) -> (B, K).

    *choice*: one scalar a sample, so that q' stays a distribution. *released*: each column k is weighted by its own
    w_k, after which rows no longer sum to 1.
    """
    return torch.lerp(linear, semantic, weight.unsqueeze(-1))


@torch.no_grad()
def mixing_weight(linear: Tensor, class_weight: Tensor, gamma: Tensor) -> Tensor:
    """a = gamma * w_k with k = argmax q (sec. 3.3).

    Args:
        linear: q, (B, K).
        class_weight: w, (K,) in [0, 1]: m~, the share of each class among the pseudo-labels used so far (*released*),
            or m~ / max m~ (DASO's form, which does not shrink with the number of classes).
        gamma: 0-dim, alpha * epoch / epochs.

    Returns: (B,) in [0, gamma].
    """
    return gamma * class_weight[linear.argmax(-1)]


@torch.no_grad()
def harden(probabilities: Tensor, tau: float) -> PseudoLabels:
    """Hard target t = argmax, confidence c = max, mask M = (c >= tau); the test is inclusive. (B, K) -> (B,) each.

    *released*: SeMi's mask is also on where the linear pseudo-label alone reaches tau.
    """
    confidence, target = probabilities.max(-1)
    return PseudoLabels(target, confidence, confidence >= tau)


@torch.no_grad()
def hardness_weight(probabilities: Tensor, scale: float) -> Tensor:
    """w = 1 - s + s * H(q') / log K, the weight of hard examples (Eq. 4). (B, K) -> (B,) in [1 - s, 1].

    The most certain example weighs 1 - s, the uniform one 1. The paper's Eq. 4 lacks the minus of the entropy.
    """
    entropy = torch.special.entr(probabilities).sum(-1)
    return (1.0 - scale + scale / math.log(probabilities.shape[-1]) * entropy).clamp_max(1.0)


@torch.no_grad()
def ea_teacher(weak_features: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher of L_EA: softmax((e^w - center) / (T_e / 5)) over the d coordinates. (B, d), (d,) -> (B, d).

    *choice*: the teacher is the sharper side, T_e / 5; the paper's "e/5T_e" reads both ways. Subtracting the running
    mean of the teacher (``center``) follows the released code.
    """
    return ((weak_features - center) / (temperature / 5.0)).softmax(-1)


def ea_loss(teacher: Tensor, strong_features: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """L_EA: the strong views of the images whose pseudo-label is *not* used follow the weak view's embedding.

    Args:
        teacher: (B, d), rows sum to 1, without gradient.
        strong_features: (V * B, d), view-major.
        mask: (B,) bool, the mask M of the pseudo-labels; rows where it is on count as zero.
        temperature: T_e > 0.

    Returns: scalar, mean over all V * B rows of the cross-entropy over the d coordinates.
    """
    views = strong_features.shape[0] // teacher.shape[0]
    log_student = (strong_features / temperature).log_softmax(-1).view(views, *teacher.shape)
    return -((teacher * log_student).sum(-1) * ~mask).mean()


@torch.no_grad()
def joint_prior(labeled_prior: Tensor, labeled_rows: int, running_counts: Tensor) -> Tensor:
    """pi: the joint class distribution of the labels and the valid pseudo-labels of a step.

    Args:
        labeled_prior: pi_l, (K,), class frequency of the labeled set, summing to 1.
        labeled_rows: B_l, labeled rows of a step over all processes.
        running_counts: h, (K,), moving average of the used pseudo-labels a step in each class; zero at the start.

    Returns: (K,) proportional to B_l * pi_l + h, summing to 1. *released*: pi_l throughout.
    """
    weight = torch.add(running_counts, labeled_prior, alpha=labeled_rows)
    return weight / weight.sum()


@torch.no_grad()
def balanced_pseudo_labels(
    weak_logits: Tensor, balanced_weak_logits: Tensor, prior: Tensor, strength: float, tau: float
) -> PseudoLabels:
    """Target and mask of the balanced head from logits adjusted by the prior.

    t^b = argmax softmax(z^w - T_b log pi); the mask is on where that softmax or the balanced head's own reaches tau.
    *choice* (and *released*): the paper's Eq. 11 reads otherwise, see ``mixed_balanced_mask``.

    Args:
        weak_logits, balanced_weak_logits: z^w and z~^w, (B, K).
        prior: pi, (K,). strength: T_b. tau: confidence threshold.

    Returns: the pseudo-labels; their confidence is that of the adjusted softmax.
    """
    logits = torch.stack([adjust_logits(weak_logits, prior, -strength), balanced_weak_logits])
    adjusted = harden(logits.softmax(-1), tau)
    return PseudoLabels(adjusted.target[0], adjusted.confidence[0], adjusted.mask.any(0))


@torch.no_grad()
def mixed_balanced_mask(balanced_weak_logits: Tensor, prior: Tensor, strength: float, tau: float) -> Tensor:
    """The mask of Eq. 11: max softmax(z~^w - T_b log pi) > tau. (B, K), (K,) -> (B,) bool.

    Its targets are q', and nothing is adjusted inside the cross-entropy (option ``balanced_target="mixed"``).
    """
    return adjust_logits(balanced_weak_logits, prior, -strength).softmax(-1).amax(-1) > tau
