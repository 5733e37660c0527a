"""The fused optimizer and the fused EMA give what the plain formulas give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semi_fast.config import OptimSettings
from semi_fast.training.ema import Ema
from semi_fast.training.optim import build_optimizer, set_lr

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def network(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5))
    return model.to(device).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [OptimSettings(), OptimSettings(nesterov=False), OptimSettings(momentum=0.0)])
def test_the_fused_optimizer_equals_the_formula(device, settings):
    model = network(device)
    optimizer = build_optimizer(model, settings)
    assert all(group["fused"] for group in optimizer.param_groups)
    values = [p.detach().double().clone() for p in model.parameters()]
    momenta = [torch.zeros_like(v) for v in values]
    for step in range(20):
        lr = 0.03 / (1 + step)
        set_lr(optimizer, lr)
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
        model(x).logsumexp(1).sum().backward()
        for p, value, momentum in zip(model.parameters(), values, momenta, strict=True):
            decay = settings.weight_decay if p.dim() > 1 else 0.0
            gradient = p.grad.double() + decay * value
            momentum.mul_(settings.momentum).add_(gradient)
            value -= lr * (gradient + settings.momentum * momentum if settings.nesterov else momentum)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for p, value in zip(model.parameters(), values, strict=True):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_ema_is_one_operation_and_equals_a_loop_over_parameters(device):
    model = network(device)
    ema = Ema(model, 0.9)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    operations = []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p)
            for name, p in model.named_parameters():
                expected[name].lerp_(p, 1 - 0.9)
        with Counter():
            ema.update(model)
    assert operations.count(torch.ops.aten._foreach_lerp_) == 5
    assert set(operations) <= {torch.ops.aten._foreach_lerp_, torch.ops.aten.detach}
    for name, value in ema.average.items():
        torch.testing.assert_close(value, expected[name])
