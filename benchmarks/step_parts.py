"""Where a step's time goes: the trainer's step with a stopwatch around each of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.common import Turn
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.training.step import Trainer

MODEL = ("network", "optimizer")  # what the bare model does, too


class Parts:
    """The parts of a trainer's steps, timed without those within them; `rounds` has the seconds of each, by turn.

    network (forward and backward) and optimizer; heads and losses (forward and backward, bank and statistics among
    them), guard, averages; and what the step itself has around `phase`.
    """

    def __init__(self, trainer: Trainer) -> None:
        device = next(trainer.method.parameters()).device
        self._watch, self.rounds = Stopwatch(device), list[dict[str, float]]()
        self.phase = self._watch.phase
        self._network = Cut(trainer.method.net, self._watch)
        trainer.method.net = self._network
        trainer.backward = self._backward
        for part, owner, name in (
            ("heads and losses", trainer, "forward"),
            ("heads and losses", trainer, "backward"),
            ("guard", trainer.guard, "begin_step"),
            ("guard", trainer.guard, "judge"),
            ("optimizer", trainer, "update"),
            ("optimizer", trainer.optimizer, "zero_grad"),
            ("averages", trainer.ema, "update"),
        ):
            setattr(owner, name, self.phase(part)(getattr(owner, name)))

    def turn(self, step: Callable[[], object], seconds: float) -> Turn:
        """A turn of so many seconds of `step`, after one that is not counted."""

        def turn() -> float:
            step()
            self._wait()
            self._watch.clear()
            begin, steps = time.perf_counter(), 0
            while steps == 0 or time.perf_counter() - begin < seconds:
                step()
                steps += 1
            self._wait()
            took = (time.perf_counter() - begin) / steps
            self.rounds.append({part: own / steps for part, own in self._watch.read().own.items()})
            return took

        return turn

    def fastest(self) -> dict[str, float]:
        """Seconds of each part in its fastest turn, the longest first."""
        least = {part: min(turn[part] for turn in self.rounds) for part in self.rounds[0]}
        return dict(sorted(least.items(), key=lambda item: -item[1]))

    def beside_model(self) -> float:
        """The share of a step that the bare model has no part in."""
        least = self.fastest()
        return 1 - sum(least[part] for part in MODEL) / sum(least.values())

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        self._network.backward()

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class Cut(nn.Module):
    """A network cut off from what is made of its features, so that their backwards can be timed apart."""

    def __init__(self, net: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.net, self.num_features, self._watch = net, net.num_features, watch

    def forward(self, images: Tensor) -> Tensor:
        with self._watch.phase("network"):
            self._features = self.net(images)
        self._leaf = self._features.detach().requires_grad_()
        return self._leaf

    def backward(self) -> None:
        """Backward of the network, after that of the loss."""
        with self._watch.phase("network"):
            self._features.backward(self._leaf.grad)
