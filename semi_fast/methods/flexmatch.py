"""FlexMatch (Zhang et al., NeurIPS 2021): a threshold for each class, lower where a class is learned less."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Info
from semi_fast.methods.base import Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.losses import PseudoLabels
from semi_fast.processes.gather import gather_ranks

THRESHOLD = Figure("flexmatch/threshold", "distribution", "Confidence from which a pseudo-label of the class is used.")


class FlexMatch(Method):
    """L = L_S + lambda L_U, with curriculum pseudo-labeling (sec. 3.2).

    The learning status of class k is sigma_k, the number of unlabeled images whose last confident pseudo-label was k
    (Eq. 5). *released* (USB): the label of an image stays until another one is confident.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and numbers of images.
        tau: the highest threshold, and the confidence from which a pseudo-label counts as learned; both inclusive.
        strong_views: strong views of each unlabeled image (the original has one).
        unlabeled_weight: lambda.
        threshold_warmup: compare sigma_k with the images not learned yet, too (Eq. 11), so that thresholds start low.
    """

    figures = (USED, CONFIDENCE, THRESHOLD)

    last: Tensor  # (num_train,) int64: order * K + label of each image's last confident pseudo-label; -1: none yet
    learned: Tensor  # sigma, (K,) int64
    seen: Tensor  # 0-dim int64, unlabeled images of all steps so far

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0,
        threshold_warmup: bool = True,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.unlabeled_weight, self.threshold_warmup = tau, unlabeled_weight, threshold_warmup
        self.num_unlabeled = info.num_unlabeled
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.reported = "standard"
        self.register_buffer("last", torch.full((info.num_train,), -1))
        self.register_buffer("learned", torch.zeros(info.num_classes, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Any) -> Out:
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        labeled = losses.labeled_loss(joint["labeled"]["weak"].logits["standard"], labels["labeled"])
        confident = losses.harden(losses.linear_pseudo_label(weak.logits["standard"]), self.tau)
        pseudo = confident._replace(mask=confident.confidence >= self.thresholds()[confident.target])
        used = pseudo.mask.float()
        unlabeled = self.unlabeled_weight * losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used)
        self._learn(confident, rows["unlabeled"])
        logs = {
            "loss/labeled": labeled.detach(),
            "loss/unlabeled": unlabeled.detach(),
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
        }
        return Out(labeled + unlabeled, logs, pseudo)

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """T_k = tau * beta_k / (2 - beta_k), the convex map, (K,) float32; 0 for a class without a learned image."""
        most = self.learned.max()
        if self.threshold_warmup:
            most = torch.maximum(most, self.num_unlabeled - self.learned.sum())
        beta = self.learned / most.clamp_min(1)
        return self.tau * beta / (2.0 - beta)

    @torch.no_grad()
    def _learn(self, confident: PseudoLabels, rows: Tensor) -> None:
        """Note the confident labels of all ranks; of an image met twice in a step, the later one.

        Labels are written as order * K + label: the largest is the latest, whatever order a scatter takes.
        """
        classes = len(self.learned)
        offered = torch.stack([rows, confident.target, confident.mask.long()], 1)
        rows, target, mask = gather_ranks(offered).flatten(0, 1).unbind(1)
        order = self.seen + torch.arange(len(rows), device=rows.device)
        written = torch.where(mask > 0, order * classes + target, -1)
        before = self.last[rows]
        self.last.scatter_reduce_(0, rows, written, "amax")
        newest = (mask > 0) & (self.last[rows] == written)
        self.learned.index_add_(0, target, newest.long())
        self.learned.index_add_(0, before % classes, -(newest & (before >= 0)).long())
        self.seen.add_(len(rows))

    @torch.no_grad()
    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {THRESHOLD.name: self.thresholds()}
