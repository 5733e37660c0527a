"""Labeled images held out to measure on: a function of a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_prep.errors import UserError


def require_one(labeled_counts: Sequence[int], names: Sequence[str], method: str) -> None:
    """Raises: UserError for classes without a labeled image, naming them and the method that needs one of each."""
    none = [name for name, count in zip(names, labeled_counts, strict=True) if count < 1]
    if none:
        raise UserError(
            f"method={method} needs a labeled image of every class, got none of {', '.join(none)}. "
            "Use data with more labeled images."
        )


def require_two(labeled_counts: Sequence[int], names: Sequence[str], option: str) -> None:
    """Raises: UserError for classes with fewer than two labeled images, naming them and the option that holds out."""
    short = [f"{name} ({count})" for name, count in zip(names, labeled_counts, strict=True) if count < 2]
    if short:
        raise UserError(
            f"{option} holds out labeled images of every class and needs two or more of each, got {', '.join(short)}. "
            "Use data with more labeled images."
        )


def held_out_counts(labeled_counts: Sequence[int], most: int | None = None) -> list[int]:
    """How many images of each class are held out: half of them, rounded down, and not more than `most`."""
    return [count // 2 if most is None else min(count // 2, most) for count in labeled_counts]


def hold_out(labels: Tensor, counts: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw so many images of each class, all alike.

    Args:
        labels: (n,) int64. counts: (K) images of each class. seed: decides which.

    Returns: places in `labels` of those held out and of the others, ascending, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for k, count in enumerate(counts):
        mine = (labels == k).nonzero().flatten()
        drawn[mine[torch.randperm(len(mine), generator=generator)[:count]]] = True
    return drawn.nonzero().flatten(), (~drawn).nonzero().flatten()
