"""Steps recorded as a graph of PyTorch's operations: what a CUDA graph is on a GPU, for tests without one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from semi_fast.training.step import Done
from tests.semi_fast.sync_trap import SyncTrap


class FxRecorder:
    """Records every operation of a step, with the tensors it reads and writes; nothing of Python is in a replay.

    No operation may hand a value to the host or have a shape that depends on data.

    Attributes:
        recordings: those made so far.
    """

    def __init__(self) -> None:
        self.recordings: list[torch.fx.GraphModule] = []

    def launch(self, step: Callable[[], Done]) -> Done:
        return step()

    def record(self, step: Callable[[], Done]) -> Callable[[], Done]:
        made: list[Done] = []

        def traced() -> list[torch.Tensor]:
            with SyncTrap():
                made.append(step())
            return [x for x in made[0][1:] if x is not None]

        graph = make_fx(traced, tracing_mode="real")()
        self.recordings.append(graph)
        names = made[0].names

        @torch.no_grad()
        def replay() -> Done:
            if made:  # unlike a CUDA graph's, this recording has made a step
                return made.pop()
            figures, *pseudo = graph()
            return Done(names, figures, *(pseudo or [None]))

        return replay
