"""FixMatch (Sohn et al., NeurIPS 2020): confident predictions on the weak view label the strong views."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Info
from semi_fast.methods.base import Joint, Method, Out, forward_rows, linear_head, view_names
from semi_fast.parts import losses
from semi_fast.parts.figures import CONFIDENCE, USED


class FixMatch(Method):
    """L = L_S + L_U with a fixed threshold. The pseudo-label of the weak view serves every strong view.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set; only the number of classes is read.
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: strong views of each unlabeled image (the original has one).
        unlabeled_weight: weight of L_U.
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
    ) -> None:
        super().__init__()
        self.net = net
        self.head = linear_head(net, info.num_classes)
        self.tau, self.unlabeled_weight = tau, unlabeled_weight
        self.views = view_names(strong_views)

    def heads(self) -> list[nn.Module]:
        return [self.head]

    def objective(self, joint: Joint, labels: Tensor, rows: Tensor, schedule: None) -> Out:
        labeled = losses.labeled_loss(joint.labeled.logits[0], labels)
        pseudo = losses.harden(losses.linear_pseudo_label(joint.weak.logits[0]), self.tau)
        used = pseudo.mask.float()
        strong = losses.unlabeled_loss(joint.strong.logits[0], pseudo.target, used)
        unlabeled = self.unlabeled_weight * strong
        return Out(
            labeled + unlabeled,
            {
                "loss/labeled": labeled.detach(),
                "loss/unlabeled": unlabeled.detach(),
                "pseudo/used": used.mean(),
                "pseudo/confidence": pseudo.confidence.mean(),
            },
            pseudo,
        )

    def predict_heads(self, x: Tensor) -> dict[str, Tensor]:
        return {"standard": forward_rows(self.net, [self.head], x).logits[0]}
