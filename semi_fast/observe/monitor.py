"""What is measured while a run trains: wires meter, stopwatch and pseudo-label counts to model and data."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator

from pipelines import Batch, Loaders
from semi_fast.config import Settings
from semi_fast.methods import Method
from semi_fast.observe.ceiling import measure_ceiling
from semi_fast.observe.health import Health
from semi_fast.observe.meter import Meter
from semi_fast.processes.gather import gather_ranks


def watch(
    meter: Meter, settings: Settings, accel: Accelerator, method: Method, data: Loaders, batch: Batch, compiled: bool
) -> None:
    """Let the meter measure a run from its first step on: times by phase, pseudo-labels, statistics, the ceiling.

    Changes nothing that training computes.

    Args:
        meter: of the run.
        batch: the first batch.
        compiled: whether the network is compiled.
    """
    device, world = accel.device, accel.num_processes
    method.phase = data.phase = meter.phase
    meter.statistics = partial(method.statistics, settings.batch * world)
    if method.views:
        meter.health = Health(data.info, torch.from_numpy(data.hidden_labels()).to(device))
    meter.samples_per_step = (settings.batch + (settings.mu * settings.batch if method.views else 0)) * world
    if settings.ceiling == "on":
        classes = data.info.num_classes
        mode = settings.compile.mode if compiled else None
        rate = measure_ceiling(method.net, classes, batch, settings.optim, accel.autocast, compiled=mode)
        meter.ceiling = float(gather_ranks(torch.tensor([rate], device=device)).sum())
    meter.restart()
