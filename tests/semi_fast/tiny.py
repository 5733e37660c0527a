"""A tiny network, data set and batch for tests of methods."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.batch import Batch, Group, Info
from semi_fast.methods import Context, Method, Out, build_method
from semi_fast.methods.base import Averaged
from semi_fast.parts.groups import group_of

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

    def maps(self, x):
        """(n, 8, 4, 4): the features, more of them where the image is bright; their mean is ``forward``'s."""
        shares = x.mean(1).flatten(1).softmax(1).unflatten(1, x.shape[2:]).unsqueeze(1)
        return shares * shares[0].numel() * self(x)[:, :, None, None]


def tiny_info() -> Info:
    return Info(
        name="tiny",
        num_classes=CLASSES,
        class_names=tuple("abcde"),
        resolution=4,
        labeled_counts=COUNTS,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        num_train=sum(COUNTS) + 20,
        num_labeled=sum(COUNTS),
        num_unlabeled=20,
        num_test=5,
        fingerprint="0" * 64,
    )


def tiny_method(name: str, **options) -> Method:
    """The same weights every time."""
    torch.manual_seed(0)
    return build_method(name, TinyNet(), tiny_info(), **options)


def tiny_batch(method: Method, seed: int = 0, labeled: int = 6, unlabeled: int = 10) -> Batch:
    """A batch of made-up images for every stream of a method; the rows of each are 0, 1, 2, ..."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[tuple[Group, Tensor]]] = {}
    labels, rows = {}, {}
    for name, stream in sorted(method.streams.items(), reverse=True):
        count = stream.batch or (unlabeled if stream.part == "unlabeled" else labeled)
        images = torch.randn(count, 3, 4, 4, generator=generator) * 3
        if len(stream.views) == 1:
            views = [images]
        else:
            views = [images + torch.randn(images.shape, generator=generator) for _ in stream.views]
        parts[name] = []
        for view, same in groupby(zip(stream.views, views, strict=True), key=lambda pair: pair[0]):
            joined = torch.cat([x for _, x in same])
            parts[name].append((Group(name, view, len(joined)), joined))
        rows[name] = torch.arange(count)
        if stream.part == "labeled":
            labels[name] = torch.randint(CLASSES, (count,), generator=generator)
    ordered = [part for name in method.streams for part in parts[name]]
    return Batch(torch.cat([x for _, x in ordered]), tuple(group for group, _ in ordered), labels, rows)


def tiny_context(step: int, steps: int = 500, stage: int = 0) -> Context:
    return Context.at(step, steps, stage=stage, generator=torch.Generator().manual_seed(step))


def each_stage(method: Method) -> range:
    """The numbers of a method's stages."""
    return range(len(method.starts()))


def trained_names(method: Method, stage: int) -> set[str]:
    """The parameters that a stage trains."""
    groups = method.groups(stage)
    member = {name: group_of(name, groups) for name, _ in method.named_parameters()}
    return {name for name, group in member.items() if group is None or not group.frozen}


with torch.random.fork_rng():
    torch.manual_seed(1)
    AVERAGED = SimpleNamespace(net=TinyNet().eval(), heads=nn.ModuleDict({"standard": nn.Linear(FEATURES, CLASSES)}))
AVERAGED.predict = lambda images: {"standard": AVERAGED.heads["standard"](AVERAGED.net(images))}


@torch.no_grad()
def tiny_averaged(images: Tensor, of: Callable[..., Tensor] | None = None) -> Tensor:
    """Features by a network that never changes, or what ``of`` makes of it."""
    return (AVERAGED.net(images) if of is None else of(AVERAGED, images)).float()


def tiny_step(method: Callable[..., Out], batch: Batch, ctx: Context, averaged: Averaged = tiny_averaged) -> Out:
    """What a step makes of a batch, without backward and update."""
    return method(batch, method.inputs(batch, ctx), averaged)


def tiny_prepared(method: Method, batch: Batch, ctx: Context) -> tuple[Batch, Any]:
    """The batch that the network sees, and what goes into the objective."""
    return method.prepare(batch, method.inputs(batch, ctx), tiny_averaged)


def to_device(batch: Batch, device: str) -> Batch:
    """The batch with all its tensors there."""
    moved = [{name: x.to(device) for name, x in values.items()} for values in (batch.labels, batch.rows)]
    return batch._replace(images=batch.images.to(device), labels=moved[0], rows=moved[1])
