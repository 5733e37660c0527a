"""A tiny network, data set and batch for tests of methods."""

from __future__ import annotations

import torch
from torch import nn

from pipelines.batch import Batch, Info
from semi_fast.methods import Method, build_method

CLASSES, FEATURES = 5, 8
COUNTS = (8, 4, 3, 2, 1)


class TinyNet(nn.Module):
    """(n, 3, 4, 4) -> (n, 8): linear, then BatchNorm, so that rows of a batch depend on each other as in real nets."""

    num_features = FEATURES

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, FEATURES)
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x):
        return self.norm(self.linear(x.flatten(1)))


def tiny_info() -> Info:
    return Info(
        name="tiny",
        num_classes=CLASSES,
        class_names=tuple("abcde"),
        resolution=4,
        labeled_counts=COUNTS,
        unlabeled_counts=COUNTS,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        num_labeled=sum(COUNTS),
        num_unlabeled=sum(COUNTS),
        num_test=5,
        fingerprint="0" * 64,
    )


def tiny_method(name: str, **options) -> Method:
    """The same weights every time."""
    torch.manual_seed(0)
    return build_method(name, TinyNet(), tiny_info(), **options)


def tiny_batch(method: Method, seed: int = 0, labeled: int = 6, unlabeled: int = 10) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(unlabeled, 3, 4, 4, generator=generator) * 3
    views = tuple(images + torch.randn(images.shape, generator=generator) for _ in method.views)
    return Batch(
        x=torch.randn(labeled, 3, 4, 4, generator=generator) * 3,
        y=torch.randint(CLASSES, (labeled,), generator=generator),
        u=views,
        u_rows=torch.arange(unlabeled if views else 0),
    )
