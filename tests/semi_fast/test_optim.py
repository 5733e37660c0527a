"""The optimizers against plain formulas; groups, shrinking, steps left out; their state by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.parts.groups import ParamGroup
from semi_fast.training.ema import Ema
from semi_fast.training.optim import build_optimizer, optimizer_tensors, restore_optimizer, set_lr

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
ALL = [
    OptimSettings(),
    OptimSettings(nesterov=False),
    OptimSettings(momentum=0.0),
    OptimSettings(decay_all=True),
    OptimSettings(name="adam", lr=0.002),
    OptimSettings(name="adam", lr=0.002, weight_decay=0.0, shrink=0.5),
    OptimSettings(name="adamw", weight_decay=0.1, momentum=0.8),
    OptimSettings(name="muon"),
    OptimSettings(name="muon", nesterov=False, decay_all=True, weight_decay=0.5, shrink=0.5),
]


def network(device="cpu"):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 5)
    model = nn.Sequential(*first, nn.Unflatten(1, (1, 5, 1)), nn.Conv2d(1, 12, (2, 1), bias=False))  # 12 > 2
    return model.to(device).to(memory_format=torch.channels_last)


def backward(model, step):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.device)
    model(x).logsumexp(1).sum().backward()


def train(model, optimizer, steps):
    for step in steps:
        set_lr(optimizer, 0.01 / (1 + step))
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def quintic(weight):
    """A step of Muon by the singular values: each goes five times through the polynomial, whose matrix is as it was."""
    rows, columns = weight.flatten(1).shape
    u, values, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (u * values @ v).view(weight.shape) * max(1, rows / columns) ** 0.5


def update(settings, value, gradient, state, lr, decays, step):
    """One parameter's update by the formulas, in float64."""
    decay = settings.weight_decay if decays or settings.decay_all else 0.0
    if settings.name == "adamw":
        value = value * (1 - lr * decay)
    else:
        gradient = gradient + decay * value
    if settings.name in ("sgd", "muon"):
        state["m"] = settings.momentum * state.get("m", 0) + gradient
        move = gradient + settings.momentum * state["m"] if settings.nesterov else state["m"]
        return value - lr * (quintic(move) if settings.name == "muon" and value.dim() == 4 else move)
    beta = settings.momentum
    state["m"] = beta * state.get("m", 0) + (1 - beta) * gradient
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * gradient**2
    m, v = state["m"] / (1 - beta**step), state["v"] / (1 - 0.999**step)
    return value - lr * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", ALL, ids=str)
def test_the_fused_optimizer_equals_the_formula(device, settings):
    model = network(device)
    optimizer = build_optimizer(model, settings)
    assert all(group["fused"] for group in optimizer.param_groups)
    assert optimizer._step_supports_amp_scaling
    values = [p.detach().double().clone() for p in model.parameters()]
    states = [{} for _ in values]
    for step in range(20):
        lr = 0.03 / (1 + step)
        set_lr(optimizer, lr)
        backward(model, step)
        statistics = [b.double() for b in (model[1].running_mean, model[1].running_var)]
        for i, p in enumerate(model.parameters()):
            values[i] = update(settings, values[i], p.grad.double(), states[i], lr, p.dim() > 1, step + 1)
            values[i] = values[i] * (1 - settings.shrink * lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for p, value in zip(model.parameters(), values, strict=True):
            tolerance = {"rtol": 1e-4, "atol": 1e-5}
            if settings.name == "muon" and p.dim() == 4:  # multiplies in bfloat16; moves by lr / 5 or lr
                tolerance = {"rtol": 0, "atol": (0.2 if len(p) > 8 else 0.05) * lr}
            torch.testing.assert_close(p.detach().double(), value, **tolerance)
            p.data.copy_(value)  # Adam divides by the root of small numbers: compare step by step
        for now, before in zip((model[1].running_mean, model[1].running_var), statistics, strict=True):
            torch.testing.assert_close(now.double(), before * (1 - settings.shrink * lr), rtol=1e-6, atol=0)
        assert model[1].num_batches_tracked == step + 1


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_step_with_found_inf_leaves_no_trace_even_if_it_is_the_first(settings):
    model = network()
    optimizer = build_optimizer(model, settings)
    optimizer.found_inf = torch.ones(())
    backward(model, 0)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer_tensors(model, optimizer))
    optimizer.step()
    after = model.state_dict(), optimizer_tensors(model, optimizer)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    optimizer.found_inf.zero_()
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0]["0.weight"])


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_step_divides_gradients_by_their_scale(settings):
    steps = []
    for scale in (1.0, 4.0):
        model = network()
        optimizer = build_optimizer(model, settings)
        backward(model, 0)
        if scale > 1:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.zeros(())
            for parameter in model.parameters():
                parameter.grad *= scale
        optimizer.step()
        steps.append({**model.state_dict(), **optimizer_tensors(model, optimizer)})
    assert all(torch.equal(steps[1][name], tensor) for name, tensor in steps[0].items())


def test_muon_leaves_what_has_not_four_dimensions_to_sgd():
    model = nn.Module()
    model.pos_embed = nn.Parameter(torch.ones(1, 4, 6))
    model.pos_embed.grad = torch.arange(24.0).view(1, 4, 6)
    build_optimizer(model, OptimSettings(name="muon", lr=0.5, nesterov=False, weight_decay=0.0)).step()
    assert torch.equal(model.pos_embed, 1 - 0.5 * model.pos_embed.grad)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_step_whose_scaled_gradients_overflow_leaves_no_trace(settings):
    model = network()
    optimizer = build_optimizer(model, settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    backward(model, 0)
    scaler.scale(torch.ones(()))
    model[3].bias.grad[0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert scaler.get_scale() == 2.0


def test_without_groups_there_are_two_weights_first():
    model = network()
    optimizer = build_optimizer(model, OptimSettings())
    weights, rest = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    assert [g["params"] for g in optimizer.param_groups] == [weights, rest]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [5e-4, 0.0]
    assert [g["weight_decay"] for g in build_optimizer(model, OptimSettings(decay_all=True)).param_groups] == [5e-4] * 2


def test_the_longest_prefix_decides_about_factor_and_freezing():
    model = nn.ModuleDict({"net": network(), "net2": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    groups = (ParamGroup("net", frozen=True), ParamGroup("net.3", 0.125), ParamGroup("head", 2.0))
    optimizer = build_optimizer(model, OptimSettings(), groups)
    set_lr(optimizer, 1.0)
    rates = {id(p): group["lr"].item() for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates.get(id(p)) for name, p in model.named_parameters()}
    assert named == {
        **dict.fromkeys(("net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.5.weight")),
        **dict.fromkeys(("net.3.weight", "net.3.bias"), 0.125),
        **dict.fromkeys(("net2.weight", "net2.bias"), 1.0),
        **dict.fromkeys(("head.weight", "head.bias"), 2.0),
    }
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        name for name, rate in named.items() if rate is None
    }
    again = build_optimizer(model, OptimSettings(), (ParamGroup(""),))
    assert sum(len(group["params"]) for group in again.param_groups) == len(named)
    with pytest.raises(ValueError, match=r"No parameter is in the group of prefix 'ne'\."):
        build_optimizer(model, OptimSettings(), (ParamGroup("ne"),))


def test_frozen_parameters_are_not_shrunk():
    model = network()
    optimizer = build_optimizer(model, OptimSettings(name="adam", shrink=0.5), (ParamGroup("0", frozen=True),))
    before = model[0].weight.clone()
    backward(model, 0)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


def test_statistics_of_a_frozen_batchnorm_are_not_shrunk():
    model = network()
    norm = next(module for module in model if isinstance(module, torch.nn.BatchNorm2d))
    optimizer = build_optimizer(model, OptimSettings(name="adam", shrink=0.5))
    for frozen in (True, False):
        norm.train(not frozen)
        before = norm.running_var.clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(norm.running_var, before) == frozen


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_restored_optimizer_goes_on_to_the_bit(settings):
    model = network()
    optimizer = build_optimizer(model, settings)
    train(model, optimizer, range(5))
    # As a checkpoint holds them: contiguous, apart from the optimizer's own.
    saved = {name: t.contiguous().clone() for name, t in optimizer_tensors(model, optimizer).items()}
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(5, 9))

    again = network()
    other = build_optimizer(again, settings)
    again.load_state_dict(weights)
    restore_optimizer(again, other, saved)
    train(again, other, range(5, 9))
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())
    for state in other.state.values():
        for key, tensor in state.items():
            assert key == "step" or tensor.dim() < 4 or tensor.is_contiguous(memory_format=torch.channels_last)


def test_state_is_named_by_parameter_and_kind_and_there_from_the_start():
    model = network()
    adam = optimizer_tensors(model, build_optimizer(model, OptimSettings(name="adam")))
    names = [name for name, _ in model.named_parameters()]
    assert adam.keys() == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert optimizer_tensors(model, build_optimizer(model, OptimSettings(momentum=0.0))) == {}
    lazy = torch.optim.Adam(model.parameters(), fused=True)
    backward(model, 0)
    lazy.step()
    assert optimizer_tensors(model, lazy).keys() == adam.keys()
    assert all(adam[name].dtype == tensor.dtype for name, tensor in optimizer_tensors(model, lazy).items())


def test_state_of_another_optimizer_is_refused_by_name():
    model = network()
    adam, sgd = (build_optimizer(model, OptimSettings(name=name)) for name in ("adam", "sgd"))
    with pytest.raises(ValueError, match=r"0\.bias/exp_avg, 0\.bias/exp_avg_sq, .* and 23 more"):
        restore_optimizer(model, sgd, optimizer_tensors(model, adam))
    lacking = optimizer_tensors(model, sgd)
    lacking.pop("3.bias/momentum_buffer")
    with pytest.raises(ValueError, match=r"another optimizer: 3\.bias/momentum_buffer\."):
        restore_optimizer(model, sgd, lacking)
    wrong = {**optimizer_tensors(model, sgd), "3.bias/momentum_buffer": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"3\.bias/momentum_buffer"):
        restore_optimizer(model, sgd, wrong)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_update_and_average_are_a_few_operations_over_all_parameters(device, shrink):
    model = network(device)
    ema = Ema(model, EmaSettings())
    optimizer = build_optimizer(model, OptimSettings(shrink=shrink))
    backward(model, 0)
    optimizer.found_inf = torch.zeros((), device=device)
    operations = []

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Counter():
        optimizer.step()
        ema.update()
    aten = torch.ops.aten
    assert operations.count(aten._foreach_lerp_) == 1
    assert operations.count(aten._fused_sgd_) == 2
    assert operations.count(aten._foreach_mul_) == (3 if shrink else 0)
    assert not {aten._local_scalar_dense, aten.mul_, aten.lerp_} & set(operations)
