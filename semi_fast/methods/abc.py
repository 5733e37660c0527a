"""ABC (Lee, Shin and Kim, NeurIPS 2021): a second classifier, trained on images drawn as if classes were balanced."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.memory_bank import MemoryBank
from semi_fast.methods.base import EPOCHS, Averaged, Context, Method, Out, two_streams
from semi_fast.parts import blending, losses
from semi_fast.parts.blending import BLENDED, Blending
from semi_fast.parts.figures import BALANCED_USED, CONFIDENCE, MIXING, USED
from semi_fast.parts.forward import Joint, linear_head, num_features
from semi_fast.processes.gather import share_of_rank, world_size


class Prepared(NamedTuple):
    """What a step draws, and how far the run is."""

    labeled: Tensor  # (B,) float32 in [0, 1)
    unlabeled: Tensor  # (mu B,) float32 in [0, 1)
    progress: Tensor  # 0-dim float32, e / E
    blending: blending.Inputs | None
    features: Tensor | None = None  # (B, d) float32, of the labeled weak views, by the averaged network


class ABC(Method):
    """L = L_S + L_U + L_S^b + L_U^b: FixMatch, and an auxiliary balanced head on the same features.

    The balanced head learns from labeled images of class k with probability r_k = N_min / N_k, and from unlabeled ones
    with a probability that falls from 1 to r_k. *released* (LeeHyuck/ABC): r_k takes the last class for the smallest.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive; of both heads.
        strong_views: V (*released* 2; ytaek-oh/daso, whose runs the tables quote, 1).
        refine: "daso": the pseudo-labels of both heads are blended with the same semantic one, by the distribution of
            the standard head's (the row "FixMatch + ABC w/ DASO"); see ``semi_fast.methods.daso``.
        distribution_temperature: T_d of refine="daso".
    """

    figures = (USED, CONFIDENCE, BALANCED_USED, MIXING, BLENDED)

    rates: Tensor  # r, (K,) float32 in (0, 1]; follows from the data, so it is not saved

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        refine: Literal["none", "daso"] = "none",
        distribution_temperature: Annotated[float, Field(gt=0)] = 0.3,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.strong_views = tau, strong_views
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("balanced", "standard")})
        self.reported = "balanced"
        self.blending = None
        if refine == "daso":
            bank = MemoryBank(info.num_classes, num_features(net), size=blending.BANK_SIZE, beta=1.0, rule="fifo")
            self.blending = Blending(bank, distribution_temperature)
        counts = torch.tensor(info.labeled_counts).clamp_min(1)
        self.register_buffer("rates", counts.min() / counts, persistent=False)

    def inputs(self, batch: Batch, ctx: Context) -> Prepared:
        """A number in [0, 1) for each image of the step; the same whatever the number of processes."""
        device = batch.images.device
        labeled, unlabeled = (
            share_of_rank(torch.rand(len(batch.rows[name]) * world_size(), generator=ctx.generator, device=device))
            for name in ("labeled", "unlabeled")
        )
        schedule = None if self.blending is None else self.blending.inputs(ctx.step, ctx.epoch, device)
        return Prepared(labeled, unlabeled, torch.full((), ctx.epoch / EPOCHS, device=device), schedule)

    def prepare(self, batch: Batch, inputs: Prepared, averaged: Averaged) -> tuple[Batch, Prepared]:
        if self.blending is None:
            return batch, inputs
        return batch, inputs._replace(features=averaged(batch.of("labeled", "weak")))

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared) -> Out:
        labeled, target = joint["labeled"]["weak"].logits, labels["labeled"]
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        soft = {name: losses.linear_pseudo_label(logits) for name, logits in weak.logits.items()}  # p and p^b
        parts, logs = {}, {}
        if self.blending is not None and prepared.blending is not None and prepared.features is not None:
            self.blending.learn(prepared.features, target, rows["labeled"])
            semantic, parts["align"] = self.blending.semantic(weak, strong, prepared.blending)
            blended = {name: self.blending.blend(p, semantic, prepared.blending) for name, p in soft.items()}
            soft = {name: p for name, (p, _) in blended.items()}
            self.blending.update(soft["standard"].argmax(-1), prepared.blending)
            logs[MIXING.name] = blended["standard"][1].mean()
        pseudo, balanced = (losses.harden(soft[name], self.tau) for name in ("standard", "balanced"))
        used = pseudo.mask.float()
        drawn = prepared.labeled < self.rates[target]  # beta
        rate = 1.0 - prepared.progress * (1.0 - self.rates)  # a(e)
        balanced_used = (balanced.mask & (prepared.unlabeled < rate[balanced.target])).float()  # m beta^u
        consistency = losses.unlabeled_loss(strong.logits["balanced"], soft["balanced"], balanced_used)
        parts |= {
            "labeled": losses.labeled_loss(labeled["standard"], target),
            "unlabeled": losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used),
            "balanced_labeled": losses.unlabeled_loss(labeled["balanced"], target, drawn.float()),
            "balanced_unlabeled": self.strong_views * consistency,  # a sum over the strong views
        }
        logs |= {f"loss/{name}": part.detach() for name, part in parts.items()}
        logs |= {
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
            BALANCED_USED.name: balanced_used.mean(),
        }
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return self.blending.statistics() if self.blending is not None else {}
