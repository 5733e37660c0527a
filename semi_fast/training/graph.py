"""A step that is recorded once a stage and replayed: one launch for hundreds.

What changes from step to step lies in tensors that stay where they are: batch and inputs of the method in the slots
kept here, learning rate, decay and whatever is trained in those of their owners. The batch is copied into its slot on
the device: for 256 images of 32 px in bf16, 3 MB read and written, a microsecond of an H100. Two slots that the
pipeline writes into by turns would save no more than that, and need two recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pipelines import Batch
from semi_fast.training.step import Done, Trainer, device_step

WARM_UP = 3  # steps launched one by one before one is recorded: libraries choose and compile what they use

Step = Callable[[], Done]


class Recorder(Protocol):
    """How a step is recorded."""

    def launch(self, step: Step) -> Done:
        """Make the step, operation by operation, where it is going to be recorded."""
        ...

    def record(self, step: Step) -> Step:
        """The recorded step. Recording it makes no step; each call does, and returns the same tensors.

        Raises: an exception of whatever class where it cannot be recorded.
        """
        ...


class CudaRecorder:
    """Records a CUDA graph on a stream of its own, on which the steps before were launched, too."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def launch(self, step: Step) -> Done:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            done = step()
        current.wait_stream(self._stream)
        return done

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # The outer context: a recording that breaks off would leave its stream the current one. The error mode: the
        # loaders' threads go on, and may allocate.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._stream.device)),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            done = step()

        def replay() -> Done:
            graph.replay()
            return done

        return replay


class HostRecorder:
    """Where there are no CUDA graphs: the step itself, from the same slots, its figures in the same tensors."""

    def launch(self, step: Step) -> Done:
        return step()

    def record(self, step: Step) -> Step:
        kept: Done | None = None

        def replay() -> Done:
            nonlocal kept
            done = step()
            kept = kept or done
            kept.figures.copy_(done.figures)
            if kept.pseudo is not None and done.pseudo is not None:
                kept.pseudo.copy_(done.pseudo)
            return kept

        return replay


def make_recorder(device: torch.device) -> Recorder:
    """What records steps on this device."""
    return CudaRecorder(device) if device.type == "cuda" else HostRecorder()


class StepGraph:
    """The device's part of the steps of a run, recorded anew in every stage.

    Where it cannot be recorded, or a batch has other shapes than the one before, it says so once and launches every
    operation by itself from there on, as without a graph; the numbers are the same to the bit.

    Args:
        trainer: prepared.
        recorder: of its device.
        say: takes the line that says why steps are not recorded any more.
    """

    def __init__(self, trainer: Trainer, recorder: Recorder, say: Callable[[str], None]) -> None:
        self._trainer, self._recorder, self._say = trainer, recorder, say
        self._given_up = False
        self._made = self._replayed = 0  # since `replayed_share` was last asked for
        self.restart()

    def restart(self) -> None:
        """Forget slots and recording: what is trained, or what the method takes in, is another from here on."""
        self._replay: Step | None = None
        self._slots: list[Tensor] = []
        self._launched = 0

    def __call__(self, batch: Batch, inputs: Any) -> Done:
        """Make a step; what it returns is overwritten by the next."""
        self._made += 1
        if self._given_up:
            return self._launch(batch, inputs)
        given = [batch.images, *batch.labels.values(), *batch.rows.values(), *_tensors(inputs)]
        if not self._slots:
            self._batch, self._inputs = tree_map_only(Tensor, torch.clone, (batch, inputs))
            slots = self._batch.images, *self._batch.labels.values(), *self._batch.rows.values()
            self._slots = [*slots, *_tensors(self._inputs)]
            self._forms = _form(self._slots)
        elif _form(given) != self._forms:
            self._give_up("the batch or what the method takes in has another shape than in the step before")
            return self._launch(batch, inputs)
        else:
            torch._foreach_copy_(self._slots, given)
        if self._launched < WARM_UP:
            self._launched += 1
            return self._recorder.launch(self._step)
        if self._replay is None:
            try:
                self._replay = self._record()
            # The driver under torch and that under numba have classes of their own for a refusal. What is wrong with
            # the step rather than with recording it, the launched step that follows raises again.
            except Exception as error:
                self._give_up(" ".join(f"{type(error).__name__}: {error}".split())[:300])
                return self._launch(batch, inputs)
        self._replayed += 1
        return self._replay()

    def replayed_share(self) -> float:
        """Of the steps since the last call, the share that was replayed, in [0, 1]; 0 where there were none."""
        share = self._replayed / max(1, self._made)
        self._made = self._replayed = 0
        return share

    def _launch(self, batch: Batch, inputs: Any) -> Done:
        return device_step(self._trainer, batch, inputs, self._trainer.phase)

    def _step(self) -> Done:
        return device_step(self._trainer, self._batch, self._inputs)

    def _record(self) -> Step:
        groups = [group for group in self._trainer.optimizer.param_groups if "capturable" in group]
        try:
            for group in groups:  # a fused optimizer always is, and yet asks
                group["capturable"] = True
            return self._recorder.record(self._step)
        finally:
            for group in groups:
                group["capturable"] = False
            self._trainer.optimizer.zero_grad(set_to_none=True)  # of a recording that broke off

    def _give_up(self, reason: str) -> None:
        self._say(f"warning: graph: off from here on ({reason})")
        self._given_up = True
        self.restart()


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """The tensors of what a method takes in: one, or tuples of them, or None."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif inputs is not None:
        for part in inputs:
            yield from _tensors(part)


def _form(tensors: list[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tensors]
