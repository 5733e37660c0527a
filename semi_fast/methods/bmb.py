"""BMB (Peng et al., IEEE TMM 2025): a class-balanced pool of features, and losses weighted by how rare a class is."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Context, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import BALANCED_USED, CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head, num_features
from semi_fast.parts.statistics import class_counts
from semi_fast.parts.stores import FeaturePool, power_law
from semi_fast.processes.gather import gather_candidates, sum_ranks, world_size

NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

POOL = Figure("bmb/pool", "distribution", "Class distribution of the features in the pool.")
POOL_FILL = Figure("bmb/fill", "share", "Share of the pool's places that hold a feature.")
COUNTED = Figure("bmb/counted", "distribution", "Classes of the balanced head's confident pseudo-labels so far.")


class Prepared(NamedTuple):
    """What a step draws, in [0, 1), the same on every rank, and whether it learns from unlabeled images."""

    live: Tensor  # 0-dim bool
    entering: Tensor  # (mu B of all ranks,) float32
    leaving: Tensor  # (R,) float32
    drawn: Tensor  # (R,) float32


class BMB(Method):
    """L = L_S + L_U + L_S^b + L_U^b + omega L_bank: FixMatch, and a balanced head that learns from stored features.

    The equations follow the released code (wujianP/ImbalancedSSL, BMB), with phi_k(n; a) = n_k^-a / max_j n_j^-a:

    - labeled, balanced head: mean phi_y(N; a_w) CE(z^b, y), N the labeled counts;
    - unlabeled, balanced head: mean phi_k(n; a_w) CE(z^bs, p^b) over images whose p^b = softmax(z^bw) reaches tau in
      class k, with the soft target p^b and n the counts of such pseudo-labels so far;
    - pool: features of the weak views of those images enter it (`parts.stores.FeaturePool`, with lambda_1);
    - L_bank: mean cross-entropy of the balanced head on G features drawn with weight n_k^-lambda_2.

    *choice*: a count is at least 1 (*released*: an average of at least 0.001 a step); drawn features differ (*released*
    draws with replacement); a step draws before its own features enter (*released*: behind). Counts begin with the
    unlabeled losses, as *released*.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive; of both heads (ImageNet-127 0.7).
        strong_views: V (*released* 2).
        weight_power: a_w (CIFAR-10-LT 1.5, imbalance 150: 1.25; CIFAR-100-LT 1.75; ImageNet-127 1 to 1.5).
        pool_size, pool_draws: R and G, at most R (CIFAR 256 and 128; CIFAR-100-LT of imbalance 20: 1024 and 512;
            ImageNet-127 2048 and 512).
        enter_power, draw_power: lambda_1 and lambda_2.
        pool_weight: omega.
        unlabeled_from: notional epoch of 500 from which the unlabeled losses count; the pool does from the start.
    """

    figures = (USED, CONFIDENCE, BALANCED_USED, POOL, POOL_FILL, COUNTED)

    labeled_weights: Tensor  # phi(N; a_w), (K,) float32; follows from the data, so it is not saved
    counted: Tensor  # n, (K,) int64

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 2,
        weight_power: NotNegative = 1.5,
        pool_size: Count = 256,
        pool_draws: Count = 128,
        enter_power: NotNegative = 3.0,
        draw_power: NotNegative = 0.75,
        pool_weight: NotNegative = 0.5,
        unlabeled_from: Annotated[int, Field(ge=0, le=EPOCHS)] = 20,
    ) -> None:
        super().__init__()
        if pool_draws > pool_size:
            raise UserError(
                f"method.pool_draws must be at most method.pool_size, got {pool_draws} of {pool_size}. Lower it."
            )
        self.streams = two_streams(strong_views)
        self.tau, self.weight_power, self.pool_draws, self.draw_power = tau, weight_power, pool_draws, draw_power
        self.pool_weight, self.unlabeled_from = pool_weight, unlabeled_from
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("balanced", "standard")})
        self.reported = "balanced"
        self.pool = FeaturePool(info.num_classes, num_features(net), pool_size, enter_power)
        weights = power_law(torch.tensor(info.labeled_counts).clamp_min(1), weight_power)
        self.register_buffer("labeled_weights", weights, persistent=False)
        self.register_buffer("counted", torch.zeros(info.num_classes, dtype=torch.int64))

    def inputs(self, batch: Batch, ctx: Context) -> Prepared:
        """Draws for the images of all ranks and for every place of the pool, and whether unlabeled losses count."""
        device, places = batch.images.device, len(self.pool.classes)
        sizes = (len(batch.rows["unlabeled"]) * world_size(), places, places)
        draws = [torch.rand(size, generator=ctx.generator, device=device) for size in sizes]
        return Prepared(torch.full((), ctx.epoch >= self.unlabeled_from, device=device), *draws)

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared) -> Out:
        labeled, target = joint["labeled"]["weak"].logits, labels["labeled"]
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"].logits
        pseudo = losses.harden(losses.linear_pseudo_label(weak.logits["standard"]), self.tau)
        soft = losses.linear_pseudo_label(weak.logits["balanced"])
        balanced = losses.harden(soft, self.tau)
        used, balanced_used = ((x.mask & prepared.live).float() for x in (pseudo, balanced))
        counts = self.counted.clamp_min(1)
        weight = balanced_used * power_law(counts, self.weight_power)[balanced.target]
        parts = {
            "labeled": losses.labeled_loss(labeled["standard"], target),
            "unlabeled": losses.unlabeled_loss(strong["standard"], pseudo.target, used),
            "balanced_labeled": losses.unlabeled_loss(labeled["balanced"], target, self.labeled_weights[target]),
            "balanced_unlabeled": losses.unlabeled_loss(strong["balanced"], soft, weight),
            "pool": self.pool_weight * self._pool_loss(power_law(counts, self.draw_power), prepared.drawn),
        }
        offered = gather_candidates(weak.features, *balanced, rows["unlabeled"])
        self.pool.put(offered.embeddings, offered.classes, offered.mask, prepared.entering, prepared.leaving)
        counted = sum_ranks(class_counts(balanced.target, balanced.mask & prepared.live, len(self.counted)))
        self.counted.add_(counted)
        logs = {f"loss/{name}": part.detach() for name, part in parts.items()} | {
            USED.name: used.mean(),
            CONFIDENCE.name: pseudo.confidence.mean(),
            BALANCED_USED.name: balanced_used.mean(),
        }
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo._replace(mask=pseudo.mask & prepared.live))

    def _pool_loss(self, weights: Tensor, uniform: Tensor) -> Tensor:
        """L_bank, over the features that there are; 0 while there is none."""
        features, classes, there = self.pool.draw(weights, self.pool_draws, uniform)
        loss = losses.unlabeled_loss(self.heads["balanced"](features), classes, there.float())
        return loss * (len(there) / there.sum().clamp_min(1))

    @torch.no_grad()
    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        counts = self.pool.counts()
        return {
            POOL.name: counts / counts.sum(),
            POOL_FILL.name: counts.sum() / len(self.pool.classes),
            COUNTED.name: self.counted / self.counted.sum(),
        }
