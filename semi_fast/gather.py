"""Rows of all processes in rank order, with fixed shapes: what keeps statistics the same on every rank."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Processes of the run; 1 when torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_ranks(x: Tensor) -> Tensor:
    """x of every rank, stacked in rank order: (...) -> (world, ...); a view of x when there is one process.

    Every rank must call it with the same shape and dtype. Takes no gradient.
    """
    world = world_size()
    if world == 1:
        return x.detach().unsqueeze(0)
    everyone = x.new_empty((world, *x.shape))
    dist.all_gather_into_tensor(everyone.flatten(0, 1) if x.dim() else everyone, x.detach().contiguous())
    return everyone


def sum_ranks(x: Tensor) -> Tensor:
    """The sum of x over all ranks, added in rank order, so that every rank gets the same bits. (...) -> (...)."""
    return gather_ranks(x).sum(0)
