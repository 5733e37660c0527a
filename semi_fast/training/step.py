"""One training step and everything it needs: `train_step` is the only place where a method is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines import Batch
from semi_fast.config import OptimSettings
from semi_fast.methods import Context, Method, Out
from semi_fast.processes.launch import keep_buffers
from semi_fast.training.ema import Ema
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer, set_lr
from semi_fast.training.schedules import learning_rate
from semi_fast.training.stages import Stages

DRAWS = 1_000  # first number of the seeds of a method's draws; orders and plans of the pipelines have others


@dataclass
class Trainer:
    """A method in training.

    Args:
        method: on its device.
        settings: of the optimizer.
        stages: of the run.
        optimizer: made by `build_optimizer` for `method.groups(0)`.
        ema, guard: of the method.
        seed: the run's.
        forward: makes a step's `Out` of a batch and its context; None: the method itself.
        backward: of the loss.
        update: applies the gradients; None: the optimizer's step. Both differ where gradients carry a loss scale.
        wrap: makes `forward` anew where a stage trains other parameters; None: it need not be.
        phase: makes a context around a part of the step, for whoever measures time.
        restarted: the step of the run at which weights and averages last were those of its start.
    """

    method: Method
    settings: OptimSettings
    stages: Stages
    optimizer: torch.optim.Optimizer
    ema: Ema
    guard: Guard
    seed: int = 0
    forward: Callable[[Batch, Context], Out] | None = None
    backward: Callable[[Tensor], Any] = Tensor.backward
    update: Callable[[], Any] | None = None
    wrap: Callable[[], Callable[[Batch, Context], Out]] | None = None
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
    restarted: int = 0

    def __post_init__(self) -> None:
        device = next(self.method.parameters()).device
        self._generator = torch.Generator("cpu" if device.type == "meta" else device)
        self._frozen: list[nn.Parameter] = []  # by the stage before

    def prepare(self, accel: Accelerator) -> None:
        """Let Accelerate put mixed precision around the step, and average the gradients of several processes."""

        def wrap() -> nn.Module:
            model = accel.prepare_model(self.method)
            keep_buffers(model)
            return model

        self.wrap, self.forward = wrap, wrap()
        self.backward, self.update = accel.backward, accel.prepare_optimizer(self.optimizer).step

    def context(self, step: int) -> Context:
        """The context of a step of the run, its generator seeded anew."""
        stage = self.stages.at(step)
        words = np.random.SeedSequence((DRAWS, self.seed, step)).generate_state(1, np.uint64)
        self._generator.manual_seed(int(words[0] >> np.uint64(1)))
        return Context.at(
            step - stage.first, stage.steps, stage=stage.number, generator=self._generator, averaged=self.averaged
        )

    @torch.no_grad()
    def averaged(self, images: Tensor) -> Tensor:
        """Features (n, d) float32 of images (n, 3, H, W) by the averaged network, in eval mode."""
        return self.ema.method.net(images).float()

    def learning_rate(self, step: int) -> float:
        """The base learning rate of a step of the run: its schedule is that of the stage."""
        stage = self.stages.at(step)
        return learning_rate(self.settings, step - stage.first, stage.steps)

    def regroup(self, stage: int) -> None:
        """Let the optimizer train what the method trains in a stage; what it knows of the parameters is kept."""
        before = self._frozen
        for parameter in before:
            parameter.requires_grad_(True)
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        fresh = build_optimizer(self.method, self.settings, self.method.groups(stage))
        self._frozen = [parameter for parameter in trained if not parameter.requires_grad]
        kept = {key: state for key, state in self.optimizer.state.items() if key in fresh.state}
        fresh.state.update(kept)
        self.optimizer.param_groups[:] = fresh.param_groups
        self.optimizer.state = fresh.state
        self.train_mode(stage)
        if self.wrap is not None and list(map(id, before)) != list(map(id, self._frozen)):
            self.forward = self.wrap()

    def restart(self, step: int, fresh: Method) -> None:
        """Put network and heads, their averages and the optimizer back to the start.

        Args:
            step: of the run, which goes on with it.
            fresh: the method as it was made at step 0.
        """
        for name in ("net", "heads"):
            getattr(self.method, name).load_state_dict(getattr(fresh, name).state_dict())
        self.optimizer.state = build_optimizer(self.method, self.settings, self.method.groups(0)).state
        self.ema.reset()
        self.restarted = step

    def train_mode(self, stage: int) -> None:
        """Training mode, but for the frozen parts: their BatchNorms keep their statistics."""
        self.method.train()
        for group in self.method.groups(stage):
            if group.frozen:
                self.method.get_submodule(group.prefix).eval()


def train_step(trainer: Trainer, batch: Batch, step: int) -> Out:
    """One step of the run: forward, backward, update, average. Never waits for the device.

    Returns: loss, pseudo-labels, and the figures of the step with the guard's verdict among them.
    """
    t = trainer
    set_lr(t.optimizer, t.learning_rate(step))
    t.guard.begin_step()
    with t.phase("forward_backward"):
        out = (t.forward or t.method)(batch, t.context(step))
        t.backward(out.loss)
    logs = t.guard.judge(out.loss, out.logs)
    with t.phase("optimizer"):
        (t.update or t.optimizer.step)()
        t.optimizer.zero_grad(set_to_none=True)
        t.ema.update(step - t.restarted)
    return out._replace(loss=out.loss.detach(), logs=logs)
