"""A training step put together as the trainer does, for tests that watch all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pipelines.batch import Batch
from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import Method
from semi_fast.observe.health import Health
from semi_fast.observe.meter import Meter
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.training.ema import Ema
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer
from semi_fast.training.stages import Stages
from semi_fast.training.step import Trainer, train_step

STEPS = 100


def add(meter: Meter, loss: torch.Tensor, logs: dict[str, torch.Tensor]) -> None:
    """Let a meter take in a step of that loss and those figures."""
    meter.add(("loss/total", *logs), torch.stack([loss.detach(), *logs.values()]))


class WholeStep:
    """Everything between two lines of the log: data, forward, backward, guard, optimizer, EMA, figures.

    Args:
        method: on its device.
        batches: endless.
        dtype: of autocast; float32 switches it off.
        scaler: for float16.
        health: counts the pseudo-labels where it is given.
        fused: whether the device has the fused optimizer's kernel; without it nothing is updated.
        steps: of the run.
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
        steps: int = STEPS,
    ) -> None:
        self.method, self.batches, self.scaler, self.dtype = method, batches, scaler, dtype
        settings = OptimSettings(lr=0.01)
        self.optim = build_optimizer(method, settings, method.groups(0))
        self.ema = Ema(method, EmaSettings(decay=0.99))
        guard = Guard("stop", method, self.optim, scaled=scaler is not None)
        self.trainer = Trainer(method, settings, Stages(method.starts(), steps), self.optim, self.ema, guard)
        self.trainer.forward = self._forward
        if not fused:
            self.trainer.update = lambda: None
        if scaler is not None:
            self.trainer.backward = lambda loss: scaler.scale(loss).backward()
            self.trainer.update = self._update
        self.meter = Meter(Stopwatch(torch.device("cpu")), 1, 1)
        self.meter.health = health

    def __call__(self, step: int) -> torch.Tensor:
        """Make one step and return its loss, detached."""
        batch = next(self.batches)
        done = train_step(self.trainer, batch, step)
        self.meter.count(done.pseudo)
        self.meter.add(done.names, done.figures)
        return done.loss

    def _forward(self, *step):
        half = self.dtype if self.dtype != torch.float32 else torch.bfloat16
        with torch.autocast(step[0].images.device.type, half, enabled=self.dtype != torch.float32):
            return self.method(*step)

    def _update(self):
        self.scaler.step(self.optim)
        self.scaler.update()
