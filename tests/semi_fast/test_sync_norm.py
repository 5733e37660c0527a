"""Synchronized BatchNorm in one process is BatchNorm; in several, see test_processes.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from semi_fast.nets import build_net
from semi_fast.processes.sync_norm import BATCH_NORMS, SyncedBatchNorm, synchronize_batchnorm

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(12, 5), (6, 5, 7), (4, 5, 6, 3)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_alone_it_is_batchnorm_forward_backward_and_statistics(shape, options):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    torch.manual_seed(0)
    plain = kind(5, **options)
    if plain.affine:
        nn.init.uniform_(plain.weight, 0.5, 2)
        nn.init.normal_(plain.bias)
    synced = SyncedBatchNorm.like(copy.deepcopy(plain))
    for _ in range(3):
        x = (torch.randn(shape) * 3 + 100).requires_grad_()  # a mean that would cancel digits in E[x^2] - E[x]^2
        y = x.detach().clone().requires_grad_()
        weights = torch.randn(shape)
        one, other = plain(x), synced(y)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        (one.exp() * weights).sum().backward()
        (other.exp() * weights).sum().backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    for (key, value), (name, expected) in zip(synced.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == name
        if key != "num_batches_tracked" or plain.momentum is None:  # else nothing reads it
            torch.testing.assert_close(value, expected)
    for p, q in zip(synced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    plain.eval(), synced.eval()
    if plain.track_running_stats:
        torch.testing.assert_close(synced(x), plain(x), rtol=1e-4, atol=1e-4)


def test_a_network_keeps_its_tensors_and_their_names():
    net = build_net("wrn10_1", bn_momentum=0.2)
    before = dict(net.state_dict(keep_vars=True))
    synchronize_batchnorm(net, CPU)
    after = dict(net.state_dict(keep_vars=True))
    assert before.keys() == after.keys()
    assert all(after[key] is before[key] for key in before)
    assert not any(isinstance(module, BATCH_NORMS) for module in net.modules())
    momenta = {module.momentum for module in net.modules() if isinstance(module, SyncedBatchNorm)}
    assert momenta == {0.2}


def test_half_precision_in_gives_half_precision_out_of_float32_statistics():
    norm = SyncedBatchNorm.like(nn.BatchNorm2d(3))
    x = torch.randn(8, 3, 4, 4, dtype=torch.bfloat16) + 1
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, 0.1 * x.float().mean((0, 2, 3)))


def test_a_batchnorm_that_activates_too_still_does():
    class Activating(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    net = nn.Sequential(Activating(3))
    expected, synced = copy.deepcopy(net), copy.deepcopy(net)
    synchronize_batchnorm(synced, CPU)
    assert isinstance(synced[0], SyncedBatchNorm)
    x = torch.randn(4, 3, 2, 2)
    for made in (synced, copy.deepcopy(synced)):  # the averaged network is a copy
        torch.testing.assert_close(made(x), expected(x))
    assert synced.state_dict().keys() == net.state_dict().keys()
