"""SEVAL's fits on held-out images: offsets of the logits and thresholds of the confidence.

Source: "Learning Label Refinement and Threshold Adjustment for Imbalanced Semi-Supervised Learning" (SEVAL; Li et al.)
and its released code (ZerojumpLine/SEVAL). All on the host, in float64: it happens once an evaluation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

BOUNDS = (0.001, 3.0)  # of an offset
FEWEST = 10  # held-out images of a group's classes below which the group is rare

Array = NDArray[np.float64]


def fit_offsets(logits: Array, labels: NDArray[np.int64]) -> Array:
    """o-hat: what makes argmin over o of the class-balanced cross-entropy of z - ln o, within the bounds.

    The loss is convex in b = ln o and does not change when a constant is added to b. *choice*: L-BFGS finds the minimum
    within the bounds, and the constant is then chosen so that the mean of b is as near to 0 as they allow; *released*:
    Nelder-Mead from o = 1, which may stop anywhere along that line.

    Args:
        logits: (n, K). labels: (n,), every class among them.

    Returns: (K,).
    """
    n, classes = logits.shape
    weights = 1.0 / np.bincount(labels, minlength=classes)[labels] / classes
    picked = np.zeros((n, classes))
    picked[np.arange(n), labels] = 1.0

    def loss(b: Array) -> tuple[float, Array]:
        log = log_softmax(logits - b, axis=1)
        return float(-weights @ log[np.arange(n), labels]), weights @ (picked - np.exp(log))

    low, high = np.log(BOUNDS)
    options: dict[str, Any] = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-8}
    box = [(low, high)] * classes
    b = minimize(loss, np.zeros(classes), jac=True, method="L-BFGS-B", bounds=box, options=options).x
    return np.clip(np.exp(b + np.clip(-b.mean(), low - b.min(), high - b.max())), *BOUNDS)


def group_of_class(classes: int, groups: int) -> NDArray[np.int64]:
    """Groups of ceil(K / G) classes that follow one another, (K,)."""
    return np.arange(classes) // -(-classes // groups)


def fit_thresholds(
    logits: Array, labels: NDArray[np.int64], weights: Array, groups: int, precision: float
) -> tuple[Array, NDArray[np.bool_]]:
    """tau-hat of every class: where the weighted precision of what is predicted as its group comes closest to t*.

    A group is rare, with threshold 0, when its predictions weigh at most 1 / (10 G) of all or fewer than 10 images are
    of its classes. *choice*: the precision changes only at the confidences of the images, so all of those are tried and
    of equals the lowest is taken; *released*: Nelder-Mead from 0.95.

    Args:
        logits: (n, K), with the offsets already taken off.
        labels: (n,). weights: (n,), of each image.
        groups: G. precision: t*, the precision wanted.

    Returns: thresholds, and whether a class is of a rare group, (K,) each.
    """
    probabilities = softmax(logits, axis=1)
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    group = group_of_class(logits.shape[1], groups)
    thresholds, rare = np.zeros(len(group)), np.zeros(len(group), dtype=bool)
    for g in range(group[-1] + 1):
        mine, of_group = group[predicted] == g, group == g
        few = (group[labels] == g).sum() < FEWEST
        if few or weights[mine].sum() <= weights.sum() / (10 * groups):
            rare |= of_group
            continue
        order = np.argsort(confidence[mine])[::-1]
        sorted_confidence, weight = confidence[mine][order], weights[mine][order]
        right = weight * (labels == predicted)[mine][order]
        # precision[i] is that of the i + 1 most confident; all of them where the threshold is 0.
        precisions = right.cumsum() / weight.cumsum()
        if precisions[-1] >= precision:
            continue
        levels = np.append(sorted_confidence[1:], 0.0)  # above level i are the i + 1 most confident
        above = np.append(sorted_confidence[:-1] > sorted_confidence[1:], True)  # equal ones pass together
        distance = np.where(above, np.abs(precisions - precision).round(12), np.inf)
        thresholds[of_group] = levels[len(levels) - 1 - distance[::-1].argmin()]
    return thresholds, rare
