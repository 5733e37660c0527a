"""SeMi: "When Imbalanced Semi-Supervised Learning Meets Mining Hard Examples" (ACM MM 2025)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines.batch import Batch, Info
from semi_fast.memory_bank import MemoryBank, Rule
from semi_fast.methods.base import EPOCHS, Averaged, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import BALANCED_USED, CONFIDENCE, MIXING, USED, Figure
from semi_fast.parts.forward import Joint, Rows, forward_rows, linear_head, num_features
from semi_fast.parts.groups import ParamGroup
from semi_fast.parts.losses import PseudoLabels
from semi_fast.parts.priors import adjust_logits, class_prior
from semi_fast.parts.statistics import MovingAverage, RunningDistribution
from semi_fast.processes.gather import gather_candidates, sum_ranks, world_size

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]

HARDNESS = Figure("pseudo/hardness", "", "Mean hardness weight of the used pseudo-labels, 1 for the hardest.")
PRIOR = Figure("prior", "distribution", "The prior that the balanced head's pseudo-labels are adjusted by.")
BANK_FILL = Figure("bank/fill", "share", "Share of the memory bank's slots that hold an embedding.")
BANK_LEVELS = tuple(
    Figure(f"bank/confidence_q{level}", "share", f"Stored confidence, {level} % quantile.") for level in (10, 50, 90)
)


class Prepared(NamedTuple):
    """What depends on the progress of a run, as 0-dim tensors: a compiled step is the same graph at every step."""

    live: Tensor  # float32, 0 during warm-up, 1 behind it
    gamma: Tensor  # float32, alpha * epoch / epochs; 0 during warm-up
    draws: Tensor | None  # (n, 2) float32 in [0, 1): which class and which of its entries to take from the bank
    weak: Rows | None = None  # of the unlabeled images' weak views, where the averaged network gives them


class SeMi(Method):
    """L = L_S + L_U + lambda_EA L_EA + L_S^b + L_U^b (Eq. 12), with pseudo-labels from PLCE (sec. 3.3).

    Until ``warmup_epochs`` the standard branch trains as FixMatch (hardness weight 1, q' = q, no L_EA) while the bank
    and the running statistics fill; then everything is on. All statistics are read as they stood before the step.

    ``labeled_strength``, ``labeled_share``, ``joint_rate``, ``teacher`` and ``pseudo_labels`` are not of the
    paper. They are for short runs, and docs/fast.md says what they were measured to do.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive; of both heads.
        alpha: mixing weight of the semantic pseudo-label at the end of the run.
        warmup_epochs: of 500 notional epochs, whatever the number of steps.
        strong_views: V. *choice* (and *released*) 2; the equations of the paper have one.
        target: "hard": cross-entropy against argmax q' (*released*); "soft": against q' itself, as Eq. 9 prints it.
        mixing_class_weight: w_k of the mixing weight. "share": m~_k (*released*); "relative": m~_k / max m~, which
            does not shrink with the number of classes.
        hardness_scale: s; the easiest example weighs 1 - s.
        ea_weight, ea_temperature: lambda_EA and T_e. The weight is from the released code.
        prototype_temperature: T_p.
        bank_size, beta, decay_every: slots of a class in the bank, S; every ``decay_every`` steps the stored
            confidences are multiplied by beta.
        bank_samples: n > 0: the balanced head also learns from n class-balanced draws of stored embeddings a step, by
            plain cross-entropy of weight 1 (sec. 3.3: it "randomly samples from the memory bank"; no equation has it,
            and *released* does not use it).
        balance_strength: T_b, strength of the logit adjustment of the balanced head.
        prior: what the pseudo-labels of the balanced head are adjusted by: "joint", the running distribution of labels
            and valid pseudo-labels, or "labeled", the labeled frequencies throughout (*released*).
        balanced_target: "adjusted": the adjusted prediction of the standard head (*choice*, *released*); "mixed": the
            paper's Eq. 11: q' is the target, and the mask is that of the balanced head's own adjusted prediction.
        labeled_strength: strength of the logit adjustment in L_S^b; None: T_b.
        labeled_share: share of the run, its first stage, in which labeled images alone pass through the network, for
            L_S and L_S^b. The second stage is all of the method, warm-up included.
        joint_rate: factor on the learning rate of the stage of all of the method, be it the second or the only one.
        teacher: what sees the weak views of unlabeled images: the network in training ("live") or the averaged one.
        pseudo_labels: "own": each head has its own. "balanced": L_U, L_EA, the bank and m~ take the balanced head's.
        balanced_from: "start" trains the balanced head during warm-up too (*choice*, *released*); "after_warmup" is the
            paper's sentence.
        oheml, ea, plce, balanced_head, bank: the ablations of Table 5. oheml=False: every example weighs 1.
            ea=False: no L_EA. plce=False: q' = q, no bank. balanced_head=False: no second head, the standard head is
            reported. bank="fifo": a plain class-balanced queue instead of the confidence rule.
    """

    figures = (USED, CONFIDENCE, HARDNESS, MIXING, BALANCED_USED, PRIOR, BANK_FILL, *BANK_LEVELS)

    labeled_prior: Tensor  # pi_l, (K,) float32

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.7,
        alpha: Share = 0.4,
        warmup_epochs: Annotated[int, Field(ge=0, le=EPOCHS)] = 20,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        target: Literal["hard", "soft"] = "hard",
        mixing_class_weight: Literal["share", "relative"] = "share",
        hardness_scale: Share = 0.75,
        ea_weight: NotNegative = 0.15,
        ea_temperature: Positive = 0.09,
        prototype_temperature: Positive = 0.1,
        bank_size: Count = 128,
        beta: Annotated[float, Field(gt=0, le=1)] = 0.99,
        decay_every: Count = 100,
        bank_samples: Annotated[int, Field(ge=0)] = 0,
        balance_strength: NotNegative = 2.0,
        prior: Literal["joint", "labeled"] = "joint",
        balanced_target: Literal["adjusted", "mixed"] = "adjusted",
        labeled_strength: NotNegative | None = None,
        labeled_share: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        joint_rate: Positive = 1.0,
        teacher: Literal["live", "averaged"] = "live",
        pseudo_labels: Literal["own", "balanced"] = "own",
        balanced_from: Literal["start", "after_warmup"] = "start",
        oheml: bool = True,
        ea: bool = True,
        plce: bool = True,
        balanced_head: bool = True,
        bank: Rule = "confidence",
    ) -> None:
        super().__init__()
        if bank_samples and not (plce and balanced_head):
            raise UserError(
                f"method.bank_samples={bank_samples} needs plce=true, which keeps the bank, and balanced_head=true, "
                "which learns from it."
            )
        if pseudo_labels == "balanced" and (not balanced_head or target == "soft" or balanced_target == "mixed"):
            raise UserError(
                "method.pseudo_labels=balanced needs balanced_head=true, target=hard and balanced_target=adjusted, got "
                f"{balanced_head}, {target} and {balanced_target}. Leave it out, or them."
            )
        self.streams = two_streams(strong_views)
        self.tau, self.alpha, self.warmup_epochs = tau, alpha, warmup_epochs
        self.target, self.mixing_class_weight = target, mixing_class_weight
        self.hardness_scale = hardness_scale if oheml else 0.0
        self.ea_weight, self.ea_temperature = (ea_weight if ea else 0.0), ea_temperature
        self.prototype_temperature, self.balance_strength = prototype_temperature, balance_strength
        self.prior, self.balanced_target, self.balanced_from = prior, balanced_target, balanced_from
        self.bank_samples = bank_samples
        self.labeled_strength = balance_strength if labeled_strength is None else labeled_strength
        self.labeled_share, self.joint_rate = labeled_share, joint_rate
        self.teacher, self.pseudo_labels = teacher, pseudo_labels

        classes, features = info.num_classes, num_features(net)
        self.net = net
        standard = linear_head(net, classes)
        self.heads = nn.ModuleDict({"balanced": linear_head(net, classes)} if balanced_head else {})
        self.heads["standard"] = standard
        self.reported = next(iter(self.heads))
        memory = MemoryBank(classes, features, size=bank_size, beta=beta, decay_every=decay_every, rule=bank)
        self.bank = memory if plce else None
        self.used = RunningDistribution(classes)  # m~
        self.balanced_used = MovingAverage(classes, 0.999)  # h
        self.center = MovingAverage(features, 0.9)  # qbar
        self.register_buffer("labeled_prior", class_prior(info.labeled_counts))

    def starts(self) -> tuple[float, ...]:
        return (0.0, self.labeled_share) if self.labeled_share else (0.0,)

    def idle(self, stage: int) -> tuple[str, ...]:
        return () if self._is_joint(stage) else ("unlabeled",)

    def groups(self, stage: int) -> tuple[ParamGroup, ...]:
        return (ParamGroup("", self.joint_rate),) if self._is_joint(stage) and self.joint_rate != 1 else ()

    def _is_joint(self, stage: int) -> bool:
        return stage == len(self.starts()) - 1

    def inputs(self, batch: Batch, ctx: Context) -> Prepared | None:
        """What depends on the progress of the run, and the draws from the bank; None in the stage of labeled images."""
        if not self._is_joint(ctx.stage):
            return None
        live, device = ctx.epoch >= self.warmup_epochs, batch.images.device
        gamma = self.alpha * ctx.epoch / EPOCHS if live else 0.0
        draws = None
        if self.bank_samples:
            draws = torch.rand(self.bank_samples, 2, generator=ctx.generator, device=device)
        return Prepared(torch.full((), float(live), device=device), torch.full((), gamma, device=device), draws)

    def prepare(self, batch: Batch, inputs: Prepared | None, averaged: Averaged) -> tuple[Batch, Prepared | None]:
        if inputs is None:
            return batch.only(("labeled", "weak")), None
        if self.teacher == "live":
            return batch, inputs
        weak = averaged(batch.of("unlabeled", "weak"), of=features_and_logits)
        sizes = [num_features(self.net)] + [len(self.labeled_prior)] * len(self.heads)
        features, *logits = weak.split(sizes, dim=1)
        rows = Rows(features, dict(zip(self.heads, logits, strict=True)))
        return batch.only(("labeled", "weak"), ("unlabeled", "strong")), inputs._replace(weak=rows)

    def objective(
        self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared | None
    ) -> Out:
        labeled = joint["labeled"]["weak"]
        parts = {"labeled": losses.labeled_loss(labeled.logits["standard"], labels["labeled"])}
        heads = {}
        if "balanced" in self.heads:
            heads["balanced_labeled"] = self._balanced_labeled(labeled, labels["labeled"])
        if prepared is None:
            return _out(parts | heads, {}, None)
        weak, strong = prepared.weak or joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        pseudo, mixed, hardness, mixing = self._pseudo_labels(weak, strong, prepared)
        balanced = None
        if "balanced" in self.heads:
            balanced = self._balanced_pseudo_labels(weak, pseudo, len(labels["labeled"]))
        if self.pseudo_labels == "balanced" and balanced is not None:
            pseudo = balanced
        weight = pseudo.mask * hardness
        target = mixed if self.target == "soft" else pseudo.target
        parts["unlabeled"] = losses.unlabeled_loss(strong.logits["standard"], target, weight)
        teacher = losses.ea_teacher(weak.features.detach(), self.center.value, self.ea_temperature)
        if self.ea_weight > 0:
            ea = losses.ea_loss(teacher, strong.features, pseudo.mask, self.ea_temperature)
            parts["ea"] = prepared.live * self.ea_weight * ea
        if balanced is not None:
            soft = self.target == "soft" and self.balanced_target == "mixed"
            balanced_target = mixed if soft else balanced.target
            logits = strong.logits["balanced"]
            heads["balanced_unlabeled"] = losses.unlabeled_loss(logits, balanced_target, balanced.mask)
            if prepared.draws is not None:
                heads["bank"] = self._bank_loss(prepared.draws)
            if self.balanced_from == "after_warmup":
                heads = {name: prepared.live * part for name, part in heads.items()}
        logs = self._update(strong, pseudo, balanced, teacher, rows["unlabeled"], weight, mixing)
        return _out(parts | heads, logs, pseudo)

    @torch.no_grad()
    def _pseudo_labels(
        self, weak: Rows, strong: Rows, prepared: Prepared
    ) -> tuple[PseudoLabels, Tensor, Tensor, Tensor]:
        """Hard pseudo-labels of the standard head, q' (B, K), hardness weights and mixing weights, (B,) each."""
        linear = losses.linear_pseudo_label(weak.logits["standard"])
        if self.bank is None:
            mixed, mixing = linear, linear.new_zeros(linear.shape[0])
        else:
            prototypes, filled = self.bank.prototypes()
            first_view = strong.features[: linear.shape[0]]
            semantic = losses.semantic_pseudo_label(first_view, prototypes, filled, self.prototype_temperature)
            # Without a single prototype there is no second opinion to mix in.
            gamma = prepared.gamma * filled.any()
            share = self.used.read()
            class_weight = share / share.max() if self.mixing_class_weight == "relative" else share
            mixing = losses.mixing_weight(linear, class_weight, gamma)
            mixed = losses.mix_pseudo_labels(linear, semantic, mixing)
        hardness = losses.hardness_weight(mixed, self.hardness_scale)
        hardness = torch.lerp(torch.ones_like(hardness), hardness, prepared.live)
        return losses.harden(mixed, self.tau), mixed, hardness, mixing

    def _balanced_labeled(self, labeled: Rows, labels: Tensor) -> Tensor:
        """L_S^b."""
        adjusted = adjust_logits(labeled.logits["balanced"], self.labeled_prior, self.labeled_strength)
        return losses.labeled_loss(adjusted, labels)

    def _balanced_pseudo_labels(self, weak: Rows, pseudo: PseudoLabels, labeled_rows: int) -> PseudoLabels:
        """Those of the balanced head, given the standard head's."""
        prior = self._joint_prior(labeled_rows * world_size())
        standard, balanced = weak.logits["standard"], weak.logits["balanced"]
        if self.balanced_target == "mixed":
            return pseudo._replace(mask=losses.mixed_balanced_mask(balanced, prior, self.balance_strength, self.tau))
        return losses.balanced_pseudo_labels(standard, balanced, prior, self.balance_strength, self.tau)

    def _bank_loss(self, draws: Tensor) -> Tensor:
        """Cross-entropy of the balanced head on stored embeddings, of classes drawn alike; 0 while none is stored."""
        embeddings, classes, filled = self.bank.draw(draws)  # type: ignore[union-attr]
        loss = losses.labeled_loss(self.heads["balanced"](embeddings), classes)
        return torch.where(filled, loss, 0.0)

    def _joint_prior(self, labeled_rows: int) -> Tensor:
        """pi, (K,); pi_l under prior="labeled"."""
        if self.prior == "labeled":
            return self.labeled_prior
        return losses.joint_prior(self.labeled_prior, labeled_rows, self.balanced_used.value)

    @torch.no_grad()
    def _update(
        self,
        strong: Rows,
        pseudo: PseudoLabels,
        balanced: PseudoLabels | None,
        teacher: Tensor,
        rows: Tensor,
        weight: Tensor,
        mixing: Tensor,
    ) -> dict[str, Tensor]:
        """Take the step into bank and running statistics; every rank takes in the rows of all ranks.

        Returns: its figures; the mean hardness weight is that of all ranks, and 0 where no pseudo-label is used.
        """
        classes = self.labeled_prior.shape[0]
        heads = [pseudo] if balanced is None else [pseudo, balanced]
        facts = torch.stack([*(labels.mask for labels in heads), pseudo.confidence, mixing])  # a row each, float32
        masks = facts[: len(heads)]
        targets = torch.stack([labels.target for labels in heads])
        counts = masks.new_zeros(len(heads), classes).scatter_add_(1, targets, masks)
        summed = sum_ranks(torch.cat([counts.flatten(), teacher.mean(0), weight.sum().unsqueeze(0)]))
        used, *rest, hardness = summed.split([classes] * len(heads) + [teacher.shape[1], 1])
        self.used.update(used.long())
        self.center.update(rest.pop() / world_size())
        if rest:
            self.balanced_used.update(rest.pop())
        if self.bank is not None:
            self.bank.push(*gather_candidates(strong.features, *pseudo, rows))
        names = [*(USED.name, BALANCED_USED.name)[: len(heads)], CONFIDENCE.name, MIXING.name]
        logs = dict(zip(names, facts.mean(1), strict=True))
        return logs | {HARDNESS.name: hardness[0] / used.sum().clamp_min(1.0)}

    @torch.no_grad()
    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        """The prior the balanced head's pseudo-labels are adjusted by, and how full and how confident the bank is."""
        values = {}
        if "balanced" in self.heads:
            values[PRIOR.name] = self._joint_prior(labeled_rows)
        if self.bank is not None:
            stored = self.bank.rows >= 0
            values[BANK_FILL.name] = stored.float().mean()
            confidences = torch.where(stored, self.bank.confidences, math.nan).flatten()
            levels = torch.nanquantile(confidences, confidences.new_tensor([0.1, 0.5, 0.9]))
            values |= {figure.name: level for figure, level in zip(BANK_LEVELS, levels, strict=True)}
        return values


def features_and_logits(method: Method, images: Tensor) -> Tensor:
    """Features (n, d) of images and every head's logits (n, K) beside them, (n, d + heads * K) float32."""
    rows = forward_rows(method.net, method.heads, images)
    return torch.cat([rows.features, *rows.logits.values()], 1)


def _out(parts: dict[str, Tensor], logs: dict[str, Tensor], pseudo: PseudoLabels | None) -> Out:
    losses_by_name = {f"loss/{name}": part.detach() for name, part in parts.items()}
    return Out(torch.stack(list(parts.values())).sum(), losses_by_name | logs, pseudo)
