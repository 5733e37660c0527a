"""Running statistics of a method, as buffers: read first, updated after the losses of the step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def class_counts(classes: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """How many rows of each class the mask keeps. (n,) int64 and (n,) bool -> (K,) int64, without a host sync."""
    return classes.new_zeros(num_classes).index_add_(0, classes, mask.to(classes.dtype))


def one_hot(classes: Tensor, num_classes: int) -> Tensor:
    """(n,) int64 -> (n, K) float32, without a host sync, which PyTorch's own has."""
    return torch.eye(num_classes, device=classes.device)[classes]


class RunningDistribution(nn.Module):
    """The class distribution of everything counted so far: SeMi's m~ (sec. 3.3).

    *choice*: "running count" is read as a count over the whole run, kept as integers, so that it is exact however long
    the run and whatever the number of processes; before the first count the distribution is uniform.
    """

    counts: Tensor  # (K,) int64

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    def read(self) -> Tensor:
        """Share of each class, (K,) float32 summing to 1."""
        return (self.counts / self.counts.sum()).nan_to_num(1.0 / self.counts.numel())

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Add one step's counts, (K,) integers, of all processes together."""
        self.counts.add_(counts)


class MovingAverage(nn.Module):
    """An exponential moving average of a vector, zero at the start: ``value = decay * value + (1 - decay) * new``.

    Args:
        size: length n of the vector.
        decay: in [0, 1).
    """

    value: Tensor  # (n,) float32

    def __init__(self, size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(size))

    def read(self) -> Tensor:
        """The average as it stands, (n,) float32; later updates do not change what was read."""
        return self.value.clone()

    @torch.no_grad()
    def update(self, new: Tensor) -> None:
        """Take in one step's vector, (n,) float32, of all processes together."""
        self.value.lerp_(new, 1.0 - self.decay)
