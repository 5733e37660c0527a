"""DASO (Oh, Kim and Kweon, CVPR 2022): the classifier's pseudo-label blended with that of the nearest prototypes."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.memory_bank import MemoryBank
from semi_fast.methods.base import EPOCHS, Averaged, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.adjustment import Form, LogitAdjustment
from semi_fast.parts.blending import BANK_SIZE, BLENDED, WARMUP_EPOCHS, Blending, Inputs
from semi_fast.parts.figures import CONFIDENCE, MIXING, USED
from semi_fast.parts.forward import Joint, linear_head, num_features

Positive = Annotated[float, Field(gt=0)]


class DASO(Method):
    """L = L_S + L_U + lambda L_align; FixMatch during warm-up. ``semi_fast.parts.blending`` has the equations.

    *choice*: the averaged network that gives the prototypes' features is in eval mode. *released* (ytaek-oh/daso) keeps
    it in training mode: its BatchNorm then sees the labeled images of a step alone, and their statistics take over
    those that it averages. Here prototypes are of the network that is evaluated, however small the labeled batch.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence of the blended pseudo-label from which it is used, inclusive.
        distribution_temperature: T_d. *released*: 1.5 on CIFAR-10-LT with gamma_u = gamma_l, 0.3 otherwise.
        prototype_temperature: T_proto.
        align_weight: lambda.
        warmup_epochs: of 500 notional epochs.
        bank_size: labeled features of a class that its prototype is the mean of, the newest.
        strong_views: V (the original has one).
        logit_adjustment: "train" for the paper's rows "FixMatch + LA w/ DASO"; see ``semi_fast.parts.adjustment``.
        adjustment_strength: tau_LA.
    """

    figures = (USED, CONFIDENCE, MIXING, BLENDED)

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        distribution_temperature: Positive = 0.3,
        prototype_temperature: Positive = 0.05,
        align_weight: Annotated[float, Field(ge=0)] = 1.0,
        warmup_epochs: Annotated[int, Field(ge=0, le=EPOCHS)] = WARMUP_EPOCHS,
        bank_size: Annotated[int, Field(ge=1)] = BANK_SIZE,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        logit_adjustment: Form = "off",
        adjustment_strength: Positive = 1.0,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.align_weight = tau, align_weight
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.adjustment = LogitAdjustment(info.labeled_counts, logit_adjustment, adjustment_strength)
        self.reported = self.adjustment.reported("standard")
        bank = MemoryBank(info.num_classes, num_features(net), size=bank_size, beta=1.0, rule="fifo")
        self.blending = Blending(bank, distribution_temperature, prototype_temperature, warmup_epochs)

    def inputs(self, batch: Batch, ctx: Context) -> Inputs:
        return self.blending.inputs(ctx.step, ctx.epoch, batch.images.device)

    def prepare(self, batch: Batch, inputs: Inputs, averaged: Averaged) -> tuple[Batch, tuple[Inputs, Tensor]]:
        return batch, (inputs, averaged(batch.of("labeled", "weak")))

    def objective(
        self,
        joint: Joint,
        labels: dict[str, Tensor],
        rows: dict[str, Tensor],
        prepared: tuple[Inputs, Tensor],
    ) -> Out:
        inputs, features = prepared
        labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        self.blending.learn(features, labels["labeled"], rows["labeled"])
        semantic, align = self.blending.semantic(weak, strong, inputs)
        linear = losses.linear_pseudo_label(self.adjustment.pseudo(weak.logits["standard"]))
        blended, mixing = self.blending.blend(linear, semantic, inputs)
        pseudo = losses.harden(blended, self.tau)
        used = pseudo.mask.float()
        adjusted = self.adjustment.labeled(labeled.logits["standard"])
        parts = {
            "loss/labeled": losses.labeled_loss(adjusted, labels["labeled"]),
            "loss/unlabeled": losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used),
            "loss/align": self.align_weight * align,
        }
        self.blending.update(pseudo.target, inputs)
        logs = {name: part.detach() for name, part in parts.items()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean(), MIXING.name: mixing.mean()}
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.adjustment.predictions(logits)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return self.blending.statistics()
