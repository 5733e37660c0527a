"""Mixup (Zhang et al., ICLR 2018) in the form of MixMatch: the first of two images is the one that has more weight."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Mixing(NamedTuple):
    """What a step draws."""

    share: Tensor  # lambda, 0-dim float32 in [0.5, 1]
    partners: Tensor  # (n,) int64, a permutation


def draw_mixing(rows: int, alpha: float, generator: torch.Generator | None, device: torch.device) -> Mixing:
    """lambda ~ Beta(alpha, alpha), replaced by max(lambda, 1 - lambda), and with which row each one is mixed.

    Of several processes each draws the same and mixes its own rows. Never waits for the device: lambda is drawn on the
    host, from the number that the generator was seeded by.
    """
    assert generator is not None, "draws need the generator of the step"
    share = np.random.default_rng(generator.initial_seed()).beta(alpha, alpha)
    partners = torch.rand(rows, generator=generator, device=device).argsort()
    return Mixing(torch.full((), max(share, 1 - share), device=device), partners)


def mix(x: Tensor, mixing: Mixing) -> Tensor:
    """lambda x + (1 - lambda) x[partners], of images or of targets: (n, ...) floats -> the same."""
    return mixing.share * x + (1 - mixing.share) * x[mixing.partners]
