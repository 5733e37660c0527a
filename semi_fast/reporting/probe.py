"""What the trained model does with the data: one pass over test and unlabeled images, outside of training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays
from semi_fast.run.inputs import batches
from semi_fast.run.saved import Trained

MOST_TEST, MOST_UNLABELED = 10_000, 5_000  # images looked at; on a CPU a pass over more would take minutes


class Predictions(NamedTuple):
    """A model's view of some images.

    rows: (n,) int64, which images. classes, confidences: (n,) by head, the reported head first: the class predicted and
    its probability in [0, 1]. labels: (n,) int64, -1 where unknown. features: (n, d) float32, or None when not kept.
    total: images there were to choose from.
    """

    rows: NDArray[np.int64]
    classes: dict[str, NDArray[np.int64]]
    confidences: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    features: NDArray[np.float32] | None
    total: int

    @property
    def heads(self) -> list[str]:
        """Names of the heads, the reported one first."""
        return list(self.classes)


class Probe(NamedTuple):
    """Predictions for both sets. `bank_rows`, `bank_confidences`: (K, S), -1 and 0 where empty; None without a bank."""

    test: Predictions | None
    unlabeled: Predictions | None
    bank_rows: NDArray[np.int64] | None
    bank_confidences: NDArray[np.float32] | None


def probe(trained: Trained, arrays: Arrays, device: torch.device | str) -> Probe:
    """Run the model over the test images and a sample of the unlabeled ones, and take the bank's rows out."""
    labels = arrays.test_labels
    test = _predict(trained, arrays.test, labels, np.arange(len(labels)), MOST_TEST, device, features=True)
    unlabeled = _predict(
        trained, arrays.train, arrays.train_labels, arrays.unlabeled_rows, MOST_UNLABELED, device, features=False
    )
    return Probe(test, unlabeled, *_bank(trained))


def sample(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most `most` of the rows, the same ones every time, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


@torch.no_grad()
def _predict(
    trained: Trained,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    most: int,
    device: torch.device | str,
    *,
    features: bool,
) -> Predictions | None:
    if not len(rows):
        return None
    chosen = sample(rows, most)
    seen: list[Tensor] = []
    hook = trained.method.net.register_forward_hook(lambda _, __, output: seen.append(output.float().cpu()))
    classes: dict[str, list[Tensor]] = {}
    confidences: dict[str, list[Tensor]] = {}
    try:
        for x in batches(images, chosen, trained.facts.info, device, 256):
            for head, logits in trained.method.predict_heads(x).items():
                best = logits.softmax(1).max(1)
                classes.setdefault(head, []).append(best.indices.cpu())
                confidences.setdefault(head, []).append(best.values.cpu())
            if not features:
                seen.clear()
    finally:
        hook.remove()
    return Predictions(
        chosen,
        {head: torch.cat(parts).numpy() for head, parts in classes.items()},
        {head: torch.cat(parts).numpy() for head, parts in confidences.items()},
        labels[chosen],
        torch.cat(seen).numpy() if features else None,
        len(rows),
    )


def _bank(trained: Trained) -> tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]:
    model = trained.checkpoint.tensors["model"]
    if "bank.rows" not in model:
        return None, None
    return model["bank.rows"].cpu().numpy(), model["bank.confidences"].cpu().numpy()
