"""The optimizer: SGD with Nesterov momentum, weight decay on weights alone."""

from __future__ import annotations

import torch
from torch import nn

from semi_fast.config import OptimSettings


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.SGD:
    """SGD over two groups: weights with weight decay; biases and BatchNorm (what has one dimension) without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        fused=True,
    )
    if settings.momentum > 0:
        # From zero, which is what the first step would make of it; left to the first step, the momentum would be
        # uninitialized memory where that step is skipped (loss scaling, on_nonfinite=skip).
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter).detach()
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def momentum_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """SGD's momentum buffers by parameter name; empty before the first step and without momentum."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    buffers = {names[p]: state.get("momentum_buffer") for p, state in optimizer.state.items()}
    return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def restore_momentum(model: nn.Module, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor]) -> None:
    """Put back what `momentum_by_name` took out."""
    for name, parameter in model.named_parameters():
        if name in buffers:
            # In the parameter's own memory layout, as the optimizer would have made it.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffers[name]).detach()
