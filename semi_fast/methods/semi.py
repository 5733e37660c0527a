"""SeMi: "When Imbalanced Semi-Supervised Learning Meets Mining Hard Examples" (ACM MM 2025)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Info
from semi_fast.memory_bank import MemoryBank, Rule
from semi_fast.methods.base import (
    EPOCHS,
    Context,
    Joint,
    Method,
    Out,
    forward_rows,
    linear_head,
    num_features,
    view_names,
)
from semi_fast.parts import losses
from semi_fast.parts.figures import Figure
from semi_fast.parts.losses import PseudoLabels
from semi_fast.parts.statistics import MovingAverage, RunningDistribution, class_counts
from semi_fast.processes.gather import gather_candidates, sum_ranks, world_size

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Schedule(NamedTuple):
    """What depends on the progress of a run, as 0-dim tensors: a compiled step is the same graph at every step."""

    live: Tensor  # bool, False during warm-up
    gamma: Tensor  # float32, alpha * epoch / epochs; 0 during warm-up


class SeMi(Method):
    """L = L_S + L_U + lambda_EA L_EA + L_S^b + L_U^b (Eq. 12), with pseudo-labels from PLCE (sec. 3.3).

    Until ``warmup_epochs`` the standard branch trains as FixMatch (hardness weight 1, q' = q, no L_EA) while the bank
    and the running statistics fill; then everything is on. All statistics are read as they stood before the step.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive; of both heads.
        alpha: mixing weight of the semantic pseudo-label at the end of the run.
        warmup_epochs: of 500 notional epochs, whatever the number of steps.
        strong_views: V. *choice* (and *released*) 2; the equations of the paper have one.
        hardness_scale: s; the easiest example weighs 1 - s.
        ea_weight, ea_temperature: lambda_EA and T_e. The weight is from the released code.
        prototype_temperature: T_p.
        bank_size, beta, decay_every: slots of a class in the bank, S; every ``decay_every`` steps the stored
            confidences are multiplied by beta.
        balance_strength: T_b, strength of the logit adjustment of the balanced head.
        prior: what the pseudo-labels of the balanced head are adjusted by: "joint", the running distribution of labels
            and valid pseudo-labels, or "labeled", the labeled frequencies throughout (*released*).
        balanced_target: "adjusted": the adjusted prediction of the standard head (*choice*, *released*); "mixed": the
            paper's Eq. 11: t = argmax q' with its own mask M is the target, and z~ itself is adjusted by the prior.
        balanced_from: "start" trains the balanced head during warm-up too (*choice*, *released*); "after_warmup" is the
            paper's sentence.
        oheml, ea, plce, balanced_head, bank: the ablations of Table 5. oheml=False: every example weighs 1.
            ea=False: no L_EA. plce=False: q' = q, no bank. balanced_head=False: no second head, the standard head is
            reported. bank="fifo": a plain class-balanced queue instead of the confidence rule.
    """

    labeled_prior: Tensor  # pi_l, (K,) float32

    figures = (
        Figure("pseudo/used", "share", "Share of the unlabeled images whose pseudo-label is used."),
        Figure("pseudo/confidence", "share", "Mean confidence of the pseudo-labels, used or not."),
        Figure("pseudo/mixing", "share", "Mean weight of the semantic pseudo-label."),
        Figure("bank/fill", "share", "Share of the bank's slots that are in use."),
        Figure("prior", "distribution", "What the logits are adjusted by."),
    )

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.7,
        alpha: Share = 0.4,
        warmup_epochs: Annotated[int, Field(ge=0, le=EPOCHS)] = 20,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        hardness_scale: Share = 0.75,
        ea_weight: NotNegative = 0.15,
        ea_temperature: Positive = 0.09,
        prototype_temperature: Positive = 0.1,
        bank_size: Count = 128,
        beta: Annotated[float, Field(gt=0, le=1)] = 0.99,
        decay_every: Count = 100,
        balance_strength: NotNegative = 2.0,
        prior: Literal["joint", "labeled"] = "joint",
        balanced_target: Literal["adjusted", "mixed"] = "adjusted",
        balanced_from: Literal["start", "after_warmup"] = "start",
        oheml: bool = True,
        ea: bool = True,
        plce: bool = True,
        balanced_head: bool = True,
        bank: Rule = "confidence",
    ) -> None:
        super().__init__()
        self.views = view_names(strong_views)
        self.tau, self.alpha, self.warmup_epochs = tau, alpha, warmup_epochs
        self.hardness_scale = hardness_scale if oheml else 0.0
        self.ea_weight, self.ea_temperature = (ea_weight if ea else 0.0), ea_temperature
        self.prototype_temperature, self.balance_strength = prototype_temperature, balance_strength
        self.prior, self.balanced_target, self.balanced_from = prior, balanced_target, balanced_from

        classes, features = info.num_classes, num_features(net)
        self.net = net
        self.head = linear_head(net, classes)
        self.balanced_head = linear_head(net, classes) if balanced_head else None
        made = MemoryBank(classes, features, size=bank_size, beta=beta, decay_every=decay_every, rule=bank)
        self.bank = made if plce else None
        self.used = RunningDistribution(classes)  # m~
        self.balanced_used = MovingAverage(classes, 0.999)  # h
        self.center = MovingAverage(features, 0.9)  # qbar
        counts = torch.tensor(info.labeled_counts, dtype=torch.float64)
        self.register_buffer("labeled_prior", (counts / counts.sum()).float())

    def predict_heads(self, x: Tensor) -> dict[str, Tensor]:
        logits = forward_rows(self.net, self.heads(), x).logits
        return {"standard": logits[0]} if self.balanced_head is None else {"balanced": logits[1], "standard": logits[0]}

    def heads(self) -> list[nn.Module]:
        return [self.head] if self.balanced_head is None else [self.head, self.balanced_head]

    def schedule(self, ctx: Context, device: torch.device) -> Schedule:
        """The schedule at a point of the run."""
        live = ctx.epoch >= self.warmup_epochs
        gamma = self.alpha * ctx.epoch / EPOCHS if live else 0.0
        return Schedule(torch.full((), live, device=device), torch.full((), gamma, device=device))

    def objective(self, joint: Joint, labels: Tensor, rows: Tensor, schedule: Schedule) -> Out:
        pseudo, hardness, mixing = self._pseudo_labels(joint, schedule)
        weight = pseudo.mask.float() * hardness
        parts = {
            "labeled": losses.labeled_loss(joint.labeled.logits[0], labels),
            "unlabeled": losses.unlabeled_loss(joint.strong.logits[0], pseudo.target, weight),
        }
        teacher = losses.ea_teacher(joint.weak.features.detach(), self.center.read(), self.ea_temperature)
        if self.ea_weight > 0:
            ea = losses.ea_loss(teacher, joint.strong.features, pseudo.mask, self.ea_temperature)
            parts["ea"] = self.ea_weight * torch.where(schedule.live, ea, 0.0)
        balanced = None
        if self.balanced_head is not None:
            balanced_parts, balanced = self._balanced(joint, labels, pseudo)
            on = schedule.live if self.balanced_from == "after_warmup" else torch.ones_like(schedule.live)
            parts |= {name: torch.where(on, part, 0.0) for name, part in balanced_parts.items()}
        mean_hardness = self._update(joint, pseudo, balanced, teacher, rows, weight)
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()}
        logs |= self._logs(pseudo, mean_hardness, mixing, balanced)
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    @torch.no_grad()
    def _pseudo_labels(self, joint: Joint, schedule: Schedule) -> tuple[PseudoLabels, Tensor, Tensor]:
        """Pseudo-labels of the standard head from q', their hardness weights and mixing weights, (B_u,) each."""
        mixed = linear = losses.linear_pseudo_label(joint.weak.logits[0])
        mixing = linear.new_zeros(linear.shape[0])
        if self.bank is not None:
            prototypes, filled = self.bank.prototypes()
            first_view = joint.strong.features[: linear.shape[0]]
            semantic = losses.semantic_pseudo_label(first_view, prototypes, filled, self.prototype_temperature)
            # Without a single prototype there is no second opinion to mix in.
            gamma = torch.where(filled.any(), schedule.gamma, 0.0)
            mixing = losses.mixing_weight(linear, self.used.read(), gamma)
            mixed = losses.mix_pseudo_labels(linear, semantic, mixing)
        hardness = torch.where(schedule.live, losses.hardness_weight(mixed, self.hardness_scale), 1.0)
        return losses.harden(mixed, self.tau), hardness, mixing

    def _balanced(self, joint: Joint, labels: Tensor, pseudo: PseudoLabels) -> tuple[dict[str, Tensor], PseudoLabels]:
        """L_S^b and L_U^b, and the pseudo-labels of the balanced head."""
        strength, prior = self.balance_strength, self.labeled_prior
        labeled = losses.labeled_loss(losses.adjust_logits(joint.labeled.logits[1], prior, strength), labels)
        prior = self._joint_prior(labels.shape[0] * world_size())
        strong_logits = joint.strong.logits[1]
        if self.balanced_target == "mixed":
            balanced = pseudo
            strong_logits = losses.adjust_logits(strong_logits, prior, strength)
        else:
            weak = joint.weak.logits
            balanced = losses.balanced_pseudo_labels(weak[0], weak[1], prior, strength, self.tau)
        unlabeled = losses.unlabeled_loss(strong_logits, balanced.target, balanced.mask.float())
        return {"balanced_labeled": labeled, "balanced_unlabeled": unlabeled}, balanced

    def _joint_prior(self, labeled_rows: int) -> Tensor:
        """pi, (K,); pi_l under prior="labeled"."""
        if self.prior == "labeled":
            return self.labeled_prior
        return losses.joint_prior(self.labeled_prior, labeled_rows, self.balanced_used.read())

    @torch.no_grad()
    def _update(
        self,
        joint: Joint,
        pseudo: PseudoLabels,
        balanced: PseudoLabels | None,
        teacher: Tensor,
        rows: Tensor,
        weight: Tensor,
    ) -> Tensor:
        """Take the step into bank and running statistics; every rank takes in the rows of all ranks.

        Returns: the mean hardness weight of the used pseudo-labels of all ranks, 0-dim; 0 where none is used.
        """
        classes = self.labeled_prior.shape[0]
        counts = [class_counts(p.target, p.mask, classes) for p in (pseudo, balanced) if p is not None]
        summed = sum_ranks(torch.cat([*(c.float() for c in counts), teacher.mean(0), weight.sum().unsqueeze(0)]))
        used, *rest, hardness = summed.split([classes] * len(counts) + [teacher.shape[1], 1])
        self.used.update(used.long())
        self.center.update(rest.pop() / world_size())
        if rest:
            self.balanced_used.update(rest.pop())
        if self.bank is not None:
            offered = gather_candidates(joint.strong.features, *pseudo, rows)
            with self.timed("bank"):
                self.bank.push(*offered)
        return hardness[0] / used.sum().clamp_min(1.0)

    @torch.no_grad()
    def _logs(
        self, pseudo: PseudoLabels, hardness: Tensor, mixing: Tensor, balanced: PseudoLabels | None
    ) -> dict[str, Tensor]:
        logs = {
            "pseudo/used": pseudo.mask.float().mean(),
            "pseudo/confidence": pseudo.confidence.mean(),
            "pseudo/hardness": hardness,
            "pseudo/mixing": mixing.mean(),
        }
        if balanced is not None:
            logs["pseudo/balanced_used"] = balanced.mask.float().mean()
        return logs

    @torch.no_grad()
    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        """The prior the balanced head's pseudo-labels are adjusted by, and how full and how confident the bank is."""
        found = {}
        if self.balanced_head is not None:
            found["prior"] = self._joint_prior(labeled_rows)
        if self.bank is not None:
            stored = self.bank.rows >= 0
            found["bank/fill"] = stored.float().mean()
            confidences = torch.where(stored, self.bank.confidences, math.nan).flatten()
            levels = torch.nanquantile(confidences, confidences.new_tensor([0.1, 0.5, 0.9]))
            found |= {f"bank/confidence_q{name}": level for name, level in zip((10, 50, 90), levels, strict=True)}
        return found
