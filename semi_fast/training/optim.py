"""The optimizer: SGD, Muon, Adam or AdamW over a method's parameter groups, and its state by name for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from semi_fast.config import OptimSettings
from semi_fast.parts.groups import ParamGroup, group_of
from semi_fast.training.muon import Muon, without_compiler


def build_optimizer(
    model: nn.Module, settings: OptimSettings, groups: Sequence[ParamGroup] = ()
) -> torch.optim.Optimizer:
    """The optimizer of a run, or of one stage of it.

    Weight decay is for weights, not for biases and BatchNorm (what has one dimension), unless `decay_all`. All four
    optimizers take `found_inf`, by which a step is left out without the host waiting, and are fused, Muon but for the
    convolutions. Learning rates are 0-dim tensors beside the parameters, one a factor: a recorded step reads what
    `set_lr` has written.

    Args:
        model: its parameters that require a gradient are trained.
        settings: which optimizer, and its constants.
        groups: parameters that are frozen, or have a factor on the learning rate. `requires_grad` of those that a group
            holds is set as the group says; that of the others stays.

    Raises: ValueError for a group that holds no parameter.
    """
    named = dict(model.named_parameters())
    member = {name: group_of(name, groups) for name in named}
    unused = [group.prefix for group in groups if group not in member.values()]
    if unused:
        raise ValueError(f"No parameter is in the group of prefix {', '.join(map(repr, unused))}.")
    parameters: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for factor in dict.fromkeys([1.0, *(group.factor for group in groups if not group.frozen)]):
        parameters |= {(factor, True): [], (factor, False): []}
    for name, parameter in named.items():
        group = member[name]
        if group is not None:
            parameter.requires_grad_(not group.frozen)
        if parameter.requires_grad:
            parameters[1.0 if group is None else group.factor, parameter.dim() > 1].append(parameter)
    device = next(iter(named.values())).device
    rates = {factor: torch.full((), settings.lr * factor, device=device) for factor, _ in parameters}
    rows = [
        {"params": members, "weight_decay": settings.weight_decay if decays or settings.decay_all else 0.0}
        | {"lr": rates[factor], "factor": factor}
        for (factor, decays), members in parameters.items()
    ]
    optimizer = _optimizer(rows, settings)
    _fill_state(optimizer)
    if settings.shrink > 0:
        optimizer.register_step_post_hook(_Shrink(model, settings.shrink))
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the learning rate of every group, `lr` times the group's factor, into its tensor."""
    for rate, factor in {id(g["lr"]): (g["lr"], g["factor"]) for g in optimizer.param_groups}.values():
        rate.fill_(lr * factor)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything the optimizer keeps, by parameter and state: "net.stem.weight/exp_avg", "net.stem.weight/step".

    The tensors are the optimizer's own, not copies; plain numbers become tensors.
    """
    return {f"{name}/{key}": torch.as_tensor(value) for name, key, value, _ in _states(model, optimizer)}


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took out, into the optimizer's own tensors, whose memory layout stays.

    Raises: ValueError, naming them, for entries that are missing, unknown or of another shape.
    """
    states = {f"{name}/{key}": (key, value, state) for name, key, value, state in _states(model, optimizer)}
    there = {name: torch.as_tensor(value).shape for name, (_, value, _) in states.items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in there.keys() | given.keys() if there.get(name) != given.get(name))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"The state of another optimizer: {', '.join(wrong[:5])}{more}.")
    for name, (key, value, state) in states.items():
        if isinstance(value, Tensor):
            value.copy_(tensors[name])
        else:
            state[key] = tensors[name].item()


class _Shrink:
    """After each step, multiplies trained parameters and BatchNorm's running statistics by 1 - shrink * lr.

    This is the weight decay of the code of DARP, ABC and CoSSL, which shrinks every float of the network's state.
    Choice: the moving average takes in the shrunk network; theirs takes it in before (which scales all of the average
    by 1 / (1 - 4e-5)).
    """

    def __init__(self, model: nn.Module, shrink: float) -> None:
        self.shrink = shrink
        self.norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        base = optimizer.param_groups[0]["lr"] / optimizer.param_groups[0]["factor"]
        training = [norm for norm in self.norms if norm.training]  # those of frozen parts stay as they are
        statistics = [buffer for norm in training for buffer in (norm.running_mean, norm.running_var)]
        self._multiply(optimizer, [buffer for buffer in statistics if buffer is not None], base)
        for group in optimizer.param_groups:
            self._multiply(optimizer, group["params"], group["lr"])

    def _multiply(self, optimizer: torch.optim.Optimizer, tensors: list[Tensor], lr: Tensor) -> None:
        # A step that is left out (on_nonfinite=skip, loss scaling) shrinks nothing; only the device knows.
        skipped = getattr(optimizer, "found_inf", None)
        factor = 1 - self.shrink * lr
        if tensors:
            torch._foreach_mul_(tensors, factor if skipped is None else torch.where(skipped > 0, 1.0, factor))


def _optimizer(rows: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        nesterov = settings.nesterov and settings.momentum > 0
        kind: Any = without_compiler(torch.optim.SGD)
        return kind(rows, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    if settings.name == "muon":
        return Muon(rows, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
    kind = without_compiler(torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW)
    return kind(rows, lr=settings.lr, betas=(settings.momentum, 0.999), fused=True)


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """State from zero, which is what the first step would make of it.

    Left to the first step, SGD's momentum would be uninitialized memory where that step is left out; and a checkpoint
    before the first step would hold nothing.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not isinstance(optimizer, torch.optim.SGD):
                moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
            elif group["momentum"] > 0:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Parameter's name, state's name, value, and the dictionary that holds it."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        yield from ((name, key, value, state) for key, value in state.items() if value is not None)
