"""SEVAL (Li et al., 2024): offsets and thresholds of pseudo-labels are learned from held-out labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_prep.errors import UserError
from pipelines.batch import Batch, Info
from semi_fast.methods.base import EPOCHS, Context, Look, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head
from semi_fast.parts.holdout import held_out_counts, hold_out, require_two
from semi_fast.parts.seval_fit import fit_offsets, fit_thresholds

OFFSETS = Figure("seval/offset", "distribution", "Offset of each class, as last estimated; its logarithm is taken off.")
THRESHOLDS = Figure("seval/threshold", "distribution", "Confidence threshold of each class, as last estimated.")
FIRST_THRESHOLD = 0.95

Decay = Annotated[float, Field(ge=0, lt=1)]


class Seval(Method):
    """FixMatch with pseudo-labels softmax(z^w - ln o) and a threshold of each class, learned first and used then.

    The stage of estimation holds out half of the labeled images of every class, drawn by the run's seed. After each
    evaluation it fits o and the thresholds to them by the averaged network and lets moving averages follow; they hold
    from the next notional epoch of 500 on, and all are kept. Then all is trained anew with all labeled images and, at
    every epoch, the values that the first stage had then, however many steps either has. Before the first evaluation
    they are those of FixMatch: o = 1 and 0.95.

    *released* (ZerojumpLine/SEVAL): two runs of 250,000 steps each, which here are the halves of one of 500,000. They
    may be two runs here, too: one with `estimate_share=1`, then one with `replay`. *released*: a row an evaluation
    instead of an epoch; with one evaluation an epoch they agree.

    Args:
        net: images -> features (n, net.num_features).
        info: the data set: number of classes, their names and labeled counts.
        estimate_share: share of the run that the stage of estimation takes; 1: the run does nothing else.
        replay: folder of a finished run of this method, whose values are used; none: estimate them.
        held_out: labeled images of each class held out, at most (ImageNet-127: 10); none: half.
        precision: t*, which the thresholds aim at (CIFAR-10-LT 0.75, CIFAR-100-LT and ImageNet-127 0.65, STL-10 0.6).
        groups: G, of classes that follow one another and share a threshold (CIFAR-10-LT 5, others 10).
        offset_decay, threshold_decay: of the moving averages, an evaluation (CIFAR-10-LT 0.999, CIFAR-100-LT 0.9).
        strong_views: strong views of each unlabeled image.
    """

    figures = (USED, CONFIDENCE, OFFSETS, THRESHOLDS)
    curves: Tensor  # (EPOCHS + 1, 2, K) float32: offsets and thresholds of each epoch, and as they are at the end
    seed: Tensor  # 0-dim int64, decides the held-out images

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        estimate_share: Annotated[float, Field(gt=0, le=1)] = 0.5,
        replay: Annotated[str, Field(min_length=1)] | None = None,
        held_out: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[float, Field(gt=0, le=1)] = 0.75,
        groups: Annotated[int, Field(ge=1)] = 5,
        offset_decay: Decay = 0.999,
        threshold_decay: Decay = 0.999,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
    ) -> None:
        super().__init__()
        self.streams = two_streams(strong_views)
        self.estimate_share, self.replay = estimate_share, replay
        self.precision, self.class_groups = precision, groups
        self.decays = (offset_decay, threshold_decay)
        self.counts, self.names = info.labeled_counts, info.class_names
        self.held_out = held_out_counts(info.labeled_counts, held_out)
        self.net = net
        self.heads = nn.ModuleDict({"standard": linear_head(net, info.num_classes)})
        self.reported, self.relabels = "standard", replay is None
        start = torch.stack([torch.ones(info.num_classes), torch.full((info.num_classes,), FIRST_THRESHOLD)])
        self.register_buffer("curves", start.repeat(EPOCHS + 1, 1, 1))
        # Drawn from what the run's seed has seeded, so that it follows from that seed.
        self.register_buffer("seed", torch.randint(2**31, ()))

    def starts(self) -> tuple[float, ...]:
        return (0.0,) if self.replay is not None or self.estimate_share == 1 else (0.0, self.estimate_share)

    def begin(self, stage: int, look: Look) -> None:
        if self.replay is not None:
            self.curves.copy_(read_curves(Path(self.replay), self.curves.shape))
            return
        if stage == 1:
            look.relabel(look.labeled, look.labels)
            look.restart()
            return
        require_two(self.counts, self.names, "method=seval without method.replay")
        _, rest = hold_out(look.labels, self.held_out, int(self.seed))
        look.relabel(look.labeled[rest], look.labels[rest])

    def measured(self, ctx: Context, look: Look) -> None:
        """Fit offsets, then thresholds with the new offsets, and let both hold from the next epoch on."""
        if self.replay is not None or ctx.stage == 1:
            return
        places, _ = hold_out(look.labels, self.held_out, int(self.seed))
        logits = look.logits(look.labeled[places])["standard"].cpu().double().numpy()
        labels = look.labels[places].numpy()
        offsets, thresholds = self.curves[-1].cpu().double().numpy()
        offset_decay, threshold_decay = self.decays
        offsets = offset_decay * offsets + (1 - offset_decay) * fit_offsets(logits, labels)
        weights = len(labels) / np.bincount(labels)[labels]  # 1 / pi of the label among the held-out ones
        adjusted = logits - np.log(offsets)
        fitted, rare = fit_thresholds(adjusted, labels, weights, self.class_groups, self.precision)
        thresholds = threshold_decay * thresholds + (1 - threshold_decay) * fitted
        offsets = np.where(rare, offsets.min(), offsets)
        self.curves[ctx.epoch + 1 :] = torch.from_numpy(np.stack([offsets, thresholds])).to(self.curves)

    def inputs(self, batch: Batch, ctx: Context) -> Tensor:
        """Offsets and thresholds of this epoch, (2, K)."""
        return self.curves[ctx.epoch].clone()

    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Tensor) -> Out:
        offsets, thresholds = prepared
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        labeled = losses.labeled_loss(joint["labeled"]["weak"].logits["standard"], labels["labeled"])
        pseudo = losses.harden(losses.linear_pseudo_label(weak.logits["standard"] - offsets.log()), 0.0)
        pseudo = pseudo._replace(mask=pseudo.confidence >= thresholds[pseudo.target])
        used = pseudo.mask.float()
        unlabeled = losses.unlabeled_loss(strong.logits["standard"], pseudo.target, used)
        logs = {"loss/labeled": labeled.detach(), "loss/unlabeled": unlabeled.detach()}
        logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        return Out(labeled + unlabeled, logs, pseudo)

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        offsets, thresholds = self.curves[-1].clone()
        return {OFFSETS.name: offsets, THRESHOLDS.name: thresholds}


def read_curves(run: Path, shape: tuple[int, ...]) -> Tensor:
    """The curves of a finished run, by its newest checkpoint. Raises: UserError where there are none of that shape."""
    rule = f"method.replay must be the folder of a finished run of method=seval on the same classes, got {run}"
    files = sorted(run.glob("checkpoints/step-?????????/model.safetensors"))
    if not files or not (run / "summary.json").is_file():
        raise UserError(f"{rule}, which is none. Train it to its end first, with method.replay left out.")
    try:
        curves = load_file(files[-1]).get("curves")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{rule}: {files[-1]} cannot be read ({error}). Train it anew.") from None
    if curves is None or curves.shape != shape:
        raise UserError(f"{rule}, whose checkpoint has no such curves. Name another.")
    return curves
