"""cRT (Kang et al., "Decoupling", ICLR 2020): a new classifier on a finished network, as in the row DARP+cRT."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info, Stream
from semi_fast.methods.base import Averaged, Context, Look, Method, Out
from semi_fast.parts import losses
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.groups import ParamGroup, require_trained
from semi_fast.parts.holdout import require_one
from semi_fast.parts.mixup import Mixing, draw_mixing, mix
from semi_fast.parts.statistics import one_hot


class Retraining(NamedTuple):
    """A step of the stage of re-training."""

    mixing: Mixing | None


class CRT(Method):
    """The network is frozen, its BatchNorms in eval mode; a new head "retrained" learns from the labeled images.

    ``form="darp"`` (bbuing9/DARP, train_crt.py): labeled images are mixed up, with their targets Y';
    L = mean_i sum_k w_k Y'_ik (-log softmax(z_i)_k) with w_k = K (1 / N_k) / sum_j (1 / N_j). *released*: the network
    is in training mode, so that its BatchNorm statistics follow the labeled images though its weights stay. Of several
    processes each mixes its own images.

    ``form="daso"`` (ytaek-oh/daso): plain cross-entropy over images drawn with weights 1 / E_k, E_k = (1 - b^N_k) /
    (1 - b), the effective number. *choice*: classes are drawn uniformly and weigh w_k = K (N_k / E_k) / sum_j (N_j /
    E_j), which is the same loss in expectation; weak views.

    ``start_from=RUN`` gives network and "standard" head, with ``method.learn_share=0``: DARP+cRT where RUN is one of
    DARP. Else a first stage trains both on the labeled images by plain cross-entropy, as Kang et al. do.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes and labeled counts.
        form: which repository's.
        learn_share: share of the run that the first stage takes (*choice*; Kang et al.: 90 of 100 epochs); 0: none.
        mixup: alpha of Beta(alpha, alpha) in form="darp".
        effective: b of form="daso".
        weights: those that the run is judged by (both repositories: raw).
    """

    class_weights: Tensor  # w, (K,) float32; follows from the data, so it is not saved

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        form: Literal["darp", "daso"] = "darp",
        learn_share: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        mixup: Annotated[float, Field(gt=0)] = 0.75,
        effective: Annotated[float, Field(ge=0, lt=1)] = 0.999,
        weights: Literal["averaged", "raw"] = "raw",
    ) -> None:
        super().__init__()
        require_one(info.labeled_counts, info.class_names, "crt")
        self.view = "strong" if form == "darp" else "weak"
        self.streams = {"labeled": Stream("labeled", (self.view,), balanced=form == "daso")}
        self.learn_share, self.mixup = learn_share, mixup if form == "darp" else None
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("retrained", "standard")})
        self.reported, self.weights = "retrained", weights
        counts = torch.tensor(info.labeled_counts, dtype=torch.float64)
        rare = 1 / counts if form == "darp" else counts * (1 - effective) / (1 - effective**counts)
        self.register_buffer("class_weights", (len(counts) * rare / rare.sum()).float(), persistent=False)

    def starts(self) -> tuple[float, ...]:
        return (0.0, self.learn_share) if self.learn_share else (0.0,)

    def groups(self, stage: int) -> tuple[ParamGroup, ...]:
        frozen = ("net", "heads.standard") if self._retrains(stage) else ("heads.retrained",)
        return tuple(ParamGroup(name, frozen=True) for name in frozen)

    def begin(self, stage: int, look: Look) -> None:
        if self._retrains(stage):
            require_trained(self.net, "Name a run by start_from, or set method.learn_share above 0.")

    def _retrains(self, stage: int) -> bool:
        return stage == len(self.starts()) - 1

    def inputs(self, batch: Batch, ctx: Context) -> Retraining | None:
        """What re-training draws; None where the network learns."""
        if not self._retrains(ctx.stage):
            return None
        if self.mixup is None:
            return Retraining(None)
        return Retraining(draw_mixing(len(batch.images), self.mixup, ctx.generator, batch.images.device))

    def prepare(self, batch: Batch, inputs: Retraining | None, averaged: Averaged) -> tuple[Batch, Retraining | None]:
        if inputs is None or inputs.mixing is None:
            return batch, inputs
        return batch._replace(images=mix(batch.images, inputs.mixing)), inputs

    def objective(
        self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Retraining | None
    ) -> Out:
        logits, target = joint["labeled"][self.view].logits, labels["labeled"]
        if prepared is None:
            loss = losses.labeled_loss(logits["standard"], target)
        else:
            soft = one_hot(target, len(self.class_weights))
            soft = soft if prepared.mixing is None else mix(soft, prepared.mixing)
            log_p = logits["retrained"].log_softmax(-1)
            loss = -(self.class_weights * soft * log_p).sum(-1).mean()
        return Out(loss, {"loss/labeled": loss.detach()})
