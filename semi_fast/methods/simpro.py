"""SimPro (Du et al., ICML 2024): the logits are learned apart from the class priors, which are estimated in turn."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info, Stream
from semi_fast.methods.base import Context, Method, Out
from semi_fast.parts import losses
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.priors import class_prior
from semi_fast.processes.gather import sum_ranks

UNLABELED_PRIOR = Figure("simpro/unlabeled_prior", "distribution", "Estimated class distribution of unlabeled images.")
LOSS_PRIOR = Figure("simpro/loss_prior", "distribution", "Class distribution of the labels and used pseudo-labels.")
FLOOR = 1e-12  # inside the logarithm
KEPT = 0.9  # of an estimate, when it takes in another epoch


class SimPro(Method):
    """Pseudo-labels of the Bayes classifier of the estimated unlabeled prior, soft, where they are confident (E-step);
    losses on the logits plus the logarithm of the prior that a batch is drawn by; closed-form priors (M-step).

    The equations follow the released code (LeapLabTHU/SimPro, train.py): it refreshes the priors by a moving average
    once in 500 of 43,000 steps, which is `refreshes` a run here.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts, labeled and unlabeled images.
        tau: confidence from which a pseudo-label is used, inclusive (CIFAR-10-LT 0.95; CIFAR-100-LT, ImageNet-127 0.2).
        strength: tau of the paper, on both log priors (CIFAR-10-LT 2; CIFAR-100-LT and ImageNet-127 1).
        refreshes: times a run that the priors are estimated anew (43,000 steps: 86; 250,000 steps: 500).
        strong_views: strong views of each unlabeled image.
    """

    figures = (USED, CONFIDENCE, UNLABELED_PRIOR, LOSS_PRIOR)
    unlabeled_prior: Tensor  # u, (K,) float32; may sum to less than 1, which a softmax does not see
    loss_prior: Tensor  # r, (K,) float32, of labels and used pseudo-labels
    pseudo_counts: Tensor  # A, (K,) float32, of the used soft pseudo-labels since the last refresh
    label_counts: Tensor  # B, (K,) float32, of the labels since the last refresh

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strength: Annotated[float, Field(ge=0)] = 2.0,
        refreshes: Annotated[int, Field(ge=1)] = 86,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
    ) -> None:
        super().__init__()
        self.streams = {
            "labeled": Stream("labeled", ("weak", "strong")),
            "unlabeled": Stream("unlabeled", ("weak",) + ("strong",) * strong_views),
        }
        self.tau, self.strength, self.refreshes = tau, strength, refreshes
        self.passes = info.num_unlabeled / info.num_labeled  # N_u / N_l
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.reported = "standard"
        prior = class_prior(info.labeled_counts)
        self.register_buffer("unlabeled_prior", torch.full_like(prior, 1 / len(prior)))
        self.register_buffer("loss_prior", prior)
        self.register_buffer("pseudo_counts", torch.zeros_like(prior))
        self.register_buffer("label_counts", torch.zeros_like(prior))

    def inputs(self, batch: Batch, ctx: Context) -> None:
        """The M-step, with the first step of each of the equal parts of the run but the first."""
        if begins_part(ctx, self.refreshes):
            self.refresh()

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: None) -> Out:
        # E-step: q = softmax(z^w + tau ln u).
        q = losses.linear_pseudo_label(joint["unlabeled"]["weak"].logits["standard"] + self._log(self.unlabeled_prior))
        pseudo = losses.harden(q, self.tau)
        used = pseudo.mask.float()
        # L_x = mean CE(z + tau ln r, y) / rho over both views, rho = (N_u / mu B) / (N_l / B), passes in turn.
        shift, targets = self._log(self.loss_prior), labels["labeled"]
        logits = torch.cat([joint["labeled"][view].logits["standard"] for view in ("weak", "strong")])
        weight = rows["unlabeled"].shape[0] / (targets.shape[0] * self.passes)
        labeled = weight * losses.labeled_loss(logits + shift, targets.repeat(2))
        # L_u = mean m CE(z^s + tau ln r, q), soft.
        unlabeled = losses.unlabeled_loss(joint["unlabeled"]["strong"].logits["standard"] + shift, q, used)
        self._count(q, used, targets)
        logs = {"loss/labeled": labeled.detach(), "loss/unlabeled": unlabeled.detach()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        return Out(labeled + unlabeled, logs, pseudo)

    def _log(self, prior: Tensor) -> Tensor:
        """tau ln prior, floored: (K,) -> (K,)."""
        return (prior**self.strength + FLOOR).log()

    @torch.no_grad()
    def _count(self, q: Tensor, used: Tensor, labels: Tensor) -> None:
        """Add a step's soft pseudo-labels and labels, of all ranks."""
        seen = torch.zeros_like(self.label_counts).index_add_(0, labels, torch.ones_like(labels, dtype=torch.float32))
        pseudo, seen = sum_ranks(torch.stack([used @ q, seen]).unsqueeze(0))[0]
        self.pseudo_counts.add_(pseudo)
        self.label_counts.add_(seen)

    @torch.no_grad()
    def refresh(self) -> None:
        """M-step: u <- 0.9 u + 0.1 A / (sum A + 1); r <- 0.9 r + 0.1 (A + B) / sum(A + B); A, B <- 0."""
        joint = self.pseudo_counts + self.label_counts
        share = torch.where(joint.sum() > 0, joint / joint.sum(), self.loss_prior)
        self.unlabeled_prior.lerp_(self.pseudo_counts / (self.pseudo_counts.sum() + 1), 1 - KEPT)
        self.loss_prior.lerp_(share, 1 - KEPT)
        self.pseudo_counts.zero_()
        self.label_counts.zero_()

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {UNLABELED_PRIOR.name: self.unlabeled_prior.clone(), LOSS_PRIOR.name: self.loss_prior.clone()}


def begins_part(ctx: Context, parts: int) -> bool:
    """Whether a step is the first of one of so many equal parts of its stage, the first part left out."""
    if ctx.step == 0:
        return False
    steps = round(ctx.step / ctx.progress)
    return ctx.step * parts // steps > (ctx.step - 1) * parts // steps
