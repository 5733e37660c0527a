"""How long a run will still take."""

from __future__ import annotations

from collections.abc import Mapping


class Eta:
    """Seconds to the end of a run: its steps, and the evaluations and checkpoints that come between them.

    Each evaluation is taken to last as long as the last one did, each checkpoint likewise; one that was never seen
    takes no time, and checkpoints of a new best accuracy are not foreseen.

    Args:
        steps: of the whole run.
        every: by kind, after how many steps it comes again; it comes after the last step, too.
    """

    def __init__(self, steps: int, every: Mapping[str, int]) -> None:
        self._steps, self._every = steps, every
        self._seconds: dict[str, float] = {}

    def took(self, kind: str, seconds: float) -> None:
        """Take note that one evaluation or checkpoint lasted that long."""
        self._seconds[kind] = seconds

    def seconds_left(self, step: int, seconds_per_step: float | None) -> float | None:
        """Seconds left once `step` steps and what follows them are done; None where no step was timed yet."""
        if seconds_per_step is None:
            return None
        left = (self._steps - step) * seconds_per_step
        for kind, seconds in self._seconds.items():
            every = self._every[kind]
            if step < self._steps:
                left += seconds * (-(-self._steps // every) - step // every)
        return left
