"""FixMatch (Sohn et al., NeurIPS 2020): confident predictions on the weak view label the strong views."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Info
from semi_fast.methods.base import Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.adjustment import Form, LogitAdjustment
from semi_fast.parts.figures import CONFIDENCE, USED
from semi_fast.parts.forward import Joint, linear_head


class FixMatch(Method):
    """L = L_S + L_U with a fixed threshold. The pseudo-label of the weak view serves every strong view.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: strong views of each unlabeled image (the original has one).
        unlabeled_weight: weight of L_U.
        logit_adjustment: "train" (the form of the paper's rows "FixMatch + LA"), "pseudo" (SEVAL's "FixMatchLA"),
            "posthoc", or "off"; see ``semi_fast.parts.adjustment``.
        adjustment_strength: tau_LA.
    """

    figures = (USED, CONFIDENCE)

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
        unlabeled_weight: Annotated[float, Field(ge=0)] = 1.0,
        logit_adjustment: Form = "off",
        adjustment_strength: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.tau, self.unlabeled_weight = tau, unlabeled_weight
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.adjustment = LogitAdjustment(info.labeled_counts, logit_adjustment, adjustment_strength)
        self.reported = self.adjustment.reported("standard")

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Any) -> Out:
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        logits = self.adjustment.labeled(joint["labeled"]["weak"].logits["standard"])
        labeled = losses.labeled_loss(logits, labels["labeled"])
        q = losses.linear_pseudo_label(self.adjustment.pseudo(weak.logits["standard"]))
        pseudo = losses.harden(q, self.tau)
        used = pseudo.mask.float()
        unlabeled = self.unlabeled_weight * losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used)
        return Out(
            labeled + unlabeled,
            {
                "loss/labeled": labeled.detach(),
                "loss/unlabeled": unlabeled.detach(),
                USED.name: used.mean(),
                CONFIDENCE.name: pseudo.confidence.mean(),
            },
            pseudo,
        )

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.adjustment.predictions(logits)
