"""What every training method has in common: its interface, and the one forward over all rows of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.batch import Batch
from semi_fast.parts.figures import Figure
from semi_fast.parts.losses import PseudoLabels
from semi_fast.processes.gather import world_size

EPOCHS = 500  # notional epochs of a run, whatever its steps: "20 warm-up epochs" are 4 % of it


class Context(NamedTuple):
    """Where a run stands."""

    step: int  # from 0
    epoch: int  # notional epoch in [0, EPOCHS)
    progress: float  # share of the run done, in [0, 1)

    @classmethod
    def at(cls, step: int, steps: int) -> Context:
        """The context of step ``step`` in a run of ``steps``; the epoch is exact, without a float's rounding."""
        return cls(step, step * EPOCHS // steps, step / steps)


class Out(NamedTuple):
    """What a method makes of one batch."""

    loss: Tensor  # scalar float32, with gradient
    logs: dict[
        str, Tensor
    ]  # detached 0-dim tensors left on the device; each part of the loss, as it enters the sum: "loss/<part>"
    pseudo: PseudoLabels | None = None  # of the unlabeled images, in their order; for the log alone


class Rows(NamedTuple):
    """Some rows of the joint forward: features and logits of the same images, in the same order."""

    features: Tensor  # (n, d) float32
    logits: tuple[Tensor, ...]  # (n, K) float32, one per head


class Joint(NamedTuple):
    """The joint forward taken apart again. A method without views has 0 weak and strong rows."""

    labeled: Rows  # B_l rows
    weak: Rows  # B_u rows
    strong: Rows  # V * B_u rows, view-major: row v * B_u + u is view v of image u


def _untimed(phase: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Method(nn.Module, ABC):
    """A training method: it owns the network, its heads, and all running statistics as buffers.

    A step is one joint forward through the network, then the objective. Both compile whole (``torch.compile`` with
    ``fullgraph=True``) and never again, whatever the step.

    The loop owns backward, optimizer, EMA, schedule, logging and checkpoints. The keyword-only arguments of a method's
    constructor, with their annotations, are the schema of its options (see ``semi_fast.methods.build_method``).
    Evaluation reads only parameters and the buffers of ``net``; all other buffers serve training alone.
    """

    figures: ClassVar[tuple[Figure, ...]] = ()  # of its own, among what it logs
    weights: Literal["averaged", "raw"] = "averaged"  # those that the run is judged by
    views: tuple[str, ...]  # what to make of each unlabeled image, e.g. ("weak", "strong", "strong")
    net: nn.Module  # images (n, 3, H, W) -> features (n, net.num_features)
    phase: Callable[[str], AbstractContextManager[Any]] = staticmethod(_untimed)  # whoever measures time sets it

    @abstractmethod
    def heads(self) -> list[nn.Module]:
        """Features (n, d) -> logits (n, K), in the order of ``Rows.logits``."""

    @abstractmethod
    def objective(self, joint: Joint, labels: Tensor, rows: Tensor, schedule: Any) -> Out:
        """The loss of a step from its joint forward; updates the running statistics after the losses are formed.

        No host sync, no dynamic shape, and nothing that changes from step to step but tensors.

        Args:
            joint: B_l labeled, B_u weak and V * B_u strong rows, float32.
            labels: (B_l,) int64.
            rows: (B_u,) int64, the rows of train.npy the unlabeled images are.
            schedule: what ``schedule`` made.
        """

    def schedule(self, ctx: Context, device: torch.device) -> Any:
        """What of the objective depends on the progress of the run: tensors, or None where nothing does."""
        return None

    def forward(self, batch: Batch, ctx: Context) -> Out:
        """One training step's loss. Updates the method's running statistics; never waits for the device."""
        joint = forward_jointly(self.net, self.heads(), batch)
        with full_precision(batch.x):
            return self.objective(joint, batch.y, batch.u_rows, self.schedule(ctx, batch.x.device))

    def compile_parts(self, mode: str) -> None:
        """Compile the network, in that mode of torch.compile, and the objective.

        The objective in the default mode: what it hands out and the buffers it writes are no place for CUDA graphs.
        Of several processes none compiles it, as its collectives would cut it to pieces.
        """
        self.net.compile(mode=mode)
        if world_size() == 1:
            self.objective = torch.compile(self.objective)  # type: ignore[method-assign]

    @abstractmethod
    def predict_heads(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) float32 of images (n, 3, H, W), one entry per head; the first is the head that is reported."""

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        """Running statistics as they stand, for the log, which asks once a window: 0-dim or (K,), on the device.

        NaN where there is nothing to tell yet. The same on every rank.

        Args:
            labeled_rows: labeled images of a step, all processes together.
        """
        return {}

    def timed(self, phase: str) -> AbstractContextManager[Any]:
        """A context that counts as `phase` of the step; within a compiled graph, which has no clock, as nothing."""
        return nullcontext() if torch.compiler.is_compiling() else self.phase(phase)

    @property
    def reported(self) -> str:
        """The prediction that the run is judged by."""
        return "balanced" if getattr(self, "balanced_head", None) is not None else "standard"

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) float32 of images (n, 3, H, W) by name."""
        return self.predict_heads(x)


def num_features(net: nn.Module) -> int:
    """Size d of the features a network returns, which it must have as its attribute ``num_features``."""
    size = getattr(net, "num_features", None)
    if not isinstance(size, int):
        raise TypeError(f"A network needs an integer attribute num_features, got {size!r} from {type(net).__name__}.")
    return size


def linear_head(net: nn.Module, classes: int) -> nn.Linear:
    """A linear classifier on a network's features, (n, d) -> (n, classes): Xavier-normal weight, zero bias."""
    head = nn.Linear(num_features(net), classes)
    nn.init.xavier_normal_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def forward_rows(net: nn.Module, heads: Sequence[nn.Module], x: Tensor) -> Rows:
    """Features and every head's logits of images x (n, 3, H, W), in float32 even under autocast."""
    features = net(x)
    return Rows(features.float(), tuple(head(features).float() for head in heads))


def forward_jointly(net: nn.Module, heads: Sequence[nn.Module], batch: Batch) -> Joint:
    """One forward over labeled, weak and strong rows together, taken apart into features *and* logits at once.

    BatchNorm sees one joint batch of B_l + (1 + V) B_u rows. *released*: the authors' code slices the features from an
    interleaved batch and the logits from the de-interleaved one, so that bank, prototypes and L_EA see other images'
    labels; taking both apart in this one function rules that out.

    Args:
        net: images -> features (n, d).
        heads: features -> logits (n, K), any number of them.
        batch: its views are (weak, strong, ..., strong), or none.
    """
    rows = forward_rows(net, heads, torch.cat([batch.x, *batch.u]))
    labeled, weak = batch.x.shape[0], batch.u[0].shape[0] if batch.u else 0
    sizes = [labeled, weak, rows.features.shape[0] - labeled - weak]
    logits = [part.split(sizes) for part in rows.logits]
    parts = [Rows(f, tuple(head[i] for head in logits)) for i, f in enumerate(rows.features.split(sizes))]
    return Joint(*parts)


def full_precision(x: Tensor) -> torch.autocast:
    """A context for losses and statistics on x's device: autocast off, so that float32 stays float32."""
    return torch.autocast(x.device.type, enabled=False)


def view_names(strong: int) -> tuple[str, ...]:
    """The views of a method with one weak and ``strong`` strong views of each unlabeled image."""
    return ("weak",) + ("strong",) * strong
