"""Supervised training on the labeled images alone: the lower bound every method is measured against."""

from __future__ import annotations

from torch import Tensor, nn

from pipelines.batch import Info
from semi_fast.methods.base import Joint, Method, Out, forward_rows, linear_head
from semi_fast.parts import losses


class Supervised(Method):
    """Mean cross-entropy of the labeled rows; reads no unlabeled image and keeps no statistics."""

    views: tuple[str, ...] = ()

    def __init__(self, net: nn.Module, info: Info) -> None:
        super().__init__()
        self.net = net
        self.head = linear_head(net, info.num_classes)

    def heads(self) -> list[nn.Module]:
        return [self.head]

    def objective(self, joint: Joint, labels: Tensor, rows: Tensor, schedule: None) -> Out:
        loss = losses.labeled_loss(joint.labeled.logits[0], labels)
        return Out(loss, {"loss/labeled": loss.detach()})

    def predict_heads(self, x: Tensor) -> dict[str, Tensor]:
        return {"standard": forward_rows(self.net, [self.head], x).logits[0]}
