"""What the trained model does with the data: one pass over test and unlabeled images, outside of training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.reading import batches
from semi_fast.memory_bank import MemoryBank
from semi_fast.run.saved import Trained

MOST_TEST, MOST_UNLABELED = 10_000, 5_000  # images looked at; on a CPU a pass over more would take minutes


class Predictions(NamedTuple):
    """A model's view of images.

    rows: (n,) int64, which images. classes, confidences: (n,) by head, the reported head first: the class predicted and
    its probability in [0, 1]. labels: (n,) int64, -1 where unknown. features: (n, d) float32. total: images there were
    to choose from.
    """

    rows: NDArray[np.int64]
    classes: dict[str, NDArray[np.int64]]
    confidences: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]
    total: int

    @property
    def heads(self) -> list[str]:
        """Names of the heads, the reported one first."""
        return list(self.classes)


def sample(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, the same ones every time, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def predictions(
    trained: Trained,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    most: int,
    device: torch.device | str,
) -> Predictions | None:
    """Run the model over these rows of the images, or a sample of `most` of them; None where there are none.

    Args:
        images: (N, H, W, 3). labels: (N,), -1 where unknown. rows: (n,).
    """
    if not len(rows):
        return None
    chosen = sample(rows, most)
    features: list[Tensor] = []
    logits: dict[str, list[Tensor]] = {}
    hook = trained.method.net.register_forward_hook(lambda _, __, output: features.append(output.float().cpu()))
    try:
        for x in batches(images, chosen, trained.facts.info, device):
            for head, values in trained.logits(x).items():
                logits.setdefault(head, []).append(values.float().cpu())
    finally:
        hook.remove()
    best = {head: torch.cat(parts).softmax(1).max(1) for head, parts in logits.items()}
    return Predictions(
        chosen,
        {head: b.indices.numpy() for head, b in best.items()},
        {head: b.values.numpy() for head, b in best.items()},
        labels[chosen],
        torch.cat(features).numpy(),
        len(rows),
    )


def bank_of(trained: Trained) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Rows of train.npy and confidences in the method's memory bank, (K, S) each, -1 and 0 where empty; None: none."""
    banks = (part for part in trained.method.modules() if isinstance(part, MemoryBank))
    return next(((bank.rows.cpu().numpy(), bank.confidences.cpu().numpy()) for bank in banks), None)
