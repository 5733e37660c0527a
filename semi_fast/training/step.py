"""One training step and everything it needs: `train_step` is the only place where a method is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines import Batch
from semi_fast.config import OptimSettings
from semi_fast.methods import Context, Method, Out
from semi_fast.methods.base import Averaged
from semi_fast.parts.groups import group_of
from semi_fast.processes.launch import keep_buffers
from semi_fast.training.ema import Ema
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer, set_lr
from semi_fast.training.schedules import learning_rate
from semi_fast.training.stages import Stages

if TYPE_CHECKING:
    from semi_fast.training.graph import StepGraph

DRAWS = 1_000  # first number of the seeds of a method's draws; orders and plans of the pipelines have others


class Done(NamedTuple):
    """What a step leaves for the log. The next one may write to the same tensors: copy what is to be kept."""

    names: tuple[str, ...]  # of the figures: "loss/total", what the method logs, the guard's verdict
    figures: Tensor  # (n,) float32
    pseudo: Tensor | None  # (4, B) float64, `PseudoLabels.table` of the stream "unlabeled"

    @property
    def loss(self) -> Tensor:
        """Of the step, 0-dim float32."""
        return self.figures[0]


class Trainer:
    """A method in training.

    Attributes that may be set besides:
        forward: makes a step's `Out` of a batch, the method's inputs and the averaged network; at first the method.
        backward: of the loss.
        update: applies the gradients; at first the optimizer's step. Both differ where gradients carry a loss scale.
        wrap: makes `forward` anew where a stage trains other parameters; None: it need not be.
        phase: makes a context around a part of the step, for whoever measures time.
        graph: makes the device's part of a step; None: every operation is launched by itself.
        restarted: the step of the run at which weights and averages last were those of its start.

    Args:
        method: on its device.
        settings: of the optimizer.
        stages: of the run.
        optimizer: made by `build_optimizer` for `method.all_groups(0)`.
        ema, guard: of the method.
        seed: the run's.
    """

    def __init__(
        self,
        method: Method,
        settings: OptimSettings,
        stages: Stages,
        optimizer: torch.optim.Optimizer,
        ema: Ema,
        guard: Guard,
        seed: int = 0,
    ) -> None:
        self.method, self.settings, self.stages = method, settings, stages
        self.optimizer, self.ema, self.guard = optimizer, ema, guard
        self.forward: Callable[[Batch, Any, Averaged], Out] = method
        self.backward: Callable[[Tensor], Any] = Tensor.backward
        self.update: Callable[[], Any] = optimizer.step
        self.wrap: Callable[[], Callable[[Batch, Any, Averaged], Out]] | None = None
        self.phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.graph: StepGraph | None = None
        self.restarted = 0
        self._first_seed = int(np.random.SeedSequence((DRAWS, seed)).generate_state(1, np.uint64)[0])
        device = next(method.parameters()).device
        self._generator = torch.Generator("cpu" if device.type == "meta" else device)
        self._frozen = self._frozen_in(0)

    def prepare(self, accel: Accelerator) -> None:
        """Let Accelerate put mixed precision around the step, and average the gradients of several processes.

        Method and optimizer are where they belong: to place them, Accelerate would import a compiler first.
        """

        def alone(*step: Any) -> Out:
            with accel.autocast():
                return self.method(*step)

        def wrap() -> nn.Module:
            model = accel.prepare_model(self.method, device_placement=False)
            keep_buffers(model)
            return model

        # Of one process, Accelerate's wrapper would look through all that comes out for what is not float32.
        self.wrap, self.forward = (None, alone) if accel.num_processes == 1 else (wrap, wrap())
        if accel.scaler is not None:  # without one, Accelerate's step would look for packages and call the optimizer's
            self.update = accel.prepare_optimizer(self.optimizer, device_placement=False).step
            self.backward = accel.backward

    def context(self, step: int) -> Context:
        """The context of a step of the run, its generator seeded anew."""
        stage = self.stages.at(step)
        self._generator.manual_seed((self._first_seed + step) % 2**63)
        return Context.at(step - stage.first, stage.steps, stage=stage.number, generator=self._generator)

    @torch.no_grad()
    def averaged(self, images: Tensor, of: Callable[[Method, Tensor], Tensor] | None = None) -> Tensor:
        """The method's `Averaged`: features (n, d) float32 of images (n, 3, H, W) by the averaged network."""
        method = self.ema.method
        return (method.net(images) if of is None else of(method, images)).float()

    def learning_rate(self, step: int) -> float:
        """The base learning rate of a step of the run: its schedule is that of the stage."""
        stage = self.stages.at(step)
        return learning_rate(self.settings, step - stage.first, stage.steps)

    def rate_in_use(self, step: int) -> float:
        """The same times the factor of what trains: 1 where anything trains at the base rate."""
        factors = [group["factor"] for group in self.optimizer.param_groups if group["params"]]
        return self.learning_rate(step) * factors[0]

    def regroup(self, stage: int) -> None:
        """Let the optimizer train what the method trains in a stage; what it knows of the parameters is kept."""
        before = self._frozen
        for parameter in before:
            parameter.requires_grad_(True)
        fresh = build_optimizer(self.method, self.settings, self.method.all_groups(stage))
        self._frozen = self._frozen_in(stage)
        kept = {key: state for key, state in self.optimizer.state.items() if key in fresh.state}
        fresh.state.update(kept)
        self.optimizer.param_groups[:] = fresh.param_groups
        self.optimizer.state = fresh.state
        self.train_mode(stage)
        if self.wrap is not None and list(map(id, before)) != list(map(id, self._frozen)):
            self.forward = self.wrap()
        if self.graph is not None:
            self.graph.restart()

    @torch.no_grad()
    def restart(self, step: int, fresh: Method) -> None:
        """Put all parameters, BatchNorm's statistics, the averages and the optimizer back to the start.

        Args:
            step: of the run, which goes on with it.
            fresh: the method as it was made at step 0.
        """
        for parameter, first in zip(self.method.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(first)
        self.method.net.load_state_dict(fresh.net.state_dict())
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.ema.reset()
        self.restarted = step

    def train_mode(self, stage: int) -> None:
        """Training mode, but for the frozen parts: their BatchNorms keep their statistics."""
        self.method.train()
        modules = dict(self.method.named_modules())
        for group in sorted(self.method.all_groups(stage), key=lambda group: len(group.prefix)):
            if group.prefix in modules:  # else a parameter
                modules[group.prefix].train(not group.frozen)

    def _frozen_in(self, stage: int) -> list[nn.Parameter]:
        """The parameters that a stage's groups freeze."""
        groups = self.method.all_groups(stage)
        member = {name: group_of(name, groups) for name, _ in self.method.named_parameters()}
        frozen = {name for name, group in member.items() if group is not None and group.frozen}
        return [parameter for name, parameter in self.method.named_parameters() if name in frozen]


def train_step(trainer: Trainer, batch: Batch, step: int) -> Done:
    """One step of the run: forward, backward, update, average. Never waits for the device."""
    with trainer.phase("forward_backward"):
        set_lr(trainer.optimizer, trainer.learning_rate(step))
        trainer.ema.begin_step(step - trainer.restarted)
        inputs = trainer.method.inputs(batch, trainer.context(step))
        if trainer.graph is not None:
            return trainer.graph(batch, inputs)
        return device_step(trainer, batch, inputs, trainer.phase)


def device_step(
    trainer: Trainer, batch: Batch, inputs: Any, phase: Callable[[str], AbstractContextManager[Any]] = nullcontext
) -> Done:
    """The device's part of a step: from step to step nothing changes but what tensors hold, so that it can be recorded.

    Args:
        inputs: of the method.
        phase: as the trainer's.
    """
    trainer.guard.begin_step()
    out = trainer.forward(batch, inputs, trainer.averaged)
    trainer.backward(out.loss)
    logs = trainer.guard.judge(out.loss, out.logs)
    with phase("optimizer"):
        trainer.update()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.ema.update()
    with torch.no_grad():
        pseudo = None if out.pseudo is None else out.pseudo.table(batch.rows["unlabeled"])
        return Done(("loss/total", *logs), torch.stack([out.loss.detach(), *logs.values()]), pseudo)
