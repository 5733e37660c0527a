"""ReMixMatch (Berthelot et al., ICLR 2020): aligned and sharpened soft targets, mixup over everything, rotations."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Group, Info, Stream
from semi_fast.methods.base import Averaged, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.alignment import MeanPrediction, align, sharpen
from semi_fast.parts.figures import CONFIDENCE
from semi_fast.parts.forward import Joint, linear_head, num_features
from semi_fast.parts.mixup import Mixing, draw_mixing, mix
from semi_fast.parts.priors import class_prior
from semi_fast.parts.statistics import one_hot
from semi_fast.processes.gather import share_of_rank, world_size

NotNegative = Annotated[float, Field(ge=0)]
ANGLES = 4  # quarter turns


class Prepared(NamedTuple):
    """What a step draws, and how far the run is."""

    mixing: Mixing
    angles: Tensor  # (mu B,) int64 in [0, 4), quarter turns
    ramp: Tensor  # r, 0-dim float32 in [0, 1]


class ReMixMatch(Method):
    """L = L_x + r (w_u L_u + w_pre L_pre) + w_rot L_rot; the form of ytaek-oh/daso.

    q = softmax(z_w) takes the shape of the labeled distribution (`parts.alignment`) and is sharpened to the power of
    1 / T. All labeled, weak and strong images stand in X, their one-hot labels and q in Y; X' = l X + (1 - l) X[perm]
    and Y' alike, with one l ~ Beta(a, a) a step, at least a half. L_x is the mean cross-entropy of the first B mixed
    rows against Y', L_u that of all others; L_pre that of the first strong view, not mixed, against q; L_rot that of a
    head of four angles on this view turned by quarters. r rises linearly from 0 to 1.

    *choice*: one forward holds weak, mixed, anchored and turned images, and BatchNorm sees them all together;
    *released*: mixed images in four interleaved batches of a forward each. *choice*: the mean prediction is the one of
    the steps before, uniform at the start (*released*: it begins with the first batch and includes the newest). Of
    several processes each mixes its own images.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        alignment: distribution alignment. *released*: on where gamma_u = gamma_l on CIFAR-10-LT and CIFAR-100-LT; off
            on STL-10-LT and, by the authors' note, wherever the unlabeled classes are distributed otherwise.
        temperature: T of the sharpening.
        mixup: a.
        unlabeled_weight, anchor_weight, rotation_weight: w_u, w_pre, w_rot.
        ramp: share of the run in which r rises (DARP's and CoSSL's code: 1).
        strong_views: V (*released*: 2).
        labeled_view: of the labeled images (DARP's and CoSSL's code: strong).
        window: steps that the mean prediction goes back.
    """

    figures = (CONFIDENCE,)
    prior: Tensor  # (K,) float32, of the labels; follows from the data, so it is not saved

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        alignment: bool = True,
        temperature: Annotated[float, Field(gt=0)] = 0.5,
        mixup: Annotated[float, Field(gt=0)] = 0.75,
        unlabeled_weight: NotNegative = 1.5,
        anchor_weight: NotNegative = 0.5,
        rotation_weight: NotNegative = 0.5,
        ramp: Annotated[float, Field(gt=0, le=1)] = 0.016,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        labeled_view: Literal["weak", "strong"] = "weak",
        window: Annotated[int, Field(ge=1)] = 128,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views) | {"labeled": Stream("labeled", (labeled_view,))}
        self.temperature, self.mixup, self.ramp, self.strong_views = temperature, mixup, ramp, strong_views
        self.unlabeled_weight = unlabeled_weight
        self.anchor_weight, self.rotation_weight = anchor_weight, rotation_weight
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.reported = "standard"
        self.rotation = nn.Linear(num_features(net), ANGLES)
        self.mean = MeanPrediction(info.num_classes, window) if alignment else None
        self.register_buffer("prior", class_prior(info.labeled_counts), persistent=False)

    def inputs(self, batch: Batch, ctx: Context) -> Prepared:
        device, images = batch.images.device, len(batch.rows["unlabeled"])
        angles = torch.randint(ANGLES, (images * world_size(),), generator=ctx.generator, device=device)
        mixing = draw_mixing(len(batch.images), self.mixup, ctx.generator, device)
        ramp = torch.full((), min(ctx.progress / self.ramp, 1.0), device=device)
        return Prepared(mixing, share_of_rank(angles), ramp)

    def prepare(self, batch: Batch, inputs: Prepared, averaged: Averaged) -> tuple[Batch, Prepared]:
        weak, anchors = batch.of("unlabeled", "weak"), batch.of("unlabeled", "strong")[: len(inputs.angles)]
        views = {
            ("unlabeled", "weak"): weak,
            ("all", "mixed"): mix(batch.images, inputs.mixing),
            ("unlabeled", "strong"): anchors,
            ("unlabeled", "turned"): turn(anchors, inputs.angles),
        }
        groups = tuple(Group(stream, view, len(images)) for (stream, view), images in views.items())
        return batch._replace(images=torch.cat(list(views.values())), groups=groups), inputs

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared) -> Out:
        unlabeled, target = joint["unlabeled"], labels["labeled"]
        q = p = losses.linear_pseudo_label(unlabeled["weak"].logits["standard"])
        if self.mean is not None:
            q = align(p, self.prior, self.mean.read())
            self.mean.update(p)
        q = sharpen(q, 1 / self.temperature)
        everything = torch.cat([one_hot(target, q.shape[1]), q.repeat(1 + self.strong_views, 1)])
        mixed, soft = joint["all"]["mixed"].logits["standard"], mix(everything, prepared.mixing)
        first, ramp = len(target), prepared.ramp
        angles = self.rotation(unlabeled["turned"].features)
        parts = {
            "labeled": F.cross_entropy(mixed[:first], soft[:first]),
            "unlabeled": ramp * self.unlabeled_weight * F.cross_entropy(mixed[first:], soft[first:]),
            "anchor": ramp * self.anchor_weight * F.cross_entropy(unlabeled["strong"].logits["standard"], q),
            "rotation": self.rotation_weight * F.cross_entropy(angles, prepared.angles),
        }
        pseudo = losses.harden(q, 0.0)  # every one is used
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()}
        logs[CONFIDENCE.name] = pseudo.confidence.mean()
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)


def turn(images: Tensor, angles: Tensor) -> Tensor:
    """Each image turned by so many quarters, counter-clockwise. (n, 3, H, H), (n,) int64 -> (n, 3, H, H)."""
    turned = torch.stack([images.rot90(quarters, (2, 3)) for quarters in range(ANGLES)])
    chosen = turned[angles, torch.arange(len(images), device=images.device)]
    return chosen.contiguous(memory_format=torch.channels_last)  # as the views beside it
