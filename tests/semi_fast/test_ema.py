"""The averaged network: its formula, what it shares with the live one, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from semi_fast.config import EmaSettings
from semi_fast.methods import method_names
from semi_fast.training.ema import Ema
from tests.semi_fast.tiny import tiny_method


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    return model.to(memory_format=torch.channels_last)


def move(model):
    """Every parameter and float buffer, by something."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += torch.randn_like(tensor)
            else:
                tensor += 1


@pytest.mark.parametrize(("warmup", "buffers"), [(False, "copied"), (True, "copied"), (True, "averaged")])
def test_averages_follow_the_formula(warmup, buffers):
    model = network()
    ema = Ema(model, EmaSettings(decay=0.7, warmup=warmup, buffers=buffers))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = {name for name, _ in model.named_parameters()}
    averaged |= {"1.running_mean", "1.running_var"} if buffers == "averaged" else set()
    for step in range(8):
        move(model)
        ema.begin_step(step)
        ema.update()
        decay = min(1 - 1 / (step + 1), 0.7) if warmup else 0.7
        for name, now in model.state_dict().items():
            expected[name] = expected[name] * decay + now * (1 - decay) if name in averaged else now.clone()
        if warmup and step == 0:  # the start is forgotten at once
            assert torch.equal(ema.method[3].weight, model[3].weight)
        assert ema.average.keys() == averaged
        for name, value in ema.method.state_dict().items():
            if buffers == "copied" or name != "1.num_batches_tracked":  # which nothing reads in eval mode
                torch.testing.assert_close(value, expected[name])


def test_a_constant_decay_gives_the_same_bits_as_one_lerp_a_parameter():
    model = network()
    ema, expected = Ema(model, EmaSettings(decay=0.999)), {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(5):
        move(model)
        ema.begin_step(step)
        ema.update()
        torch._foreach_lerp_(list(expected.values()), [p.detach() for p in model.parameters()], 1 - 0.999)
    assert all(torch.equal(ema.average[name], value) for name, value in expected.items())


def test_what_is_frozen_keeps_its_average():
    model = network()
    ema = Ema(model, EmaSettings(decay=0.5, buffers="averaged"))
    move(model)
    ema.begin_step(0)
    ema.update()
    before = {name: value.clone() for name, value in ema.average.items()}
    move(model)
    model[0].requires_grad_(False)
    model[1].eval()
    ema.begin_step(1)
    ema.update()
    moved = {name for name, value in ema.average.items() if not torch.equal(value, before[name])}
    assert moved == {"1.weight", "1.bias", "3.weight", "3.bias"}


@pytest.mark.parametrize("name", method_names())
def test_the_averaged_method_shares_every_buffer_and_no_parameter(name):
    method = tiny_method(name)
    ema = Ema(method, EmaSettings())
    assert not any(module.training for module in ema.method.modules())
    assert not any(p.requires_grad for p in ema.method.parameters())
    live, copied = dict(method.named_buffers()), dict(ema.method.named_buffers())
    assert live.keys() == copied.keys()
    assert all(copied[key] is live[key] for key in live)
    mine = {p.data_ptr() for p in method.parameters()}
    assert not mine & {p.data_ptr() for p in ema.method.parameters()}
    assert method.training


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_a_method_that_is_moved_stays_connected(buffers):
    """Accelerate moves a method to "cpu:0", which makes new tensors of all that is on "cpu"."""
    model, ema_settings = network(), EmaSettings(decay=0.0, buffers=buffers)
    ema = Ema(model, ema_settings)
    old = model[1].running_var
    model.to("cpu:0")
    assert model[1].running_var is not old
    move(model)
    ema.begin_step(0)
    ema.update()
    unread = "1.num_batches_tracked" if buffers == "averaged" else None
    now = ema.method.state_dict()
    assert all(torch.equal(now[name], t) for name, t in model.state_dict().items() if name != unread)


def test_averaged_statistics_are_the_only_buffers_that_are_not_shared():
    method = tiny_method("semi")
    ema = Ema(method, EmaSettings(buffers="averaged"))
    copied = dict(ema.method.named_buffers())
    apart = {key for key, buffer in method.named_buffers() if copied[key] is not buffer}
    assert apart == {f"net.norm.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")}


def test_the_copy_keeps_the_memory_format():
    model = network()
    assert Ema(model, EmaSettings()).method[0].weight.stride() == model[0].weight.stride()


@pytest.mark.parametrize("buffers", ["copied", "averaged"])
def test_state_goes_into_another_average_of_the_same_method(buffers):
    model = network()
    ema = Ema(model, EmaSettings(decay=0.5, buffers=buffers))
    move(model)
    ema.begin_step(0)
    ema.update()
    other = Ema(copy.deepcopy(model), EmaSettings(decay=0.5, buffers=buffers))
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.method.state_dict()[name], t) for name, t in ema.state_dict().items())
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict({"x": torch.ones(1)})


def test_reset_starts_anew_from_the_live_weights():
    model = network()
    ema = Ema(model, EmaSettings(buffers="averaged"))
    move(model)
    ema.reset()
    assert all(torch.equal(model.state_dict()[name], t) for name, t in ema.state_dict().items())
    move(model)
    assert not torch.equal(ema.method[3].weight, model[3].weight)
