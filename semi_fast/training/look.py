"""What a method sees of run and data between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines import Loaders
from semi_fast.methods import Method
from semi_fast.processes.gather import gather_ranks, world_size
from semi_fast.training.step import Trainer

BATCH = 256  # images of one forward


class RunLook:
    """The `Look` of a run.

    Args:
        trainer, data: of the run.
        rank: this process.
        rebuild: makes the method as it was at step 0.
        autocast: makes the context of a forward, for mixed precision.

    Attributes:
        step: of the run, with which it goes on; None but at the beginning of a stage, where alone things may change.
        relabeled: whether the labeled streams have been given other rows and must be opened anew.
    """

    def __init__(
        self, trainer: Trainer, data: Loaders, rank: int, rebuild: Callable[[], Method], autocast: Callable
    ) -> None:
        self._trainer, self._data, self._rank, self._rebuild, self._autocast = trainer, data, rank, rebuild, autocast
        self._device = next(trainer.method.parameters()).device
        rows, labels = data.labeled
        self.labeled, self.labels = torch.from_numpy(rows), torch.from_numpy(labels)
        self.unlabeled = torch.from_numpy(data.unlabeled_rows)
        self.step: int | None = None
        self.relabeled = False

    def logits(self, rows: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) float32 of these rows by head, on the device; every rank makes an equal share of them."""
        return self._sweep(rows, self._trainer.ema.method.predict)

    def features(self, rows: Tensor) -> Tensor:
        """Features (n, d) float32 of these rows, on the device; every rank makes an equal share of them."""
        return self._sweep(rows, lambda images: {"": self._trainer.averaged(images)})[""]

    @torch.no_grad()
    def _sweep(self, rows: Tensor, function: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        world = world_size()
        share = -(-len(rows) // world)
        padded = rows.new_zeros(share * world)
        padded[: len(rows)] = rows
        mine = padded[self._rank * share : (self._rank + 1) * share].cpu().numpy()
        parts: list[dict[str, Tensor]] = []
        for images in self._data.plain(mine, BATCH):
            with self._autocast():
                parts.append(function(images))
        joined = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
        return {name: gather_ranks(part).flatten(0, 1)[: len(rows)] for name, part in joined.items()}

    def relabel(self, rows: Tensor, labels: Tensor) -> None:
        """Let the labeled streams read these rows, as of these classes, from now on. (n,) int64 each."""
        self._beginning("relabel")
        self._data.relabel(rows.cpu().numpy(), labels.cpu().numpy())
        self.relabeled = True

    def restart(self) -> None:
        """Put network, heads, averages and optimizer back to step 0."""
        self._trainer.restart(self._beginning("restart"), self._rebuild())

    def _beginning(self, what: str) -> int:
        if self.step is None:
            raise RuntimeError(f"{what} belongs to the beginning of a stage (Method.begin)")
        return self.step
