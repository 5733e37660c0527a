"""TRAS (Wei et al., Machine Learning 2022): a second classifier learns from transformed predictions of the first."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import BALANCED_USED, CONFIDENCE, USED
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.priors import adjust_logits, class_prior

NotNegative = Annotated[float, Field(ge=0)]


def transformation(prior: Tensor, scale: float, offset: float) -> Tensor:
    """T_k = A softmax(-ln pi)_k + B, the strength of the adjustment for images of class k. (K,) -> (K,)."""
    return scale * adjust_logits(torch.zeros_like(prior), prior, -1.0).softmax(0) + offset


class TRAS(Method):
    """L = L_x + L_u + L_x^b + L_u^b: FixMatch with adjusted pseudo-labels, and a classifier that it teaches.

    The equations follow the released code (Stomach-ache/TRAS, train.py), with pi the labeled prior:

    - the standard head: y^ = argmax softmax(z^w - ln pi), used where that reaches tau; cross-entropy on strong views;
    - the balanced head, labeled: cross-entropy of z^b + ln pi;
    - the balanced head, unlabeled: for images whose softmax(z^bw) reaches tau in class k, on strong view s the
      cross-entropy of z^bs against softmax((z^s - T_k ln pi) / 2), the transformed prediction of the standard head on
      the same view, without gradient. As T >= 2, that corrects more than once, which is what moves weight to the tail.

    *choice*: pi is exact; *released* counts a pass that drops the last batch. The balanced head is reported throughout;
    *released* evaluates the standard one until the balanced one is trained.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive; of both heads.
        strong_views: V (*released* 2).
        transfer_scale, transfer_offset: A and B.
        teacher_temperature: what the transformed logits are divided by.
        balanced_from: notional epoch of 500 from which the balanced head is trained.
    """

    figures = (USED, CONFIDENCE, BALANCED_USED)

    prior: Tensor  # pi, (K,) float32; follows from the data, so it is not saved
    transfer: Tensor  # T, (K,) float32; likewise

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        transfer_scale: NotNegative = 2.0,
        transfer_offset: NotNegative = 2.0,
        teacher_temperature: Annotated[float, Field(gt=0)] = 2.0,
        balanced_from: Annotated[int, Field(ge=0, le=EPOCHS)] = 11,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.strong_views = tau, strong_views
        self.teacher_temperature, self.balanced_from = teacher_temperature, balanced_from
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("balanced", "standard")})
        self.reported = "balanced"
        prior = class_prior(info.labeled_counts)
        self.register_buffer("prior", prior, persistent=False)
        self.register_buffer("transfer", transformation(prior, transfer_scale, transfer_offset), persistent=False)

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """Whether the balanced head is trained, 0-dim bool."""
        return torch.full((), ctx.epoch >= self.balanced_from, device=batch.images.device)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Tensor) -> Out:
        labeled, target = joint["labeled"]["weak"].logits, labels["labeled"]
        weak, strong = joint["unlabeled"]["weak"].logits, joint["unlabeled"]["strong"].logits
        adjusted = adjust_logits(weak["standard"], self.prior, -1.0)
        pseudo = losses.harden(losses.linear_pseudo_label(adjusted), self.tau)
        balanced = losses.harden(losses.linear_pseudo_label(weak["balanced"]), self.tau)
        used, balanced_used = pseudo.mask.float(), (balanced.mask & prepared).float()
        teacher = self.teacher(strong["standard"], balanced.target.repeat(self.strong_views))
        weight = balanced_used.repeat(self.strong_views)
        balanced_labeled = losses.labeled_loss(adjust_logits(labeled["balanced"], self.prior, 1.0), target)
        parts = {
            "labeled": losses.labeled_loss(labeled["standard"], target),
            "unlabeled": losses.unlabeled_loss(strong["standard"], pseudo.target, used),
            "balanced_labeled": torch.where(prepared, balanced_labeled, 0.0),
            "balanced_unlabeled": losses.unlabeled_loss(strong["balanced"], teacher, weight),
        }
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()} | {
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
            BALANCED_USED.name: balanced_used.mean(),
        }
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    @torch.no_grad()
    def teacher(self, logits: Tensor, classes: Tensor) -> Tensor:
        """softmax((z - T_k ln pi) / temperature) of rows of class k. (n, K), (n,) int64 -> (n, K), rows sum to 1."""
        transformed = adjust_logits(logits, self.prior, -self.transfer[classes].unsqueeze(1))
        return (transformed / self.teacher_temperature).softmax(-1)
