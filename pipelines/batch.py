"""What the pipelines hand out: a training batch, and the facts about a data set."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Part(IntEnum):
    """The two streams of a training step. The value takes part in every seed: it must not change."""

    LABELED = 0
    UNLABELED = 1


class Batch(NamedTuple):
    """One training step's images and labels, on the device, ready for the network.

    x: (B, 3, H, W) labeled images, channels_last, float32 or bfloat16, normalized by the data set's mean and std.
    y: (B,) int64 class ids.
    u: one (mu * B, 3, H, W) tensor a view of the unlabeled images, in the order of the views asked for.
    u_rows: (mu * B,) int64 row ids into train.npy; row i of every tensor in `u` shows image u_rows[i].
    """

    x: Tensor
    y: Tensor
    u: tuple[Tensor, ...]
    u_rows: Tensor


class Info(NamedTuple):
    """The facts about a data set that methods and reports need, all from its manifest.

    labeled_counts and unlabeled_counts are images per class, in the order of class_names (unlabeled_counts is None
    where the classes of the unlabeled images are unknown). mean and std are per channel, in units of pixels / 255.
    fingerprint identifies the pixels, labels and split (SHA-256, hex).
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    resolution: int
    labeled_counts: tuple[int, ...]
    unlabeled_counts: tuple[int, ...] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_labeled: int
    num_unlabeled: int
    num_test: int
    fingerprint: str
