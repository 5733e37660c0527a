"""DARP (Kim et al., NeurIPS 2020): the pseudo-labels of all unlabeled images together take assumed class counts."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Context, Look, Method, Out, two_streams
from semi_fast.parts import darp_solver, losses
from semi_fast.parts.adjustment import Form, LogitAdjustment
from semi_fast.parts.estimation import CountEstimate
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.holdout import held_out_counts, hold_out, require_two
from semi_fast.parts.row_table import RowTable

COUNTS = Figure("darp/counts", "distribution", "Class distribution that the refined pseudo-labels of all images take.")
CHANGED = Figure("darp/changed", "share", "Share of the pseudo-labels whose class the refinement changes.")
HELD_OUT = 10  # labeled images of a class that the estimate is measured on, at most


class Darp(Method):
    """FixMatch whose pseudo-labels come from the refined table of all of them (Algorithm 1; `parts.darp_solver`).

    The table takes in the raw predictions of every step; from `warmup_epochs` on it is refined every `refresh_every`
    steps, before the step; until it has been, the raw predictions are used. *released* (bbuing9/DARP): a step that
    refines has written its own predictions before; here they count from the next refinement on.

    `counts_from="estimate"` begins the run with a stage of supervised training on the labeled images but for those held
    out, 10 of a class or half of it; at each evaluation the counts are estimated (`parts.estimation`) and averaged, and
    then all is trained anew. *released*: a run of its own beforehand, of 40,000 steps, with the raw network.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes, labeled counts, unlabeled images.
        counts_from: class distribution of the unlabeled images: "labeled", the labeled one; "given" by `counts`; or
            "estimate".
        counts: (K) unlabeled images of each class, or numbers in their proportion.
        estimate_share: share of the run that the stage of estimation takes.
        alpha: times its count that the images of a class which are kept before the projection number.
        warmup_epochs: notional epochs of 500 without refinement.
        refresh_every: steps between two refinements (CIFAR-10-LT 10; CIFAR-100-LT and STL-10-LT 100).
        sweeps: passes over the table of a refinement, which goes on from the one before: a Newton step each but one.
        tau, strong_views, logit_adjustment, adjustment_strength: FixMatch's.
    """

    figures = (USED, CONFIDENCE, CHANGED, COUNTS)
    counts: Tensor  # c, (K,) float32, sums to the number of unlabeled images
    cleaned: Tensor  # A transposed, (K, m) float32, of the newest refinement
    multipliers: Tensor  # nu, (K,) float32
    length: Tensor  # 0-dim float32, of the newest refinement's steps
    refreshes: Tensor  # 0-dim int64, refinements so far
    seed: Tensor  # 0-dim int64, decides the held-out images

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        counts_from: Literal["labeled", "given", "estimate"] = "labeled",
        counts: list[Annotated[float, Field(gt=0)]] | None = None,
        estimate_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        alpha: Annotated[float, Field(gt=0)] = 2.0,
        warmup_epochs: Annotated[int, Field(ge=0, le=EPOCHS)] = 200,
        refresh_every: Annotated[int, Field(ge=1)] = 10,
        sweeps: Annotated[int, Field(ge=2)] = 5,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        logit_adjustment: Form = "off",
        adjustment_strength: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        classes, images = info.num_classes, info.num_unlabeled
        if (counts_from == "given") != (counts is not None) or (counts is not None and len(counts) != classes):
            got = "none" if counts is None else f"{len(counts)} numbers"
            raise UserError(
                f"method.counts must be {classes} numbers, one a class, with method.counts_from=given and none without "
                f"it, got {got} with method.counts_from={counts_from}."
            )
        if counts_from == "estimate":
            require_two(info.labeled_counts, info.class_names, "method.counts_from=estimate")
        self.streams = two_streams(strong_views)
        self.estimate_share = estimate_share if counts_from == "estimate" else 0.0
        self.alpha, self.warmup_epochs, self.tau = alpha, warmup_epochs, tau
        self.refresh_every, self.sweeps = refresh_every, sweeps
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, classes)})
        self.adjustment = LogitAdjustment(info.labeled_counts, logit_adjustment, adjustment_strength)
        self.reported = self.adjustment.reported("standard")
        self.table = RowTable(info.num_train, images, classes, fill=1 / classes)
        self.estimate = CountEstimate(classes) if self.estimate_share else None
        self.relabels = self.estimate is not None
        weights = torch.tensor(info.labeled_counts if counts is None else counts, dtype=torch.float64)
        self.register_buffer("counts", (images * weights / weights.sum()).float())
        self.register_buffer("cleaned", torch.full((classes, images), 1 / classes))
        self.register_buffer("multipliers", torch.zeros(classes))
        self.register_buffer("length", torch.ones(()))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64))
        self.held_out = held_out_counts(info.labeled_counts, HELD_OUT)
        # Drawn from what the run's seed has seeded, so that it follows from that seed.
        self.register_buffer("seed", torch.randint(2**31, ()))

    def starts(self) -> tuple[float, ...]:
        return (0.0, self.estimate_share) if self.estimate else (0.0,)

    def begin(self, stage: int, look: Look) -> None:
        if stage == 0:
            self.table.hold(look.unlabeled)
        if self.estimate is None:
            return
        if stage == 0:
            _, rest = hold_out(look.labels, self.held_out, int(self.seed))
            look.relabel(look.labeled[rest], look.labels[rest])
            return
        if self.estimate.read() is None:  # no evaluation yet, or none that was to be trusted
            self._measure(look)
        share = self.estimate.read()
        if share is None:
            raise UserError(
                "No estimate of the unlabeled class counts was to be trusted: the classes are confused too much. Raise "
                "method.estimate_share or name the counts by method.counts_from=given method.counts."
            )
        self.counts.copy_(share * len(look.unlabeled))
        self.table.values.fill_(1 / len(self.counts))
        look.relabel(look.labeled, look.labels)
        look.restart()

    def measured(self, ctx: Context, look: Look) -> None:
        if self.estimating(ctx):
            self._measure(look)

    def _measure(self, look: Look) -> None:
        """Estimate the counts by the averaged network as it stands."""
        held_out, _ = hold_out(look.labels, self.held_out, int(self.seed))
        measured, unlabeled = (look.logits(rows)["standard"] for rows in (look.labeled[held_out], look.unlabeled))
        self.estimate.take(measured, look.labels[held_out].to(measured.device), unlabeled)  # type: ignore[union-attr]

    def estimating(self, ctx: Context) -> bool:
        """Whether a step is of the stage of estimation."""
        return self.estimate is not None and ctx.stage == 0

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """Refine where that is due; the weight of the unlabeled loss, which the stage of estimation has not."""
        estimating = self.estimating(ctx)
        if not estimating and ctx.epoch >= self.warmup_epochs and ctx.step % self.refresh_every == 0:
            self.refresh()
        return torch.full((), float(not estimating), device=batch.images.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Refine the table as it stands: clean it, freeze that, and find the multipliers that give the counts."""
        self.cleaned.copy_(darp_solver.clean(self.table.values, self.counts, self.alpha).t())
        multipliers, length = darp_solver.solve(
            self.cleaned.t(), self.counts, self.multipliers, self.length, self.sweeps
        )
        self.multipliers.copy_(multipliers)
        self.length.copy_(length)
        self.refreshes += 1

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Tensor) -> Out:
        weak, strong, images = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"], rows["unlabeled"]
        logits = self.adjustment.labeled(joint["labeled"]["weak"].logits["standard"])
        labeled = losses.labeled_loss(logits, labels["labeled"])
        p = losses.linear_pseudo_label(self.adjustment.pseudo(weak.logits["standard"]))
        refined = darp_solver.refined(self.cleaned[:, self.table.places[images]].t(), self.multipliers)
        refined = torch.where(self.refreshes > 0, refined, p)
        self.table.write(images, p)
        pseudo = losses.harden(refined, self.tau)
        used = pseudo.mask.float()
        unlabeled = prepared * losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used)
        logs = {"loss/labeled": labeled.detach(), "loss/unlabeled": unlabeled.detach()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        logs[CHANGED.name] = (p.argmax(1) != pseudo.target).float().mean()
        return Out(labeled + unlabeled, logs, pseudo)

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.adjustment.predictions(logits)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {COUNTS.name: self.counts / self.counts.sum()}
