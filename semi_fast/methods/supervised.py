"""Supervised training on the labeled images alone: the lower bound every method is measured against."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Info, Stream
from semi_fast.methods.base import Method, Out
from semi_fast.parts import losses
from semi_fast.parts.adjustment import LogitAdjustment
from semi_fast.parts.forward import Joint, linear_head


class Supervised(Method):
    """Mean cross-entropy of the labeled rows; reads no unlabeled image and keeps no statistics.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        logit_adjustment: "train" adds strength * log pi_l to the logits inside the cross-entropy ("Supervised w/ LA"
            of Table 1); "posthoc" subtracts it from the predictions; "off".
        adjustment_strength: tau_LA.
        weights: which weights are reported: the moving average, or the raw ones (P-DASO's supervised rows).
    """

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        logit_adjustment: Literal["off", "train", "posthoc"] = "off",
        adjustment_strength: Annotated[float, Field(gt=0)] = 1.0,
        weights: Literal["averaged", "raw"] = "averaged",
    ) -> None:
        super().__init__()
        self.streams = {"labeled": Stream("labeled", ("weak",))}
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.adjustment = LogitAdjustment(info.labeled_counts, logit_adjustment, adjustment_strength)
        self.reported, self.weights = self.adjustment.reported("standard"), weights

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Any) -> Out:
        logits = self.adjustment.labeled(joint["labeled"]["weak"].logits["standard"])
        loss = losses.labeled_loss(logits, labels["labeled"])
        return Out(loss, {"loss/labeled": loss.detach()})

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.adjustment.predictions(logits)
