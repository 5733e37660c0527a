"""What a run does for its log, by itself: so that a step can be timed with it and without, and its own time told."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate import Accelerator

from pipelines import Loaders
from semi_fast.methods import Method
from semi_fast.observe.health import Health
from semi_fast.observe.meter import Meter, Usage
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.observe.tracking import open_tracker
from semi_fast.run.log import LogWriter
from semi_fast.training.step import Done

WINDOW = 50  # steps between two lines of the log, as `log_every` is by default


class Logging:
    """Meter, pseudo-label counts, log.jsonl and W&B (offline), as train.py has them.

    Args:
        folder: takes the log.
    """

    def __init__(self, folder: Path, method: Method, data: Loaders, accel: Accelerator) -> None:
        folder.mkdir()
        self.stopwatch = Stopwatch(accel.device)
        self.meter = Meter(self.stopwatch, data.sizes.images_per_step, data.sizes.samples_per_step)
        self.meter.health = Health(data.info.labeled_counts, data.hidden_labels(), data.unlabeled_rows, accel.device)
        self.meter.statistics = lambda: method.statistics(data.sizes.labeled_per_step)
        self.usage, self.steps = Usage(accel.device, print), 0
        self.log = LogWriter(folder / "log.jsonl", print)
        self.tracker = open_tracker(
            "offline", project="benchmark", name="step", folder=folder, config={}, say=lambda line: None
        )

    def step(self, done: Done) -> None:
        """Take in a step; every WINDOW-th is logged."""
        self.meter.count(done.pseudo)
        self.meter.add(done.names, done.figures)
        self.steps, self.last = self.steps + 1, done
        if self.steps % WINDOW == 0:
            figures = {**self.meter.close(self.meter.fetch()), **self.usage.read()}
            self.log.write({"kind": "train", "step": self.steps, "time": time.time(), **figures})
            self.tracker.log(figures, self.steps)

    def window(self, done: Done) -> None:
        """All that logging does in WINDOW steps: phases, figures, and their line."""
        for _ in range(WINDOW):
            for phase in ("forward_backward", "data_wait", "augment", "optimizer"):
                with self.stopwatch.phase(phase):
                    pass
            self.step(done)

    def close(self) -> None:
        """Close the W&B run."""
        self.tracker.finish()
