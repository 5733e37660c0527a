"""Guards against numbers that are not finite: judged on the device at every step, read by the host with the log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from semi_fast.methods import Method
from semi_fast.processes.gather import sum_ranks
from semi_fast.processes.launch import CommonError
from semi_fast.training.ema import Ema

MOST_IN_A_ROW = 100  # steps without an update, one after another, after which skipping helps no more
LOSS, GRADIENT = "guard/loss", "guard/gradient"  # figures of a step, from `judge` to `accept`


class DivergedError(CommonError):
    """Loss, gradients or weights are not finite any more."""


class Guard:
    """Watches loss and gradients of every step, without making the host wait for the device.

    With `stop`, a fault ends the run when the log window that holds it is read, before anything is evaluated or saved.
    With `skip`, the faulty step leaves no trace: the optimizer's update is masked on the device and the method's
    buffers (BatchNorm, memory bank, running distributions) are put back; the EMA takes in the unchanged weights.
    All processes decide alike: gradients are the same everywhere, and losses that are not finite are counted over all.

    Under float16 loss scaling a gradient that overflows is no fault: the scaler leaves out that update and lowers the
    scale. Only the loss is judged then.

    Args:
        policy: "stop" or "skip".
        method: what is trained; parameters may be frozen.
        optimizer: one that takes `found_inf`, as PyTorch's fused optimizers do.
        scaled: whether gradients carry a loss scale.

    Attributes:
        skipped: steps left out so far.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        scaled: bool = False,
    ) -> None:
        self.skips, self.scaled, self.skipped = policy == "skip", scaled, 0
        self._method = method
        self._names, self._parameters = zip(*method.named_parameters(), strict=True)
        device = self._parameters[0].device
        self._missing = torch.zeros((), device=device)  # stands for the gradient of what the loss did not use
        self._fault = torch.zeros((), device=device)  # 1 where the step under way must leave no trace
        self._kept = [buffer.clone() for buffer in method.buffers()] if self.skips else []
        self._in_a_row = 0
        if self.skips and not scaled:
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                raise TypeError(f"on_nonfinite=skip needs a fused optimizer, got {type(optimizer).__name__}")
            optimizer.found_inf = self._fault  # type: ignore[attr-defined]

    @torch.no_grad()
    def begin_step(self) -> None:
        """Keep the method's buffers as they stand: call it before each forward. Never waits for the device."""
        if self.skips:
            torch._foreach_copy_(self._kept, list(self._method.buffers()))

    @property
    def counts(self) -> bool:
        """Whether steps may be left out, so that their number is worth a figure."""
        return self.skips or self.scaled

    @torch.no_grad()
    def judge(self, loss: Tensor, logs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Judge a step between its backward and its update; returns `logs` with this step's verdict added.

        Args:
            loss: scalar. Gradients are read from the parameters.
            logs: the step's figures, on the device.
        """
        gradients = [self._missing if p.grad is None else p.grad for p in self._parameters]
        faults = not_finite([loss.detach(), *gradients])
        losses, gradient = sum_ranks(faults[:1])[0], first_of(faults[1:])
        if self.skips:
            fault = losses > 0 if self.scaled else (losses > 0) | (gradient >= 0)
            self._fault.copy_(fault)
            for buffer, kept in zip(self._method.buffers(), self._kept, strict=True):
                buffer.copy_(torch.where(fault, kept, buffer))
        return {**logs, LOSS: losses, GRADIENT: gradient}

    def accept(self, step: int, rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        """The steps of a log window that count, without their verdicts; those skipped are left out.

        Args:
            step: the first one's number, counted from 1.
            rows: by step, the figures that `judge` returned, fetched.

        Raises: DivergedError at a fault under `stop`, and after MOST_IN_A_ROW steps without an update.
        """
        kept = [row for number, row in enumerate(rows, step) if self._keeps(number, row)]
        return [{name: value for name, value in row.items() if name not in (LOSS, GRADIENT)} for row in kept]

    def _keeps(self, step: int, row: dict[str, float]) -> bool:
        losses, gradient = row[LOSS], int(row[GRADIENT])
        fault = losses > 0 or (gradient >= 0 and not self.scaled)
        if not (fault or gradient >= 0):
            self._in_a_row = 0
            return True
        what = self._describe(step, row, losses > 0, gradient)
        if fault and not self.skips:
            raise DivergedError(f"{what}.")
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            raise DivergedError(f"{what}, and {self._in_a_row} steps in a row were skipped, {self.skipped:,} in all.")
        return not fault

    def check_weights(self, step: int, ema: Ema) -> None:
        """Raise DivergedError when the model after `step` steps is not fit to be evaluated or saved.

        A finite gradient times a large learning rate may still overflow. Waits for the device.
        """
        named = [*zip(self._names, self._parameters, strict=True)]
        named += [(f"the average of {name}", average) for name, average in ema.average.items()]
        named += [(name, x) for name, x in self._method.net.named_buffers(prefix="net") if x.is_floating_point()]
        with torch.no_grad():
            first = first_of(not_finite([x for _, x in named]))
            bad = sum_ranks((first >= 0).float().reshape(1))[0]
        if bad.item():
            name = named[int(first)][0] if first.item() >= 0 else "those of another process"
            raise DivergedError(f"The weights are not finite after step {step:,}: {name}.")

    def _describe(self, step: int, row: dict[str, float], loss: bool, gradient: int) -> str:
        if not loss:
            return f"The gradient of {self._names[gradient]} is not finite at step {step:,} (the loss is)"
        bad = [name for name, value in row.items() if name.startswith("loss/") and not math.isfinite(value)]
        parts = [name for name in bad if name != "loss/total"] or bad
        named = ", ".join(f"{name} = {row[name]}" for name in parts) or "that of another process"
        return f"The loss is not finite at step {step:,}: {named}"


def not_finite(tensors: list[Tensor]) -> Tensor:
    """Which of n tensors hold a NaN or an infinity: (n,) float32, 1 where one does and 0 elsewhere, on the device."""
    # The largest absolute value is finite exactly where all values are, and so is a sum of their squares in float64:
    # in float32 it may overflow by itself. A CPU's maximum norm is not vectorized, and a GPU's float64 is slow.
    norms = torch.stack(torch._foreach_norm(tensors, *((2, torch.float64) if tensors[0].is_cpu else (math.inf,))))
    return (norms - norms).isnan().float()  # what is not finite less itself is NaN


def first_of(faults: Tensor) -> Tensor:
    """Place of the first 1 among zeros and ones (n,), -1 where there is none: 0-dim float32, on the device."""
    most, place = faults.max(0)
    return (place + 1) * most - 1
