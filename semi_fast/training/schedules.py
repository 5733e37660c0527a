"""Learning-rate schedules: pure functions of the progress of a run."""

from __future__ import annotations

import math


def cosine_7_16(progress: float) -> float:
    """Factor on the base learning rate: cos(7/16 * pi * progress).

    Args:
        progress: share of the run done, in [0, 1]. Returns 1 at the start, about 0.195 at the end.
    """
    return math.cos(7 / 16 * math.pi * progress)
