"""Logit adjustment as an option of a method, in its three forms (baselines "+ LA" of Tables 1 to 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from semi_fast.parts.priors import adjust_logits, class_prior

Form = Literal["off", "train", "pseudo", "posthoc"]


class LogitAdjustment(nn.Module):
    """Logit adjustment by the labeled prior (Menon et al., ICLR 2021), in one form at a time.

    "train" and "posthoc" together would correct twice. "train" says nothing about the unlabeled classes; "pseudo"
    assumes that the head learned the labeled prior, and pushes every pseudo-label towards balance.

    Args:
        labeled_counts: (K) labeled images a class.
        form: "train": the labeled loss sees z + strength log pi_l; "pseudo": pseudo-labels are made from
            z^w - strength log pi_l; "posthoc": the predictions z - strength log pi_l are reported; "off": none.
        strength: tau_LA.
        fixed: whether the prior follows from the data, so that it is not saved; else the method writes it.
    """

    prior: Tensor  # pi_l, (K,) float32

    def __init__(self, labeled_counts: Sequence[int], form: Form, strength: float, *, fixed: bool = True) -> None:
        super().__init__()
        self.form, self.strength = form, strength
        self.register_buffer("prior", class_prior(labeled_counts), persistent=not fixed)

    def labeled(self, logits: Tensor) -> Tensor:
        """Logits of labeled rows, (B, K), as the cross-entropy takes them."""
        return adjust_logits(logits, self.prior, self.strength) if self.form == "train" else logits

    def pseudo(self, logits: Tensor) -> Tensor:
        """Weak logits, (B, K), as pseudo-labels are made from them."""
        return adjust_logits(logits, self.prior, -self.strength) if self.form == "pseudo" else logits

    def predictions(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits by head, and with "posthoc" first the adjusted ones of the first head, as "adjusted"."""
        if self.form != "posthoc":
            return logits
        first = next(iter(logits.values()))
        return {"adjusted": adjust_logits(first, self.prior, -self.strength), **logits}

    def reported(self, head: str) -> str:
        """The prediction to report where ``head`` is the first head."""
        return "adjusted" if self.form == "posthoc" else head
