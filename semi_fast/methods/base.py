"""What every training method has in common: its interface. `docs/methods.md` has a complete example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pipelines.batch import Batch, Stream
from semi_fast.parts.figures import Figure
from semi_fast.parts.forward import Joint, forward_jointly, forward_rows, full_precision
from semi_fast.parts.groups import ParamGroup, combined
from semi_fast.parts.losses import PseudoLabels
from semi_fast.processes.gather import world_size

EPOCHS = 500  # notional epochs of a stage, whatever its steps: "20 warm-up epochs" are 4 % of it


class Context(NamedTuple):
    """Where a run stands. Step, epoch and progress are those of the stage."""

    step: int  # from 0
    epoch: int  # notional epoch in [0, EPOCHS)
    progress: float  # share of the stage done, in [0, 1)
    stage: int = 0
    generator: torch.Generator | None = None  # seeded by the run's seed and its step, the same on every rank

    @classmethod
    def at(cls, step: int, steps: int, **more: Any) -> Context:
        """The context of step ``step`` in a stage of ``steps``; the epoch is exact, without a float's rounding."""
        return cls(step, step * EPOCHS // steps, step / steps, **more)


def begins_part(ctx: Context, parts: int) -> bool:
    """Whether a step is the first of one of so many equal parts of its stage, the first part left out."""
    if ctx.step == 0:
        return False
    steps = round(ctx.step / ctx.progress)
    return ctx.step * parts // steps > (ctx.step - 1) * parts // steps


class Averaged(Protocol):
    """The averaged network, in eval mode and without gradient."""

    def __call__(self, images: Tensor, of: Callable[[Method, Tensor], Tensor] | None = None) -> Tensor:
        """Features (n, d) float32 of images (n, 3, H, W), or what ``of`` makes of the averaged method and of them."""
        ...


class Out(NamedTuple):
    """What a method makes of one batch."""

    loss: Tensor  # scalar float32, with gradient
    # Detached 0-dim tensors left on the device; each part of the loss, as it enters the sum, is "loss/<part>".
    logs: dict[str, Tensor]
    pseudo: PseudoLabels | None = None  # of the images of the stream "unlabeled", in their order; for the log alone


class Look(Protocol):
    """What a method sees of run and data between two steps, never inside one."""

    labeled: Tensor  # (n,) int64, the labeled rows of train.npy as they were built
    labels: Tensor  # (n,) int64, their classes
    unlabeled: Tensor  # (m,) int64, the unlabeled rows

    def logits(self, rows: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) float32 of these rows by head: averaged network, plain views, all ranks together."""
        ...

    def features(self, rows: Tensor) -> Tensor:
        """Features (n, d) float32 of these rows, likewise."""
        ...

    def relabel(self, rows: Tensor, labels: Tensor) -> None:
        """In ``begin`` alone: let the labeled streams read these rows as of these classes from now on. (n,) int64."""
        ...

    def restart(self) -> None:
        """In ``begin`` alone: put parameters, the network's statistics, averages and optimizer back to step 0.

        The method's own buffers are the method's to reset.
        """
        ...


class Method(nn.Module, ABC):
    """A training method: it owns the network, its heads, and all running statistics as buffers.

    A step is what it takes in from outside (``inputs``), what comes before the network (``prepare``), one joint
    forward, then the objective. The last two compile whole, which tests ask of every method (``fullgraph=True``), and
    never again within a stage. All but ``inputs`` may be recorded once, as one graph, and replayed for every step
    of a stage: what changes from step to step enters through the batch and through ``inputs`` alone.

    The loop owns backward, optimizer, EMA, schedule, logging and checkpoints. The keyword-only arguments of a method's
    constructor, with their annotations, are the schema of its options (see ``semi_fast.methods.build_method``).
    Buffers are written in place, never replaced: the averaged network shares them.
    """

    figures: ClassVar[tuple[Figure, ...]] = ()  # of its own, among what ``objective`` logs and ``statistics`` gives

    net: nn.Module  # images (n, 3, H, W) -> features (n, net.num_features)
    heads: nn.ModuleDict  # name -> classifier (n, d) -> (n, K), in the order in which they are reported
    reported: str  # the prediction that the run is judged by
    weights: Literal["averaged", "raw"] = "averaged"  # those that the run is judged by
    net_groups: tuple[ParamGroup, ...] = ()  # of the network, whatever the method: as the settings say
    streams: dict[str, Stream]  # what it reads each step; "labeled" is among them
    relabels: bool = False  # whether it will call ``look.relabel``, which not every back end can do

    def inputs(self, batch: Batch, ctx: Context) -> Any:
        """What a step takes in besides its batch: schedules as 0-dim tensors on the batch's device, random draws.

        Called before every step, and never recorded: what is due every n steps is done here, in buffers. Never waits
        for the device.

        Args:
            batch: its images may not be there yet; shapes, device, labels and rows are.
            ctx: the step.

        Returns: tensors, in tuples; or None. Their number and shapes change with the stage alone, and may select what
            the stage computes.
        """
        return None

    def prepare(self, batch: Batch, inputs: Any, averaged: Averaged) -> tuple[Batch, Any]:
        """What comes before the forward and is not compiled: mix images, ask the averaged network.

        Never waits for the device. Nothing changes from step to step but the tensors of ``batch`` and ``inputs``.

        Returns: the batch the network sees, and what ``objective`` gets as ``prepared``: tensors, or None. A batch of
            no groups (``batch.only()``) is no forward: where a stage trains but a head, the network is left out.
        """
        return batch, inputs

    @abstractmethod
    def objective(self, joint: Joint, labels: dict[str, Tensor], rows: dict[str, Tensor], prepared: Any) -> Out:
        """The loss of a step from its joint forward; updates the running statistics after the losses are formed.

        No host sync, no dynamic shape, and nothing that changes from step to step but tensors.

        Args:
            joint: the rows of each stream and view, float32.
            labels: (n,) int64 of each labeled stream.
            rows: (n,) int64 of each stream, the rows of train.npy its images are.
            prepared: what ``prepare`` made.
        """

    def forward(self, batch: Batch, inputs: Any, averaged: Averaged) -> Out:
        """One training step's loss. Updates the method's running statistics; never waits for the device."""
        batch, prepared = self.prepare(batch, inputs, averaged)
        joint = forward_jointly(self.net, self.heads, batch)
        with full_precision(batch.images):
            return self.objective(joint, batch.labels, batch.rows, prepared)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (n, K) float32 of images (n, 3, H, W) by name, as they are evaluated."""
        return self.corrected(forward_rows(self.net, self.heads, images).logits)

    def corrected(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """The predictions that are evaluated, from the logits of every head: those themselves, unless overridden."""
        return logits

    def starts(self) -> tuple[float, ...]:
        """Where the stages begin, as shares of the run in [0, 1): 0 first, each after the one before."""
        return (0.0,)

    def begin(self, stage: int, look: Look) -> None:
        """Called once before the first step of every stage. What it chooses must lie in buffers or with ``look``."""
        return

    def measured(self, ctx: Context, look: Look) -> None:
        """Called after every evaluation. What it learns must lie in buffers; it can neither relabel nor restart."""
        return

    def idle(self, stage: int) -> Collection[str]:
        """The streams of which no network sees an image in a stage: rate, time left and plans do not count them."""
        return ()

    def groups(self, stage: int) -> tuple[ParamGroup, ...]:
        """Learning-rate factors and frozen parts in a stage; none: everything trains alike."""
        return ()

    def all_groups(self, stage: int) -> tuple[ParamGroup, ...]:
        """``groups`` of a stage and the network's own together."""
        return combined(self.groups(stage), self.net_groups, [name for name, _ in self.named_parameters()])

    def statistics(self, labeled_rows: int) -> dict[str, Tensor]:
        """Running statistics as they stand, for the log, which asks once a window: 0-dim or (K,), on the device.

        NaN where there is nothing to tell yet. The same on every rank.

        Args:
            labeled_rows: labeled images of a step, all processes together.
        """
        return {}


def compile_parts(method: Method, mode: str) -> None:
    """Compile a method's network, in that mode of torch.compile, and its objective.

    The network once for each number of images that stages have: one program for all numbers would know none of them.
    The objective in the default mode: what it hands out and the buffers it writes are no place for CUDA graphs. Of
    several processes none compiles it, as its collectives would cut it to pieces.
    """
    method.net.compile(mode=mode, dynamic=False)
    if world_size() == 1:
        method.objective = torch.compile(method.objective)  # type: ignore[method-assign]


def two_streams(strong_views: int) -> dict[str, Stream]:
    """A weak view of each labeled image; one weak and ``strong_views`` strong views of each unlabeled image."""
    return {
        "labeled": Stream("labeled", ("weak",)),
        "unlabeled": Stream("unlabeled", ("weak",) + ("strong",) * strong_views),
    }
