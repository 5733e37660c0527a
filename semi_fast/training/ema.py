"""Exponential moving average of a model's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Keeps a float32 average of every parameter; buffers are those of the model itself.

    After each optimizer step: average = decay * average + (1 - decay) * parameter. The evaluated model has the averaged
    parameters and the newest BatchNorm statistics ("buffers copied"), so buffers need no second copy here.

    Args:
        model: its parameters at this moment start the average.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters as they stand. One fused operation over all of them; never waits for the device."""
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in model.parameters()], 1 - self.decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged parameters; afterwards its own again, to the bit."""
        own = [p.detach().clone() for p in model.parameters()]
        self._fill(model, list(self.average.values()))
        try:
            yield
        finally:
            self._fill(model, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name (not copied)."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages saved by `state_dict`; names and shapes must be those of the model."""
        if state.keys() != self.average.keys():
            raise ValueError(f"EMA of other parameters: {sorted(state.keys() ^ self.average.keys())}")
        for name, value in state.items():
            self.average[name].copy_(value)

    @staticmethod
    @torch.no_grad()
    def _fill(model: nn.Module, values: list[Tensor]) -> None:
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
