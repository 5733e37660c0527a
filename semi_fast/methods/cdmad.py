"""CDMAD (Lee and Kim, CVPR 2024): what a classifier says of an image without content is its bias, and is taken off."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Averaged, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, eval_features, linear_head

BIAS = Figure("cdmad/bias", "distribution", "What the network as it stands predicts of an image without content.")


class Prepared(NamedTuple):
    """The bias of the network before the step, and whether it is taken off."""

    bias: Tensor  # b, (K,) float32
    live: Tensor  # 0-dim bool


class CDMAD(Method):
    """L = L_x + L_u, with soft pseudo-labels softmax(z^w - b), b = z(x_0) the logits of an image of one color.

    The equations follow the released code (LeeHyuck/CDMAD, fixmatchcdmad.py), x_0 being 1 in every channel after
    normalization: L_u is the mean over all strong views of the cross-entropy against q = softmax(z^w - b), counted
    where max q >= tau, which is 0: every image counts. z - b is reported, of the averaged network and its own b.

    *choice*: b is that of the network in eval mode. *released*: in training mode, so that BatchNorm normalizes x_0, a
    batch of one, by itself, and takes it into its running statistics.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and side of the images.
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: V (*released* 2).
        debias_from: notional epoch of 500 from which the bias is taken off the logits of pseudo-labels.
    """

    figures = (USED, CONFIDENCE, BIAS)

    blank: Tensor  # x_0, (1, 3, H, W) float32; not saved

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(ge=0, le=1)] = 0.0,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        debias_from: Annotated[int, Field(ge=0, le=EPOCHS)] = 101,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.debias_from = tau, debias_from
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.reported = "debiased"
        self.register_buffer("blank", torch.ones(1, 3, info.resolution, info.resolution), persistent=False)

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """Whether pseudo-labels are corrected, 0-dim bool."""
        return torch.full((), ctx.epoch >= self.debias_from, device=batch.images.device)

    def prepare(self, batch: Batch, inputs: Tensor, averaged: Averaged) -> tuple[Batch, Prepared]:
        return batch, Prepared(self.bias(), inputs)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared) -> Out:
        weak, strong = joint["unlabeled"]["weak"].logits["standard"], joint["unlabeled"]["strong"].logits["standard"]
        q = losses.linear_pseudo_label(weak - torch.where(prepared.live, prepared.bias, 0.0))
        pseudo = losses.harden(q, self.tau)
        used = pseudo.mask.float()
        labeled = losses.labeled_loss(joint["labeled"]["weak"].logits["standard"], labels["labeled"])
        unlabeled = losses.unlabeled_loss(strong, q, used)
        logs = {"loss/labeled": labeled.detach(), "loss/unlabeled": unlabeled.detach()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        return Out(labeled + unlabeled, logs, pseudo)

    @torch.no_grad()
    def bias(self) -> Tensor:
        """b, (K,) float32, of the network as it stands."""
        return self.heads["standard"](eval_features(self.net, self.blank)).float()[0]

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"debiased": logits["standard"] - self.bias(), **logits}

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {BIAS.name: self.bias().softmax(0)}
