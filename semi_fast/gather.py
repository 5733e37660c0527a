"""Rows of all processes in rank order, with fixed shapes: what keeps statistics the same on every rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Candidates(NamedTuple):
    """What is offered to the memory bank, in the order in which it is offered."""

    embeddings: Tensor  # (n, d) float32
    classes: Tensor  # (n,) int64
    confidences: Tensor  # (n,) float32
    mask: Tensor  # (n,) bool


def world_size() -> int:
    """Processes of the run; 1 when torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_ranks(x: Tensor) -> Tensor:
    """x of every rank, stacked in rank order: (n, ...) -> (world, n, ...); a view of x when there is one process.

    Every rank must call it with the same shape and dtype. Takes no gradient.
    """
    world = world_size()
    if world == 1:
        return x.detach().unsqueeze(0)
    everyone = x.new_empty((world * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(everyone, x.detach().contiguous())
    return everyone.unflatten(0, (world, x.shape[0]))


def sum_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, added in rank order, so that every rank gets the same bits. (n, ...) -> (n, ...)."""
    return gather_ranks(x).sum(0)


@torch.no_grad()
def gather_candidates(embeddings: Tensor, classes: Tensor, confidences: Tensor, mask: Tensor) -> Candidates:
    """The bank's candidates of all ranks: every strong view of every image, view by view, in rank order within a view.

    That is the order one process has with the same global batch, so the bank does not depend on the number of ranks.

    Args:
        embeddings: (V * B, d) float32 of this rank, view-major.
        classes, confidences, mask: (B,) of this rank; the same for every view of an image. Classes below 2^24: they
            travel as float32 beside the embeddings, in one message.

    Returns: V * world * B candidates.
    """
    views = embeddings.shape[0] // classes.shape[0]
    classes, confidences, mask = (x.repeat(views) for x in (classes, confidences, mask))
    if world_size() == 1:
        return Candidates(embeddings.detach(), classes, confidences, mask)
    labels = torch.stack([classes.float(), confidences, mask.float()], dim=1)
    rows = gather_ranks(torch.cat([embeddings.detach(), labels], dim=1))
    rows = rows.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)
    return Candidates(rows[:, :-3].contiguous(), rows[:, -3].long(), rows[:, -2].contiguous(), rows[:, -1] > 0)
