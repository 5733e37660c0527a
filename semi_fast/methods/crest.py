"""CReST and CReST+ (Wei et al., CVPR 2021): self-training in generations that adds most of the rarest classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines.batch import Batch, Info
from semi_fast.methods.base import Context, Look, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.adjustment import LogitAdjustment
from semi_fast.parts.alignment import MeanPrediction, align
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head

SELECTED = Figure("crest/selected", "distribution", "Share of each class among the images labeled for this generation.")


class Crest(Method):
    """FixMatch in generations ("Class-Rebalancing Self-Training" in the paper).

    Between two of them the averaged network labels the unlabeled images. The most confident ones of every class, all
    of the rarest and few of the commonest, join the original labeled ones, and everything is trained anew. The
    unlabeled images stay the same.

    *choice*: classes are mirrored by their rank of labeled counts, which need not follow the class numbers. The mean
    prediction starts uniform, is read before it is updated, and begins anew with each generation, as in
    google-research/crest; *released* (ytaek-oh/daso): it starts with the first batch and lives through the run.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        generations: equal parts of the run (DASO's code: 5 of 50,000 steps; google-research/crest: 6 of 65,536).
        alpha: class of rank r adds the share (N_{K-1-r} / N_0)^(1 / alpha) of the images predicted as it.
        alignment: progressive distribution alignment, that is CReST+; false: CReST.
        t_min: exponent of the target distribution in the last generation; it falls from 1 linearly.
        window: steps whose predictions are averaged for the alignment.
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: strong views of each unlabeled image.
        logit_adjustment: "train" (the rows "+ LA w/ CReST+"; ytaek-oh/daso) or "posthoc" (CReST++LA), by the prior of
            the labeled set as expanded; *released* (google-research/crest): a moving average of the labels seen.
        adjustment_strength: tau_LA.
    """

    figures = (USED, CONFIDENCE, SELECTED)
    labeled_counts: Tensor  # N, (K,) of the original labeled set; follows from the data, so it is not saved
    selected: Tensor  # (K,) int64, images labeled for this generation

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        generations: Annotated[int, Field(ge=1)] = 5,
        alpha: Annotated[float, Field(gt=0)] = 3.0,
        alignment: bool = True,
        t_min: Annotated[float, Field(ge=0, le=1)] = 0.5,
        window: Annotated[int, Field(ge=1)] = 128,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        logit_adjustment: Literal["off", "train", "posthoc"] = "off",
        adjustment_strength: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        if info.num_classes < 2:
            raise UserError(f"method=crest needs two classes or more, got {info.num_classes}. Use other data.")
        self.streams = two_streams(strong_views)
        self.generations, self.alpha, self.t_min, self.tau = generations, alpha, t_min, tau
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.mean = MeanPrediction(info.num_classes, window) if alignment else None
        self.adjustment = LogitAdjustment(info.labeled_counts, logit_adjustment, adjustment_strength, fixed=False)
        self.relabels = True
        self.reported = self.adjustment.reported("standard")
        self.register_buffer("labeled_counts", torch.tensor(info.labeled_counts), persistent=False)
        self.register_buffer("selected", torch.zeros(info.num_classes, dtype=torch.int64))

    def starts(self) -> tuple[float, ...]:
        return tuple(g / self.generations for g in range(self.generations))

    def begin(self, stage: int, look: Look) -> None:
        if stage == 0:
            return
        probabilities = look.logits(look.unlabeled)["standard"].softmax(1).cpu()
        chosen, classes = select(probabilities, add_shares(self.labeled_counts.tolist(), self.alpha))
        rows, labels = torch.cat([look.labeled, look.unlabeled[chosen]]), torch.cat([look.labels, classes])
        look.relabel(rows, labels)
        self.selected.copy_(torch.bincount(classes, minlength=len(self.selected)))
        self.adjustment.prior.copy_(self.labeled_counts + self.selected).div_(len(labels))
        if self.mean is not None:
            self.mean.reset()
        look.restart()

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """t_g, the exponent of the target distribution in this generation."""
        exponent = 1 - (1 - self.t_min) * ctx.stage / max(1, self.generations - 1)
        return torch.full((), exponent, device=batch.images.device)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Tensor) -> Out:
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        logits = self.adjustment.labeled(joint["labeled"]["weak"].logits["standard"])
        labeled = losses.labeled_loss(logits, labels["labeled"])
        aligned = p = losses.linear_pseudo_label(weak.logits["standard"])
        if self.mean is not None:
            aligned = align(p, target_distribution(self.labeled_counts, prepared), self.mean.read())
            self.mean.update(p)
        pseudo = losses.harden(aligned, self.tau)
        used = pseudo.mask.float()
        unlabeled = losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used)
        logs = {"loss/labeled": labeled.detach(), "loss/unlabeled": unlabeled.detach()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        return Out(labeled + unlabeled, logs, pseudo)

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.adjustment.predictions(logits)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {SELECTED.name: self.selected / self.selected.sum()}


def add_shares(labeled_counts: Sequence[int], alpha: float) -> list[float]:
    """rho: the share of the images predicted as each class that is added. (K) counts -> (K) in [0, 1]."""
    order = sorted(range(len(labeled_counts)), key=lambda k: -labeled_counts[k])
    mirrored = dict(zip(order, reversed(order), strict=True))
    most = labeled_counts[order[0]]
    return [(labeled_counts[mirrored[k]] / most) ** (1 / alpha) for k in range(len(labeled_counts))]


def select(probabilities: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The most confident images of each predicted class: of n_k predicted as class k, floor(n_k rho_k).

    Args:
        probabilities: (n, K). shares: rho, (K).

    Returns: their places in `probabilities`, ascending, and their classes, (m,) int64 each.
    """
    confidence, predicted = probabilities.max(1)
    surest = confidence.argsort(descending=True, stable=True)
    of_class = [surest[predicted[surest] == k] for k in range(len(shares))]
    places = torch.cat([mine[: int(len(mine) * share)] for mine, share in zip(of_class, shares, strict=True)])
    places = places.sort().values
    return places, predicted[places]


def target_distribution(labeled_counts: Tensor, exponent: Tensor) -> Tensor:
    """The labeled distribution to the power of t_g, normalized. (K,), 0-dim -> (K,)."""
    power = (labeled_counts / labeled_counts.sum()) ** exponent
    return power / power.sum()
