"""What the trained model does with the data: one pass over test and unlabeled images, outside of training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays
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


class Stored(NamedTuple):
    """What a memory bank holds: rows of train.npy and confidences, (K, S) each, -1 and 0 where empty."""

    rows: NDArray[np.int64]
    confidences: NDArray[np.float32]


class Probe(NamedTuple):
    """Predictions for both sets, None where a set has no images; what the memory bank holds, None without one."""

    test: Predictions | None
    unlabeled: Predictions | None
    bank: Stored | None


def probe(trained: Trained, arrays: Arrays, device: torch.device | str) -> Probe:
    """Run the model over the test images and a sample of the unlabeled ones, and take the bank's rows out."""
    tested = np.arange(len(arrays.test_labels))
    return Probe(
        _predict(trained, arrays.test, arrays.test_labels, tested, MOST_TEST, device),
        _predict(trained, arrays.train, arrays.train_labels, arrays.unlabeled_rows, MOST_UNLABELED, device),
        next((_stored(part) for part in trained.method.modules() if isinstance(part, MemoryBank)), None),
    )


def sample(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, the same ones every time, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def _predict(
    trained: Trained,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    most: int,
    device: torch.device | str,
) -> Predictions | None:
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


def _stored(bank: MemoryBank) -> Stored:
    return Stored(bank.rows.cpu().numpy(), bank.confidences.cpu().numpy())
