"""ACR (Wei and Gan, CVPR 2023): adaptive consistency, whose strength follows the estimated unlabeled distribution."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Context, Look, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import BALANCED_USED, CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.priors import PRIOR_FLOOR, adjust_logits, class_prior
from semi_fast.parts.statistics import class_counts
from semi_fast.processes.gather import sum_ranks

NotNegative = Annotated[float, Field(ge=0)]

STRENGTH = Figure("acr/strength", "", "Strength of the logit adjustment of the standard head's pseudo-labels.")
ESTIMATE = Figure("acr/unlabeled", "distribution", "Estimated class distribution of the unlabeled images.")


def anchor_distributions(prior: Tensor) -> Tensor:
    """The consistent, uniform and reversed anchors, (3, K), of the labeled prior, (K,), in whatever order of classes.

    Reversed: the class with most labels gets the share of the one with fewest, and so on. *released* (Gank0078/ACR)
    flips the vector, which needs classes sorted by frequency.
    """
    order = prior.argsort(descending=True, stable=True)
    reverse = torch.empty_like(prior)
    reverse[order] = prior[order.flip(0)]
    return torch.stack([prior, torch.full_like(prior, 1.0 / len(prior)), reverse])


def divergences(estimate: Tensor, anchors: Tensor) -> Tensor:
    """d_a = KL(u || a) / 2 + KL(a || u) / 2 for each anchor. (K,), (3, K) -> (3,)."""
    logarithms = [x.clamp_min(PRIOR_FLOOR).log() for x in (estimate, anchors)]
    return 0.5 * ((estimate - anchors) * (logarithms[0] - logarithms[1])).sum(-1)


class ACR(Method):
    """L = L_S + L_U + L_S^b + L_U^b, two heads that both learn from adjusted predictions of the standard one.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive: of the adjusted prediction or the plain one.
        strong_views: V.
        max_strength: tau_1, the strength of the adjustment of the standard head's pseudo-labels until it is estimated,
            and the most it can become.
        target_strength: tau_12, that of the balanced head's pseudo-labels.
        balance_strength: tau_2, that of the balanced head's labeled loss.
        estimate_decay: of u, per step (*released*: 0.9 by default, 0.99 in every command of its README).
        estimate_from: notional epoch of 500 from which u is estimated.
    """

    figures = (USED, CONFIDENCE, BALANCED_USED, STRENGTH, ESTIMATE)

    anchors: Tensor  # (3, K) float32: consistent, uniform, reversed; follow from the data, so they are not saved
    is_labeled: Tensor  # (num_train,) float32, 1 for labeled rows, which may be among the unlabeled ones
    estimate: Tensor  # u, (K,) float32
    strength: Tensor  # tau, 0-dim float32
    distance: Tensor  # (3,) float32, sum of the divergences over the epoch's steps
    epoch: Tensor  # 0-dim int64, of the step before
    steps: Tensor  # 0-dim int64, of the epoch so far

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        max_strength: NotNegative = 2.0,
        target_strength: NotNegative = 2.0,
        balance_strength: NotNegative = 2.0,
        estimate_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99,
        estimate_from: Annotated[int, Field(ge=0, le=EPOCHS)] = 6,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.max_strength, self.target_strength = tau, max_strength, target_strength
        self.balance_strength, self.estimate_decay, self.estimate_from = balance_strength, estimate_decay, estimate_from
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("balanced", "standard")})
        self.reported = "balanced"
        self.register_buffer("anchors", anchor_distributions(class_prior(info.labeled_counts)), persistent=False)
        self.register_buffer("is_labeled", torch.zeros(info.num_train))
        self.register_buffer("estimate", torch.full((info.num_classes,), 1.0 / info.num_classes))
        self.register_buffer("strength", torch.full((), max_strength))
        self.register_buffer("distance", torch.zeros(3))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def begin(self, stage: int, look: Look) -> None:
        self.is_labeled[look.labeled.to(self.is_labeled.device)] = 1.0

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """The notional epoch, 0-dim int64."""
        return torch.full((), ctx.epoch, device=batch.images.device)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Tensor) -> Out:
        labeled, target = joint["labeled"]["weak"].logits, labels["labeled"]
        weak, strong = joint["unlabeled"]["weak"].logits, joint["unlabeled"]["strong"].logits
        prior = self.anchors[0]
        self._begin_epoch(prepared)
        plain, adjusted = weak["standard"], adjust_logits(weak["standard"], prior, -self.strength)
        pseudo, sure = (losses.harden(losses.linear_pseudo_label(logits), self.tau) for logits in (adjusted, plain))
        pseudo = pseudo._replace(mask=pseudo.mask | sure.mask)
        balanced = losses.balanced_pseudo_labels(plain, weak["balanced"], prior, self.target_strength, self.tau)
        used, balanced_used = pseudo.mask.float(), balanced.mask.float()
        balanced_labeled = adjust_logits(labeled["balanced"], prior, self.balance_strength)
        parts = {
            "labeled": losses.labeled_loss(labeled["standard"], target),
            "unlabeled": losses.unlabeled_loss(strong["standard"], pseudo.target, used),
            "balanced_labeled": losses.labeled_loss(balanced_labeled, target),
            "balanced_unlabeled": losses.unlabeled_loss(strong["balanced"], balanced.target, balanced_used),
        }
        self._estimate(weak["balanced"], rows["unlabeled"], prepared)
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()} | {
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
            BALANCED_USED.name: balanced_used.mean(),
        }
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    @torch.no_grad()
    def _begin_epoch(self, epoch: Tensor) -> None:
        """tau = tau_1 e^d_con / (e^d_con + e^d_uni + e^d_rev), where a new epoch is one from ``estimate_from`` on.

        d is the mean divergence over the steps of the epoch before. In the first of these epochs it is 0 and so tau a
        third of tau_1, as *released*.
        """
        begins = epoch != self.epoch
        strength = self.max_strength * (self.distance / self.steps.clamp_min(1)).softmax(0)[0]
        self.strength.copy_(torch.where(begins & (epoch >= self.estimate_from), strength, self.strength))
        self.distance.copy_(torch.where(begins, 0.0, self.distance))
        self.steps.copy_(torch.where(begins, 0, self.steps))
        self.epoch.copy_(epoch)

    @torch.no_grad()
    def _estimate(self, balanced_logits: Tensor, rows: Tensor, epoch: Tensor) -> None:
        """u <- decay u + (1 - decay) g / sum g, and the divergences of u; g_k = 1 where the balanced head is sure of k.

        *released*: a class counts once a step, however many of its images are sure: an in-place addition with repeated
        indices. Their last decides; here one is enough. Rows that are labeled do not count. A step without any changes
        nothing, but counts as a step.
        """
        sure = losses.harden(losses.linear_pseudo_label(balanced_logits), self.tau)
        counted = sure.mask & (self.is_labeled[rows] == 0)
        present = sum_ranks(class_counts(sure.target, counted, len(self.estimate))) > 0
        live = present.any() & (epoch >= self.estimate_from)
        shares = present / present.sum().clamp_min(1)
        self.estimate.copy_(torch.where(live, torch.lerp(shares, self.estimate, self.estimate_decay), self.estimate))
        self.distance.add_(torch.where(live, divergences(self.estimate, self.anchors), 0.0))
        self.steps.add_(1)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {STRENGTH.name: self.strength.clone(), ESTIMATE.name: self.estimate.clone()}
