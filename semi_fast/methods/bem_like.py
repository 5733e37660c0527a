"""Mixing with a class-balanced image bank: a completion of our own; the paper's text gives no equations here.

"BEM: Balanced and Entropy-based Mix for Long-Tailed Semi-Supervised Learning" (CVPR 2024) is where the ideas come from.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info
from semi_fast.methods.base import Averaged, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.class_activation import activation_maps, box_mask, require_maps
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.losses import PseudoLabels
from semi_fast.parts.stores import ImageRing
from semi_fast.processes.gather import gather_ranks, share_of_rank, sum_ranks, world_size

Share = Annotated[float, Field(ge=0, le=1)]
LABELED, UNLABELED = 0, 1  # sources of partners

PASTED = Figure("mix/pasted", "share", "Mean share of an image that its partner's box covers.")
PARTNERS = Figure("mix/partners", "distribution", "Probability of each class among partners of labeled images.")
ENTROPY = Figure("mix/entropy", "distribution", "Mean entropy of the predictions of unlabeled images, by pseudo-label.")


class Prepared(NamedTuple):
    """The mixed images' second labels, and what enters the ring."""

    packed: Tensor  # (mu B, 3, H, W) uint8, the weak views
    partners: Tensor  # y_j, (mu B,) int64
    kept: Tensor  # lambda, (mu B,) float32: share of the image outside of the box


def effective_number(counts: Tensor, beta: float) -> Tensor:
    """E_k = (1 - beta^n_k) / (1 - beta) (Cui et al., CVPR 2019). (K,) -> (K,) float32; counts below 1 are 1."""
    return (1.0 - beta ** counts.double().clamp_min(1)).div(1.0 - beta).float()


def weight_of(method: Method) -> Tensor:
    """The classifier's weight, (K, d)."""
    return method.heads["standard"].get_parameter("weight")


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """H(p), (n, K) -> (n,) float32 in [0, log K]."""
    return torch.special.entr(probabilities).sum(-1)


class BEMLike(Method):
    """L = L_x + L_u + w L_mix: a completion of our own; the paper's text gives no equations here.

    What the text says: a bank of images by class, drawn from so that both the number of images and the uncertainty of
    classes are balanced; the box of a class activation map is pasted; by its uncertainty an image is mixed with a
    labeled or an unlabeled one; a loss weighted by effective number and entropy. All that follows is *choice*:

    - bank: the newest images of each class, weak views; labeled ones as they are met, unlabeled ones where tau is
      reached, by pseudo-label (`parts.stores.ImageRing`, memory 2 K S H W 3 bytes);
    - n_k = N_k + u_k, where u <- decay u + (1 - decay) N_u / (mu B) #{used pseudo-labels of class k}; E_k the effective
      number of n_k; e_k <- decay e_k + (1 - decay) mean H(p) over the images of (pseudo-)class k, log K at first, for
      labeled and unlabeled images apart;
    - a partner's class: P_k proportional to (1 / E_k)^(1 - a) e_k^a, with e of the source that it is drawn from;
    - the source: labeled where the averaged network's H(p) on the weak view is above the median of the step, otherwise
      unlabeled, once there is one;
    - mixed image: on the first strong view the box around where the partner's activation map, by the averaged network,
      is above a threshold; lambda is the share of the image that is left;
    - L_mix = mean m_i w_k [lambda CE(z, y^_i) + (1 - lambda) CE(z, y_j)], w_k proportional to (1 / E_k)(1 + e_k /
      log K) with a mean of 1 over the classes, k = y^_i and e that of unlabeled images.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d) with `maps`, and the data set.
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: V.
        entropy_share: a.
        effective_beta: beta of the effective number.
        decay: of the counts and entropies, per step.
        threshold: of the activation map, whose values are 0 to 1.
        bank_size: S, images of a class and source.
        mix_weight: w.
    """

    figures = (USED, CONFIDENCE, PASTED, PARTNERS, ENTROPY)

    labeled_counts: Tensor  # N, (K,) float32; follows from the data, so it is not saved
    unlabeled_counts: Tensor  # u, (K,) float32
    entropies: Tensor  # e, (2, K) float32, of labeled and of unlabeled images

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        entropy_share: Share = 0.5,
        effective_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999,
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        threshold: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        bank_size: Annotated[int, Field(ge=1)] = 64,
        mix_weight: Annotated[float, Field(ge=0)] = 1.0,
    ) -> None:
        super().__init__()
        require_maps(net)
        classes = info.num_classes
        self.streams = two_streams(strong_views)
        self.tau, self.entropy_share, self.effective_beta, self.decay = tau, entropy_share, effective_beta, decay
        self.threshold, self.mix_weight, self.num_unlabeled = threshold, mix_weight, info.num_unlabeled
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, classes)})
        self.reported = "standard"
        self.ring = ImageRing(2, classes, bank_size, info.resolution, info.mean, info.std)
        self.register_buffer("labeled_counts", torch.tensor(info.labeled_counts).float(), persistent=False)
        self.register_buffer("unlabeled_counts", torch.zeros(classes))
        self.register_buffer("entropies", torch.full((2, classes), math.log(classes)))

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """Numbers in [0, 1) that draw a partner's class and image, (mu B, 2)."""
        shape = (len(batch.rows["unlabeled"]) * world_size(), 2)
        return share_of_rank(torch.rand(shape, generator=ctx.generator, device=batch.images.device))

    def prepare(self, batch: Batch, inputs: Tensor, averaged: Averaged) -> tuple[Batch, Prepared]:
        labeled, weak = batch.of("labeled", "weak"), batch.of("unlabeled", "weak")
        labels = gather_ranks(batch.labels["labeled"]).flatten(0, 1)
        packed = gather_ranks(self.ring.pack(labeled)).flatten(0, 1)
        self.ring.push(LABELED, packed, labels, torch.ones_like(labels, dtype=torch.bool))

        uncertain = averaged(weak, of=lambda method, x: entropy(method.predict(x)["standard"].softmax(-1)))
        certain = uncertain <= gather_ranks(uncertain).flatten().median()
        source = (certain & (self.ring.counts[UNLABELED].sum() > 0)).long()
        partner, classes = self.ring.draw(source, self.class_probabilities(), inputs)
        partner = partner.to(weak.dtype)
        shown = averaged(partner, of=lambda method, x: activation_maps(method.net, weight_of(method), x, classes))
        box = box_mask(shown > self.threshold)
        mixed = torch.where(box.unsqueeze(1), partner, batch.of("unlabeled", "strong")[: len(weak)])
        kept = 1.0 - box.float().mean((1, 2))
        return batch.add("unlabeled", "mixed", mixed), Prepared(self.ring.pack(weak), classes, kept)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared) -> Out:
        labeled, views = joint["labeled"]["weak"].logits["standard"], joint["unlabeled"]
        p = losses.linear_pseudo_label(views["weak"].logits["standard"])
        pseudo = losses.harden(p, self.tau)
        used = pseudo.mask.float()
        mixed, weight = views["mixed"].logits["standard"], used * self.class_weights()[pseudo.target]
        own = losses.unlabeled_loss(mixed, pseudo.target, weight * prepared.kept)
        partners = losses.unlabeled_loss(mixed, prepared.partners, weight * (1.0 - prepared.kept))
        parts = {
            "labeled": losses.labeled_loss(labeled, labels["labeled"]),
            "unlabeled": losses.unlabeled_loss(views["strong"].logits["standard"], pseudo.target, used),
            "mixed": self.mix_weight * (own + partners),
        }
        self._update(labeled, labels["labeled"], p, pseudo, prepared.packed)
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()} | {
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
            PASTED.name: 1.0 - prepared.kept.mean(),
        }
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)

    def effective_numbers(self) -> Tensor:
        """E, (K,) float32."""
        return effective_number(self.labeled_counts + self.unlabeled_counts, self.effective_beta)

    def class_probabilities(self) -> Tensor:
        """P, (2, K), rows sum to 1: of labeled and of unlabeled partners, were there an image of every class."""
        weights = self.effective_numbers() ** (self.entropy_share - 1.0) * self.entropies**self.entropy_share
        return weights / weights.sum(1, keepdim=True)

    def class_weights(self) -> Tensor:
        """w, (K,), with a mean of 1."""
        uncertainty = self.entropies[UNLABELED] / math.log(len(self.labeled_counts))
        weights = (1.0 + uncertainty) / self.effective_numbers()
        return weights / weights.mean()

    @torch.no_grad()
    def _update(self, labeled: Tensor, labels: Tensor, p: Tensor, pseudo: PseudoLabels, packed: Tensor) -> None:
        """Take the step into counts, entropies and the bank; every rank takes in the images of all ranks."""
        sums = torch.zeros(5, len(self.labeled_counts), device=p.device)
        for row, classes, values in (
            (0, labels, torch.ones_like(labels, dtype=torch.float32)),
            (1, labels, entropy(labeled.detach().softmax(-1))),
            (2, pseudo.target, torch.ones_like(pseudo.confidence)),
            (3, pseudo.target, entropy(p)),
            (4, pseudo.target, pseudo.mask.float()),
        ):
            sums[row].index_add_(0, classes, values)
        seen_l, sum_l, seen_u, sum_u, used = sum_ranks(sums.unsqueeze(0))[0]
        for row, seen, total in ((LABELED, seen_l, sum_l), (UNLABELED, seen_u, sum_u)):
            before = self.entropies[row]
            self.entropies[row] = torch.where(seen > 0, torch.lerp(total / seen, before, self.decay), before)
        images = len(p) * world_size()
        self.unlabeled_counts.lerp_(used * (self.num_unlabeled / images), 1.0 - self.decay)
        offered = [gather_ranks(x).flatten(0, 1) for x in (packed, pseudo.target, pseudo.mask)]
        self.ring.push(UNLABELED, *offered)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        return {PARTNERS.name: self.class_probabilities()[LABELED], ENTROPY.name: self.entropies[UNLABELED].clone()}
