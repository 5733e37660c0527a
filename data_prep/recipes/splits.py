"""Which images are labeled, which are unlabeled: pure functions of the labels and the numbers asked for."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

SELECTIONS = ("first", "random")


MIDDLE, HEAD_TAIL = "middle", "head-tail"  # the shapes that are named


class Gamma(NamedTuple):
    """An imbalance: largest / smallest count, >= 1, and how counts go along the classes.

    `shape` is "" (falling), "rev" (rising), "middle" (rising to the middle class, then falling) or "head-tail" (falling
    to the middle class, then rising).
    """

    ratio: Fraction
    shape: str = ""

    @property
    def slug(self) -> str:
        """The form used in folder names: 100 -> "100", 1/100 -> "rev100", middle:100 -> "middle100"."""
        return self.shape + str(self.ratio).replace("/", "over")

    def __str__(self) -> str:
        if self.shape in (MIDDLE, HEAD_TAIL):
            return f"{self.shape}:{self.ratio}"
        return str(1 / self.ratio if self.shape else self.ratio)


def parse_gamma(text: str, option: str = "--gamma-u") -> Gamma:
    """Read "100", "1", "12.5", for a reversed tail "1/100" or "0.01", or a shape: "middle:100", "head-tail:100".

    Raises: UserError when it is no positive number, or a shape of a ratio below 1.
    """
    shape, colon, number = str(text).strip().rpartition(":")
    try:
        value = Fraction(number)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if shape in (MIDDLE, HEAD_TAIL) and value >= 1:
        return Gamma(value, shape)
    if colon or value <= 0:
        raise UserError(
            f"{option} is a ratio such as 100, 1 or 1/100 (reversed), or a shape with a ratio of 1 or more, such as "
            f"{MIDDLE}:100 or {HEAD_TAIL}:100, got '{text}'."
        )
    return Gamma(value) if value >= 1 else Gamma(1 / value, "rev")


def long_tail_counts(first: int, gamma: Gamma, classes: int) -> list[int]:
    """Images per class of a long tail: N_k = int(N_1 * gamma^(-(k-1)/(K-1))), k = 1..K, in the shape of `gamma`.

    The floor is taken of the exact value (integer arithmetic), so that no rounding of a power costs an image; the
    smallest class has exactly int(N_1 / gamma). "middle" and "head-tail" are shapes of unlabeled sets in Du et al.,
    "SimPro" (ICML 2024); *choice*: the same counts are dealt out from the middle, or from both ends, one to either side
    in turn, the first class of two alike first.

    Args:
        first: N_1, images of the largest class, >= 0.
        classes: K, >= 2.

    Returns: K counts, in class order.
    """
    if classes < 2:
        raise UserError(f"A long tail needs at least 2 classes, got {classes}.")
    if first < 0:
        raise UserError(f"The largest class must have 0 or more images, got {first}.")
    counts = [_floor(first, gamma.ratio, k, classes - 1) for k in range(classes)]
    if gamma.shape in (MIDDLE, HEAD_TAIL):
        outward = sorted(range(classes), key=lambda k: abs(2 * k - (classes - 1)), reverse=gamma.shape == HEAD_TAIL)
        return [count for _, count in sorted(zip(outward, counts, strict=True))]
    return counts[::-1] if gamma.shape else counts


def _floor(first: int, ratio: Fraction, k: int, last: int) -> int:
    """The largest n with n <= first * ratio^(-k/last), that is n^last * ratio^k <= first^last."""
    n = int(first * float(ratio) ** (-k / last))  # off by one at most; mended exactly below
    bound, power = first**last * ratio.denominator**k, ratio.numerator**k
    while n**last * power > bound:
        n -= 1
    while (n + 1) ** last * power <= bound:
        n += 1
    return n


class Split(NamedTuple):
    """A choice of images. `rows` (n,) are the kept images' indices, ascending; `labeled` and `unlabeled` are
    positions in `rows`, ascending, int64. `shortfalls` are sentences about classes with too few images."""

    rows: NDArray[np.int64]
    labeled: NDArray[np.int64]
    unlabeled: NDArray[np.int64]
    shortfalls: list[str]


def select(
    labels: NDArray[np.int64],
    class_names: tuple[str, ...],
    labeled_counts: list[int],
    unlabeled_counts: list[int],
    *,
    selection: str = "first",
    seed: int = 0,
    disjoint: bool = False,
) -> Split:
    """Choose N_k labeled and M_k unlabeled images of each class k.

    Each class is put in order (the data set's own, or drawn from `seed`); the first N_k are labeled, and the unlabeled
    set is the first N_k + M_k, or the M_k that follow the N_k where `disjoint`. A class with fewer images gives what it
    has, labeled first. **released** (ACR's split, which SeMi's code uses): file order, unlabeled contains labeled.

    Args:
        labels: (n,) class of every image, 0..K-1; others are never chosen.

    Raises: UserError when a class asked for labels has no image at all.
    """
    labeled: list[NDArray[np.int64]] = []
    unlabeled: list[NDArray[np.int64]] = []
    shortfalls: list[str] = []
    for k, (n, m) in enumerate(zip(labeled_counts, unlabeled_counts, strict=True)):
        order = class_order(labels, k, selection, seed)
        if n and not len(order):
            raise UserError(f"Class '{class_names[k]}' has no training image, the split asks for {n} labeled ones.")
        if len(order) < n + m:
            taken = min(n, len(order))
            shortfalls.append(
                f"class '{class_names[k]}' has {len(order):,} images, the split asks for {n:,} labeled + {m:,} more "
                f"unlabeled: took {taken:,} + {len(order) - taken:,}"
            )
        labeled.append(order[:n])
        unlabeled.append(order[n if disjoint else 0 : n + m])
    chosen = [np.sort(np.concatenate(part)) for part in (labeled, unlabeled)]
    rows = np.union1d(*chosen)
    positions = [np.searchsorted(rows, part).astype(np.int64) for part in chosen]
    return Split(rows.astype(np.int64), positions[0], positions[1], shortfalls)


def class_order(labels: NDArray[np.int64], k: int, selection: str, seed: int) -> NDArray[np.int64]:
    """Indices of class k's images, in the order in which a split takes them: as they come, or drawn from (seed, k).

    The draw sorts Philox's raw output, which NumPy guarantees not to change between versions.
    """
    members = np.flatnonzero(labels == k).astype(np.int64)
    if selection == "first":
        return members
    keys = np.random.Philox(key=[seed, k]).random_raw(len(members))
    return members[np.argsort(keys, kind="stable")]


def fraction_counts(class_sizes: list[int], fraction: float) -> list[int]:
    """Labeled images per class for a share of each class, rounded half up, at least one where there is any."""
    return [min(size, max(1, int(size * fraction + 0.5))) if size else 0 for size in class_sizes]
