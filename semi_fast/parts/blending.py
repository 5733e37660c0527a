"""DASO's pseudo-labels (Oh, Kim and Kweon, CVPR 2022), for any classifier on features whose class prototypes it keeps.

*released* is ytaek-oh/daso.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semi_fast.parts import losses
from semi_fast.parts.figures import Figure
from semi_fast.parts.forward import Rows
from semi_fast.parts.statistics import class_counts
from semi_fast.processes.gather import gather_candidates, sum_ranks

if TYPE_CHECKING:
    from semi_fast.memory_bank import MemoryBank

BANK_SIZE = 256  # features a class (*released*: of the option of another method, to the same effect)
WARMUP_EPOCHS = 10  # of 500 (*released*: 5,000 of 250,000 steps)
PERIOD = 100  # steps

BLENDED = Figure("pseudo/blended", "distribution", "Classes of the blended pseudo-labels, used or not.")


class Inputs(NamedTuple):
    """What depends on the step."""

    live: Tensor  # 0-dim bool, False during warm-up
    publish: Tensor  # 0-dim bool, whether m is renewed behind this step


def similarity(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """cos(h, C_k) / T_proto. (n, d), (K, d) -> (n, K); 0 where a prototype is all zeros, as it is before its first."""
    return F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).T / temperature


@torch.no_grad()
def blending_weights(counts: Tensor, temperature: float) -> Tensor:
    """v_k = m_k^(1 / T_d) / max_j m_j^(1 / T_d). (K,) int64 counts -> (K,) float32 in [0, 1].

    0 where nothing is counted yet, which leaves the linear pseudo-label as it is; *released* divides by zero then.
    """
    return (counts / counts.max().clamp_min(1)).pow(1.0 / temperature)


class Blending(nn.Module):
    """p' = (1 - v_k) p + v_k q^sem with k = argmax p, the alignment loss, and the statistics they need.

    q^sem = softmax(cos(h^w, C) / T_proto). C_k is the mean of the newest features of labeled images of class k that
    the averaged network gave; the features of a step are taken in before its prototypes are read. m counts the final
    pseudo-labels of the unlabeled images of ``PERIOD`` steps, used or not, and is renewed every so many steps, from
    step 0 on.

    Args:
        bank: an empty one of the rule "fifo".
        temperature: T_d.
        prototype_temperature: T_proto.
        warmup_epochs: of 500 notional epochs, during which p' = p and the alignment loss is 0.
    """

    window: Tensor  # (K,) int64, pseudo-labels since m was renewed
    published: Tensor  # m as counts, (K,) int64

    def __init__(
        self, bank: MemoryBank, temperature: float, prototype_temperature: float = 0.05, warmup_epochs: int = 10
    ) -> None:
        super().__init__()
        self.bank, self.temperature, self.prototype_temperature = bank, temperature, prototype_temperature
        self.warmup_epochs = warmup_epochs
        self.register_buffer("window", torch.zeros(len(bank.pushed), dtype=torch.int64))
        self.register_buffer("published", torch.zeros(len(bank.pushed), dtype=torch.int64))

    def inputs(self, step: int, epoch: int, device: torch.device) -> Inputs:
        """What depends on the step: its number in the stage, from 0, and its notional epoch."""
        live, publish = epoch >= self.warmup_epochs, (step + 1) % PERIOD == 0
        return Inputs(*(torch.full((), value, device=device) for value in (live, publish)))

    @torch.no_grad()
    def learn(self, features: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Take in the features of a step's labeled images by the averaged network: before ``semantic``.

        Args:
            features: (B_l, d) float32. labels, rows: (B_l,) int64.
        """
        sure = torch.ones_like(labels, dtype=torch.float32)
        self.bank.push(*gather_candidates(features, labels, sure, sure > 0, rows))

    def semantic(self, weak: Rows, strong: Rows, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """q^sem, (B, K) without gradient, and L_align, a scalar.

        L_align = mean CE(cos(h^s, C) / T_proto, q^sem) over all V * B rows, with gradient through h^s alone.

        Args:
            weak, strong: rows of the unlabeled images.
            inputs: of the step.
        """
        prototypes, _ = self.bank.prototypes()
        semantic = similarity(weak.features.detach(), prototypes, self.prototype_temperature).softmax(-1)
        follow = similarity(strong.features, prototypes, self.prototype_temperature)
        align = losses.unlabeled_loss(follow, semantic, torch.ones_like(semantic[:, 0]))
        return semantic, torch.where(inputs.live, align, 0.0)

    @torch.no_grad()
    def blend(self, linear: Tensor, semantic: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """p', (B, K), and the weights of q^sem, (B,); of p and q^sem, (B, K) each."""
        classes = blending_weights(self.published, self.temperature)
        weight = losses.mixing_weight(linear, classes, inputs.live.float())
        return losses.mix_pseudo_labels(linear, semantic, weight), weight

    @torch.no_grad()
    def update(self, target: Tensor, inputs: Inputs) -> None:
        """Count a step's final pseudo-labels, (B,) int64, with those of all ranks."""
        counts = class_counts(target, torch.ones_like(target, dtype=torch.bool), len(self.window))
        self.window.add_(sum_ranks(counts))
        self.published.copy_(torch.where(inputs.publish, self.window, self.published))
        self.window.copy_(torch.where(inputs.publish, 0, self.window))

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """m, (K,) float32; NaN before it is first renewed."""
        return {BLENDED.name: self.published / self.published.sum()}
