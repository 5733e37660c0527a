"""Learning-rate schedules: pure functions of the step and the steps of a stage."""

from __future__ import annotations

import math

from semi_fast.config import OptimSettings

END_ANGLES = {"cosine_7_16": 7 / 16, "cosine_1_16": 1 / 16, "constant": 0.0}  # cos(angle * pi * progress)


def learning_rate(optim: OptimSettings, step: int, steps: int) -> float:
    """The learning rate of a step: base rate x schedule x warm-up.

    Args:
        optim: the optimizer's settings. `warmup` and the places of `milestones` are shares of the stage, rounded to
            whole steps: warm-up over n steps makes step s use (s + 1) / n of the rate, and a milestone holds from its
            step on.
        step: from 0, of the stage. steps: of the stage.
    """
    progress, factor = step / steps, 1.0
    if optim.schedule == "cosine":
        factor = (1 + math.cos(math.pi * progress)) / 2
    elif optim.schedule == "milestones":
        factor = math.prod(factor for share, factor in optim.milestones if step >= round(share * steps))
    else:
        factor = math.cos(END_ANGLES[optim.schedule] * math.pi * progress)
    warmup = round(optim.warmup * steps)
    return optim.lr * factor * min(1.0, (step + 1) / warmup if warmup else 1.0)
