"""Distribution alignment (Berthelot et al., "ReMixMatch", ICLR 2020, sec. 3.1): predictions take a target's shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semi_fast.processes.gather import sum_ranks, world_size

FLOOR = 1e-6  # on the target and on the mean prediction


@torch.no_grad()
def align(probabilities: Tensor, target: Tensor, mean: Tensor) -> Tensor:
    """p (target / mean), rows normalized. probabilities (B, K), target and mean (K,) -> (B, K)."""
    scaled = probabilities * ((target + FLOOR) / (mean + FLOOR))
    return scaled / scaled.sum(-1, keepdim=True)


@torch.no_grad()
def sharpen(probabilities: Tensor, power: float) -> Tensor:
    """p^power, rows normalized; power is 1 over the temperature. (B, K) -> (B, K)."""
    raised = probabilities**power
    return raised / raised.sum(-1, keepdim=True)


class MeanPrediction(nn.Module):
    """The mean of the predictions of the last steps, uniform at the start: q-bar.

    Args:
        num_classes: K.
        window: steps it goes back.
    """

    recent: Tensor  # (window, K) float32, the mean prediction of each step, the oldest first

    def __init__(self, num_classes: int, window: int = 128) -> None:
        super().__init__()
        self.register_buffer("recent", torch.full((window, num_classes), 1 / num_classes))

    def read(self) -> Tensor:
        """q-bar as it stands, (K,) float32 summing to 1."""
        return self.recent.mean(0)

    @torch.no_grad()
    def update(self, probabilities: Tensor) -> None:
        """Take in this rank's predictions of a step, (B, K); all ranks' count alike."""
        mean = sum_ranks(probabilities.mean(0).unsqueeze(0)) / world_size()
        self.recent.copy_(torch.cat([self.recent[1:], mean]))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all steps."""
        self.recent.fill_(1 / self.recent.shape[1])
