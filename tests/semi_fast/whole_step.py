"""A training step put together as the trainer does, for tests that watch all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipelines.batch import Batch
from semi_fast.config import OptimSettings
from semi_fast.methods import Context, Method
from semi_fast.observe.health import Health
from semi_fast.observe.meter import Meter
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.training.ema import Ema
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer, set_lr
from semi_fast.training.schedules import cosine_7_16

STEPS = 100


class WholeStep:
    """Everything between two lines of the log: data, forward, backward, guard, optimizer, EMA, figures.

    Args:
        method: on its device.
        batches: endless.
        dtype: of autocast; float32 switches it off.
        scaler: for float16.
        health: counts the pseudo-labels where it is given.
        fused: whether the optimizer is the fused one; not every device has it.
    """

    def __init__(
        self,
        method: Method,
        batches: Iterator[Batch],
        *,
        dtype: torch.dtype = torch.float32,
        scaler: torch.amp.GradScaler | None = None,
        health: Health | None = None,
        fused: bool = True,
    ) -> None:
        self.method, self.batches, self.scaler, self.dtype = method, batches, scaler, dtype
        self.optim = build_optimizer(method, OptimSettings())
        for group in self.optim.param_groups:
            group["fused"] = fused
        self.ema = Ema(method, 0.99)
        self.guard = Guard("stop", method, self.optim, scaled=scaler is not None)
        self.meter = Meter(Stopwatch(torch.device("cpu")), 1, 1)
        self.meter.health = health
        self.batch = next(batches)

    def __call__(self, step: int) -> torch.Tensor:
        """Make one step and return its loss, detached."""
        ctx = Context.at(step, STEPS)
        set_lr(self.optim, 0.01 * cosine_7_16(ctx.progress))
        half = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        with torch.autocast(self.batch.x.device.type, half, enabled=self.dtype != torch.float32):
            out = self.method(self.batch, ctx)
        (out.loss if self.scaler is None else self.scaler.scale(out.loss)).backward()
        self.meter.count(out.pseudo, self.batch.u_rows)
        self.batch = next(self.batches)
        logs = self.guard.judge(out.loss, out.logs)
        if self.scaler is None:
            self.optim.step()
        else:
            self.scaler.step(self.optim)
            self.scaler.update()
        self.optim.zero_grad(set_to_none=True)
        self.ema.update(self.method)
        self.meter.add(out.loss, logs)
        return out.loss.detach()
