"""CCL (NeurIPS 2024): two heads with one label, a prior estimated from reliable images, and two contrastive losses."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info, Stream
from semi_fast.methods.base import EPOCHS, Context, Look, Method, Out, begins_part
from semi_fast.parts import losses
from semi_fast.parts.alignment import sharpen
from semi_fast.parts.contrast import Projection, class_scores, propagate
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head, num_features
from semi_fast.parts.priors import adjust_logits, class_prior
from semi_fast.parts.statistics import one_hot
from semi_fast.processes.gather import sum_ranks

RELIABLE = Figure("ccl/reliable", "share", "Share of the unlabeled images whose energy is low enough to trust them.")
UNLABELED = Figure("ccl/unlabeled", "distribution", "Estimated class distribution of the unlabeled images.")
PSEUDO = Figure("ccl/pseudo", "distribution", "Class distribution of the pseudo-labels used.")
POWER = 4.0  # of the sharpening
LEAST_WEIGHT = 1.5  # of the unlabeled losses

Share = Annotated[float, Field(ge=0, lt=1)]


class CCL(Method):
    """L = l_1 L_cls + l_2 C_1 + (1 - l_1) C_2; the equations follow the released code (zhouzihao11/CCL).

    z_co = (z_w - ln((1 - p) pi_l + p r) + (1 + s / 2) ln u) / 2 + z^b_w / 2 with p = mu / (1 + mu); q = softmax(z_co)
    makes one hard pseudo-label for both heads. r is the class distribution of the pseudo-labels used, u that of the
    unlabeled images, counted over reliable ones alone: those whose energy -logsumexp(z_co) is `energy` at most.

    C_1: each unlabeled view gets class scores by its similarity to class centers and labeled strong views, propagated
    over the batch (`parts.contrast`); both strong views follow the sharpened ones of the weak view, and each other.
    C_2: class scores of labeled and reliable unlabeled strong views by each other.

    *choice*: r and u start uniform; their counts begin anew, from 1 a class, in every part of the run. *choice*: all
    projections of a step are normalized together; of several processes each compares its own images.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive.
        strength: s, of the logit adjustment.
        energy: the most that a reliable image may have.
        class_weight, neighbor_weight: l_1 and l_2.
        temperature: of similarities.
        propagation: alpha, how much the neighbors of an image count.
        centers: what a class center is a key of: "own", its class; "ones" (*released*), every class.
        estimate_decay, pseudo_decay: of u and of r. *released* on CIFAR-10-LT: 0.5, 0.9; 0.999, 0.999 reversed.
        estimate_from: notional epoch of 500 behind which they are refreshed (*released*: 20; 5 reversed).
        refreshes: equal parts of the run, at whose ends they are (*released*: 500 of 250,000 steps; 2,500 reversed).
    """

    figures = (USED, CONFIDENCE, RELIABLE, UNLABELED, PSEUDO)
    prior: Tensor  # pi_l, (K,) float32; follows from the data, so it is not saved
    decays: Tensor  # of u and r, (2, 1) float32; follows from the options, so it is not saved
    is_labeled: Tensor  # (num_train,) float32, 1 for labeled rows, which may be among the unlabeled ones
    distributions: Tensor  # u and r, (2, K) float32
    counts: Tensor  # of the part of the run so far, for both, (2, K) float32

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strength: Annotated[float, Field(ge=0)] = 2.0,
        energy: float = -8.75,
        class_weight: Annotated[float, Field(ge=0, le=1)] = 0.7,
        neighbor_weight: Annotated[float, Field(ge=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        propagation: Share = 0.2,
        centers: Literal["own", "ones"] = "own",
        estimate_decay: Share = 0.5,
        pseudo_decay: Share = 0.9,
        estimate_from: Annotated[int, Field(ge=0, le=EPOCHS)] = 20,
        refreshes: Annotated[int, Field(ge=1)] = 500,
    ) -> None:
        super().__init__()
        views = ("weak", "strong", "strong")
        self.streams = {"labeled": Stream("labeled", views), "unlabeled": Stream("unlabeled", views)}
        self.tau, self.strength, self.energy, self.temperature = tau, strength, energy, temperature
        self.class_weight, self.neighbor_weight, self.propagation = class_weight, neighbor_weight, propagation
        self.estimate_from, self.refreshes, self.centers_of_all = estimate_from, refreshes, centers == "ones"
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("balanced", "standard")})
        self.reported = "balanced"
        self.projection, self.centers = (Projection(num_features(net)) for _ in range(2))
        self.register_buffer("prior", class_prior(info.labeled_counts), persistent=False)
        self.register_buffer("decays", torch.tensor([[estimate_decay], [pseudo_decay]]), persistent=False)
        self.register_buffer("is_labeled", torch.zeros(info.num_train))
        self.register_buffer("distributions", torch.full((2, info.num_classes), 1 / info.num_classes))
        self.register_buffer("counts", torch.ones(2, info.num_classes))

    def begin(self, stage: int, look: Look) -> None:
        self.is_labeled[look.labeled.to(self.is_labeled.device)] = 1.0

    def inputs(self, batch: Batch, ctx: Context) -> None:
        """Refresh u and r with the first step of each part of the run."""
        if begins_part(ctx, self.refreshes):
            if ctx.epoch > self.estimate_from:
                shares = self.counts / self.counts.sum(1, keepdim=True)
                self.distributions.copy_(self.decays * self.distributions + (1 - self.decays) * shares)
            self.counts.fill_(1.0)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: None) -> Out:
        labeled, target = joint["labeled"]["weak"].logits, labels["labeled"]
        weak, strong = joint["unlabeled"]["weak"].logits, joint["unlabeled"]["strong"].logits
        mu = rows["unlabeled"].shape[0] / target.shape[0]
        combined = self._combined(weak, mu)
        q = losses.linear_pseudo_label(combined)
        pseudo, reliable = losses.harden(q, self.tau), (-combined.logsumexp(-1) <= self.energy).float()
        used, ratio, (_, r) = pseudo.mask.float(), max(LEAST_WEIGHT, mu), self.distributions
        adjusted = [adjust_logits(labeled["balanced"], self.prior, self.strength)]
        adjusted.append(adjust_logits(strong["balanced"], r, self.strength))
        neighbors, contrast = self._contrast(joint, one_hot(target, len(self.prior)), q, reliable)
        weight = self.class_weight
        parts = {
            "labeled": weight * losses.labeled_loss(labeled["standard"], target),
            "unlabeled": weight * ratio * losses.unlabeled_loss(strong["standard"], pseudo.target, used),
            "balanced_labeled": weight * losses.labeled_loss(adjusted[0], target),
            "balanced_unlabeled": weight * ratio * losses.unlabeled_loss(adjusted[1], pseudo.target, used),
            "neighbors": self.neighbor_weight * neighbors,
            "contrast": (1 - weight) * contrast,
        }
        self._count(q, reliable * (1 - self.is_labeled[rows["unlabeled"]]), used)
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean(), RELIABLE.name: reliable.mean()}
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    @torch.no_grad()
    def _combined(self, weak: dict[str, Tensor], mu: float) -> Tensor:
        """z_co of both heads' weak logits: (mu B, K)."""
        unlabeled, pseudo = self.distributions
        share = mu / (1 + mu)
        standard = adjust_logits(weak["standard"], (1 - share) * self.prior + share * pseudo, -1.0)
        return 0.5 * adjust_logits(standard, unlabeled, 1 + self.strength / 2) + 0.5 * weak["balanced"]

    def _contrast(self, joint: Joint, given: Tensor, q: Tensor, reliable: Tensor) -> tuple[Tensor, Tensor]:
        """C_1 and C_2, scalars.

        Args:
            given: the labels, one-hot, (B, K). q: (mu B, K). reliable: (mu B,), 1 or 0.
        """
        parts = joint["labeled"]["strong"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        groups = [rows.features for rows in parts]
        labeled, unlabeled = self.projection(torch.cat(groups)).split([len(groups[0]), 3 * len(q)])
        given = given.repeat(2, 1)

        own = torch.eye(given.shape[1], device=q.device)
        own = torch.ones_like(own) if self.centers_of_all else own
        centers = self.centers(self.heads["balanced"].weight)
        keys, members = torch.cat([centers, labeled]), torch.cat([own, given])
        scores = class_scores(unlabeled, keys, members, self.temperature).exp()
        views, scores = (x.unflatten(0, (3, -1)) for x in (unlabeled, scores))
        first, *others = propagate(views, scores, self.propagation).unbind(0)
        follow = sharpen(first, POWER)
        cross = [-(follow * p.log()).sum(-1).mean() for p in others]
        agree = torch.special.entr(sum(others) / 2).sum(-1).mean()

        every = torch.cat([labeled, unlabeled[len(q) :]])
        soft = torch.cat([given, sharpen(q, POWER).repeat(2, 1)])
        counted = torch.cat([torch.ones_like(given[:, 0]), reliable.repeat(2)])
        log_p = class_scores(every, every, soft * counted.unsqueeze(1), self.temperature, leave_out_self=True)
        contrast = -(counted * (soft * log_p).sum(-1)).sum() / counted.sum()
        return (cross[0] + cross[1] + agree) / 3, contrast

    @torch.no_grad()
    def _count(self, q: Tensor, reliable: Tensor, used: Tensor) -> None:
        """Add a step's soft pseudo-labels, of all ranks: (mu B, K), and which of them count, (mu B,) each."""
        self.counts.add_(sum_ranks((torch.stack([reliable, used]) @ q).unsqueeze(0))[0])

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        unlabeled, pseudo = self.distributions.clone()
        return {UNLABELED.name: unlabeled, PSEUDO.name: pseudo}
