"""CoSSL (Fan et al., CVPR 2022): a network learned by FixMatch, and apart from it a head on enhanced tail features."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from pipelines.batch import Batch, Info, Stream
from semi_fast.methods.base import Averaged, Context, Look, Method, Out, two_streams
from semi_fast.parts import losses
from semi_fast.parts.enhancement import blending_chance, enhance
from semi_fast.parts.figures import CONFIDENCE, USED, Figure
from semi_fast.parts.forward import Joint, linear_head, num_features
from semi_fast.parts.groups import ParamGroup, require_trained
from semi_fast.parts.holdout import require_one
from semi_fast.processes.gather import share_of_rank, world_size

ENHANCED = Figure("cossl/enhanced", "share", "Share of the features the teacher head learns from that are blended.")


class Draws(NamedTuple):
    """What a step of the teacher head draws."""

    picked: Tensor | None  # (B,) int64, which of the features enhanced beforehand; None: those of the step are
    chance: Tensor  # (B,) float32 in [0, 1)
    share: Tensor  # lambda, (B,) float32


class Inputs(NamedTuple):
    """One of both."""

    warmup: Draws | None = None
    joint: Draws | None = None


class Prepared(NamedTuple):
    """What the teacher head sees, by the averaged network."""

    features: Tensor  # (B, d) float32
    targets: Tensor  # (B,) int64
    enhanced: Tensor  # (B,) bool
    weak: Tensor | None  # (mu B, d) float32, of the unlabeled weak views, where the student learns from it


class CoSSL(Method):
    """Three stages of `feature_epochs`, `warmup_epochs` and `joint_epochs` parts of the run.

    1. FixMatch of the "standard" head; left out with `feature_epochs=0`, for ``start_from`` a run of FixMatch.
    2. The "teacher" head alone, on features of the averaged network, which stays as it is, in eval mode: of images of
       balanced classes, of which those of rare classes are blended with others (tail-class feature enhancement).
       "offline": beforehand, `parts.enhancement`; "online": as in 3.
    3. Both, without a gradient between them. A feature h(x') of class y is, with probability P_y = (N_max - N_y) /
       N_max, replaced by l h(x') + (1 - l) h(x'') of any image x'', l ~ U(least_share, 1), and keeps its label. The
       student learns by FixMatch from the labels that the teacher head, before the step, gives the averaged network's
       features of the weak views.

    *released* (YUE-FAN/CoSSL): labels by the teacher head as it stands, not its average; the average is evaluated.
    *choice*: where all is one run, the student's moments of Adam start anew at the joint stage, and all weights
    shrink as the protocol has it (P-ADAM: by 4e-5 a step) where *released* has L2 terms (4e-5; teacher head: 5e-4).
    With ``start_from`` the student begins with that run's averaged weights, or ``start_weights=raw``. *choice*:
    features enhanced beforehand are drawn with replacement; *released*: in shuffled passes.

    Args:
        net, info: the network (n, 3, H, W) -> (n, d), and the data set: classes and labeled counts.
        feature_epochs, warmup_epochs, joint_epochs: lengths of the stages in proportion (*released*: 400, 10, 100).
        enhancement: of the warm-up (*released*: offline on CIFAR, online on ImageNet-127). "offline" keeps K N_max
            features.
        least_share: lower bound of l (*released*: 0.6 in all scripts).
        head_view: of the images the teacher head learns from (*released*: strong on CIFAR, weak on ImageNet-127).
        tau: confidence from which a pseudo-label is used, inclusive.
        strong_views: V (*released*: 2).
    """

    figures = (USED, CONFIDENCE, ENHANCED)
    counts: Tensor  # N, (K,) int64; follows from the data, so it is not saved
    enhanced: Tensor  # (K, N_max, d) float32, original features of each class first; of no rows with "online"
    seed: Tensor  # 0-dim int64, decides what is blended beforehand

    def __init__(
        self,
        net: nn.Module,
        info: Info,
        *,
        feature_epochs: Annotated[int, Field(ge=0)] = 400,
        warmup_epochs: Annotated[int, Field(ge=1)] = 10,
        joint_epochs: Annotated[int, Field(ge=1)] = 100,
        enhancement: Literal["offline", "online"] = "offline",
        least_share: Annotated[float, Field(ge=0, le=1)] = 0.6,
        head_view: Literal["weak", "strong"] = "strong",
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95,
        strong_views: Annotated[int, Field(ge=1, le=8)] = 1,
    ) -> None:
        super().__init__()
        require_one(info.labeled_counts, info.class_names, "cossl")
        self.streams = two_streams(strong_views) | {
            "balanced": Stream("labeled", (head_view,), balanced=True),
            "any": Stream("all", (head_view,)),
        }
        stages = {"features": feature_epochs, "warmup": warmup_epochs, "joint": joint_epochs}
        self.stages = {name: epochs for name, epochs in stages.items() if epochs}
        self.least_share, self.head_view, self.tau = least_share, head_view, tau
        self.net = net
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("teacher", "standard")})
        self.reported = "teacher"
        self.register_buffer("counts", torch.tensor(info.labeled_counts), persistent=False)
        most = max(info.labeled_counts) if enhancement == "offline" else 0
        self.register_buffer("enhanced", torch.zeros(info.num_classes, most, num_features(net)))
        # Drawn from what the run's seed has seeded, so that it follows from that seed.
        self.register_buffer("seed", torch.randint(2**31, ()))

    def starts(self) -> tuple[float, ...]:
        epochs = list(self.stages.values())
        return tuple(sum(epochs[:i]) / sum(epochs) for i in range(len(epochs)))

    def _stage(self, stage: int) -> str:
        return list(self.stages)[stage]

    def groups(self, stage: int) -> tuple[ParamGroup, ...]:
        frozen = {"features": ("heads.teacher",), "warmup": ("net", "heads.standard"), "joint": ()}
        return tuple(ParamGroup(name, frozen=True) for name in frozen[self._stage(stage)])

    def begin(self, stage: int, look: Look) -> None:
        if self._stage(stage) != "warmup":
            return
        require_trained(self.net, "Name a run by start_from, or set method.feature_epochs above 0.")
        if self.enhanced.shape[1]:
            labeled, unlabeled = look.features(look.labeled), look.features(look.unlabeled)
            self.enhanced.copy_(enhance(labeled, look.labels.to(labeled.device), unlabeled, int(self.seed)))

    def inputs(self, batch: Batch, ctx: Context) -> Inputs | None:
        """What the teacher head draws; None where it does not learn yet."""
        if self._stage(ctx.stage) == "features":
            return None
        rows, device = world_size() * len(batch.labels["balanced"]), batch.images.device
        classes, most, _ = self.enhanced.shape
        chance, share = share_of_rank(torch.rand(rows, 2, generator=ctx.generator, device=device)).unbind(1)
        draws = Draws(None, chance, self.least_share + (1 - self.least_share) * share)
        if self._stage(ctx.stage) == "joint":
            return Inputs(joint=draws)
        if most:
            picked = torch.randint(classes * most, (rows,), generator=ctx.generator, device=device)
            draws = draws._replace(picked=share_of_rank(picked))
        return Inputs(warmup=draws)

    def prepare(self, batch: Batch, inputs: Inputs | None, averaged: Averaged) -> tuple[Batch, Prepared | None]:
        student = [("labeled", "weak"), ("unlabeled", "strong")]
        if inputs is None:
            return batch.only(*student, ("unlabeled", "weak")), None
        if inputs.joint is not None:
            return batch.only(*student), self._blend(batch, inputs.joint, averaged, [batch.of("unlabeled", "weak")])
        draws: Draws = inputs.warmup  # type: ignore[assignment]
        if draws.picked is None:
            return batch.only(), self._blend(batch, draws, averaged, [])
        targets, place = draws.picked // self.enhanced.shape[1], draws.picked % self.enhanced.shape[1]
        features = self.enhanced[targets, place]
        return batch.only(), Prepared(features, targets, place >= self.counts[targets], None)

    def _blend(self, batch: Batch, draws: Draws, averaged: Averaged, weak: list[Tensor]) -> Prepared:
        """Enhance the features of a step."""
        images = [batch.of(stream, self.head_view) for stream in ("balanced", "any")] + weak
        first, second, *rest = averaged(torch.cat(images)).split([len(part) for part in images])
        targets = batch.labels["balanced"]
        enhanced = draws.chance < blending_chance(self.counts)[targets]
        share = torch.where(enhanced, draws.share, 1.0).unsqueeze(1)
        return Prepared(share * first + (1 - share) * second, targets, enhanced, rest[0] if rest else None)

    def objective(
        self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Prepared | None
    ) -> Out:
        parts, logs, pseudo, teacher = {}, {}, None, self.heads["teacher"]
        weak: Tensor | None
        if prepared is None:
            weak = joint["unlabeled"]["weak"].logits["standard"]
        else:
            parts["head"] = losses.labeled_loss(teacher(prepared.features), prepared.targets)
            logs[ENHANCED.name] = prepared.enhanced.float().mean()
            weak = None if prepared.weak is None else teacher(prepared.weak)
        if weak is not None:
            pseudo = losses.harden(losses.linear_pseudo_label(weak), self.tau)
            used, strong = pseudo.mask.float(), joint["unlabeled"]["strong"].logits["standard"]
            parts["labeled"] = losses.labeled_loss(joint["labeled"]["weak"].logits["standard"], labels["labeled"])
            parts["unlabeled"] = losses.unlabeled_loss(strong, pseudo.target, used)
            logs |= {USED.name: used.mean(), CONFIDENCE.name: pseudo.confidence.mean()}
        logs |= {f"loss/{name}": part.detach() for name, part in parts.items()}
        return Out(torch.stack(list(parts.values())).sum(), logs, pseudo)
