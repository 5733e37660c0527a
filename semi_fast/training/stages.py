"""The stages of a run: which step belongs to which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data_prep.errors import UserError
from pipelines.batch import Sizes
from semi_fast.methods.base import Method


class Stage(NamedTuple):
    """A stretch of a run's steps."""

    number: int  # from 0
    first: int  # the step of the run that it begins with
    steps: int


class Stages:
    """The stages of a run of `steps` steps.

    Args:
        starts: where they begin, as shares of the run, rounded to steps that leave each stage one at least: 0 first,
            each after the one before, below 1.

    Raises: ValueError for other starts; UserError where the run is too short to give each stage a step.
    """

    def __init__(self, starts: Sequence[float], steps: int) -> None:
        if not starts or starts[0] != 0 or sorted(set(starts)) != list(starts) or starts[-1] >= 1:
            raise ValueError(f"stages must start at 0 and ascend below 1, got {tuple(starts)}")
        if steps < len(starts):
            raise UserError(f"steps={steps} is too few for the {len(starts)} stages of the method. Set steps higher.")
        firsts: list[int] = []
        for number, share in enumerate(starts):
            earliest, latest = firsts[-1] + 1 if firsts else 0, steps - len(starts) + number
            firsts.append(min(max(round(share * steps), earliest), latest))
        ends = [*firsts[1:], steps]
        self._stages = [Stage(i, firsts[i], ends[i] - firsts[i]) for i in range(len(starts))]

    def at(self, step: int) -> Stage:
        """The stage of a step of the run; the end of the run belongs to the last."""
        return next(stage for stage in reversed(self._stages) if stage.first <= step)

    def left(self, step: int) -> dict[int, int]:
        """Steps still to come once `step` steps are done, by the number of their stage."""
        return {stage.number: max(0, stage.steps - max(0, step - stage.first)) for stage in self._stages}


def images_left(method: Method, sizes: Sizes, stages: Stages, step: int) -> int:
    """Images that still pass through the network, of all processes, once `step` steps are done."""
    return sum(steps * sizes.images_without(method.idle(stage)) for stage, steps in stages.left(step).items())
