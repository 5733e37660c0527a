"""One rank of a small SeMi run on features and logits given in advance.

python -m tests.semi_fast.rank_worker RANK WORLD FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from semi_fast.parts.forward import Rows
from tests.semi_fast.tiny import CLASSES, FEATURES, tiny_batch, tiny_context, tiny_method


def statistics_after_some_steps(rank: int, world: int) -> dict[str, Tensor]:
    """Bank and running statistics after six steps on this rank's share of the same global batches."""

    def rows(count: int, views: int) -> Rows:
        whole = [torch.randn(views, count, size, generator=generator) * 2 for size in (FEATURES, CLASSES, CLASSES)]
        mine = [x[:, rank * count // world : (rank + 1) * count // world].flatten(0, 1) for x in whole]
        return Rows(mine[0], {"standard": mine[1], "balanced": mine[2]})

    method = tiny_method("semi", tau=0.3, bank_size=3, decay_every=2)
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        joint = {"labeled": {"weak": rows(6, 1)}, "unlabeled": {"weak": rows(12, 1), "strong": rows(12, 2)}}
        labels = {"labeled": torch.zeros(6 // world, dtype=torch.int64)}
        images = 2**53 + 12 * step + torch.arange(12).chunk(world)[rank]  # beyond what a float could carry
        prepared = method.inputs(tiny_batch(method), tiny_context(300 + step))
        method.objective(joint, labels, {"unlabeled": images}, prepared)
    return {key: value for key, value in method.named_buffers() if not key.startswith("net.")}


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(statistics_after_some_steps(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
