"""The averaged network: a copy of the method whose parameters are the moving averages of the live ones."""

from __future__ import annotations

import copy
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semi_fast.config import EmaSettings
from semi_fast.methods import Method


class Ema:
    """After each optimizer step: average = decay * average + (1 - decay) * value.

    Attributes:
        method: the copy. In eval mode, without gradients; never put it into training mode. Its buffers are the live
            method's own tensors, so that banks and tables exist once, and BatchNorm's statistics are the newest
            ("copied"), or averages like the parameters ("averaged").
        average: the averages by name: parameters and, where they are averaged, BatchNorm statistics.

    Args:
        method: on its device, not compiled yet; as it stands, it starts the averages.
        settings: decay; with `warmup` at most 1 - 1 / n in update n since the start or a restart.
    """

    def __init__(self, method: Method, settings: EmaSettings) -> None:
        self.settings = settings
        self._parameters = list(method.parameters())
        self._norms = _norms(method) if settings.buffers == "averaged" else {}
        # The dictionaries themselves are shared: a buffer that is replaced in one method is in the other, too.
        memo: dict[int, Any] = {id(m._buffers): m._buffers for m in method.modules() if m not in self._norms.values()}
        self.method = copy.deepcopy(method, memo).eval().requires_grad_(False)
        self.average = {name: p.detach() for name, p in self.method.named_parameters()}
        self.average |= _statistics(_norms(self.method)) if self._norms else {}
        self._averages = list(self.average.values())
        # 1 - decay where that changes from step to step: a recorded update reads it.
        self._share = torch.ones((), device=self._averages[0].device) if settings.warmup else None

    def begin_step(self, step: int) -> None:
        """Set the decay of the update that comes next.

        Args:
            step: updates before it, since the start of the run or a restart.
        """
        if self._share is not None:
            self._share.fill_(max(1 / (step + 1), 1 - self.settings.decay))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the method as it stands, but for what is frozen: parameters without a gradient, norms in eval mode.

        Fused operations; never waits for the device.
        """
        moving = [p.requires_grad for p in self._parameters]
        moving += [norm.training for norm in self._norms.values() for _ in _statistics({"": norm})]
        averages, live = (list(compress(tensors, moving)) for tensors in (self._averages, self._live()))
        if self._share is None:
            torch._foreach_lerp_(averages, live, 1 - self.settings.decay)
            return
        torch._foreach_mul_(averages, 1 - self._share)
        torch._foreach_add_(averages, torch._foreach_mul(live, self._share))

    @torch.no_grad()
    def reset(self) -> None:
        """Start the averages anew from the method as it stands."""
        torch._foreach_copy_(self._averages, self._live())

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name (not copied)."""
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages saved by `state_dict`. Raises: ValueError for other names."""
        if state.keys() != self.average.keys():
            raise ValueError(f"EMA of other parameters: {sorted(state.keys() ^ self.average.keys())}")
        for name, value in state.items():
            self.average[name].copy_(value)

    def _live(self) -> list[Tensor]:
        """What is averaged, as it is now, in the order of `average`."""
        return [*self._parameters, *_statistics(self._norms).values()]


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def _statistics(norms: dict[str, _BatchNorm]) -> dict[str, Tensor]:
    """Running means and variances by name."""
    keys = ("running_mean", "running_var")
    both = {f"{name}.{key}": norm._buffers[key] for name, norm in norms.items() for key in keys}
    return {name: statistic for name, statistic in both.items() if statistic is not None}
