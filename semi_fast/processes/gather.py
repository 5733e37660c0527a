"""Rows of all processes in rank order, with fixed shapes: what keeps statistics the same on every rank."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# PyTorch 2.13 renamed it and warns of the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Candidates(NamedTuple):
    """What is offered to the memory bank, in the order in which it is offered."""

    embeddings: Tensor  # (n, d) float32
    classes: Tensor  # (n,) int64
    confidences: Tensor  # (n,) float32
    mask: Tensor  # (n,) bool
    rows: Tensor  # (n,) int64, the image each was made of


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
    _all_gather(everyone, x.detach().contiguous())
    return everyone.unflatten(0, (world, x.shape[0]))


def share_of_rank(x: Tensor) -> Tensor:
    """This rank's rows of what all ranks drew alike for their global batch: (world * n, ...) -> (n, ...)."""
    world = world_size()
    return x if world == 1 else x.unflatten(0, (world, -1))[dist.get_rank()]


def sum_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, added in rank order, so that every rank gets the same bits. (n, ...) -> (n, ...).

    Where there is one process: x itself, without gradient.
    """
    return gather_ranks(x).sum(0) if world_size() > 1 else x.detach()


def gather_objects(value: T) -> list[T]:
    """A small picklable value of every rank, in rank order. Waits for all of them."""
    everyone: list[T] = [value] * world_size()
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone


@torch.no_grad()
def gather_candidates(
    embeddings: Tensor, classes: Tensor, confidences: Tensor, mask: Tensor, rows: Tensor
) -> Candidates:
    """The bank's candidates of all ranks: every strong view of every image, view by view, in rank order within a view.

    That is the order one process has with the same global batch, so the bank does not depend on the number of ranks.

    Args:
        embeddings: (V * B, d) float32 of this rank, view-major.
        classes, confidences, mask, rows: (B,) of this rank; the same for every view of an image.

    Returns: V * world * B candidates, every bit as it was offered: all travel in one message, as the int32 words they
        are made of.
    """
    views = embeddings.shape[0] // classes.shape[0]
    classes, confidences, mask, rows = (torch.cat([x] * views) for x in (classes, confidences, mask, rows))
    if world_size() > 1:
        mine = [embeddings.detach(), *(x.unsqueeze(1) for x in (classes, confidences, mask.int(), rows))]
        words = gather_ranks(torch.cat([x.contiguous().view(torch.int32) for x in mine], dim=1))
        words = words.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)
        columns = words.split([x.shape[1] * x.element_size() // 4 for x in mine], dim=1)
        # A clone each: a view as a wider type must start at a multiple of its size.
        mine = [
            part.clone(memory_format=torch.contiguous_format).view(x.dtype)
            for part, x in zip(columns, mine, strict=True)
        ]
        embeddings, *facts = mine
        classes, confidences, numbers, rows = (x.squeeze(1) for x in facts)
        mask = numbers > 0
    return Candidates(embeddings.detach(), classes, confidences, mask, rows)
