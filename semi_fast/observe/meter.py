"""Throughput and logged figures of a run, gathered without making the host wait for the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from semi_fast.observe.health import Health
from semi_fast.observe.stopwatch import Mark, Stopwatch
from semi_fast.parts.losses import PseudoLabels
from semi_fast.processes.gather import sum_ranks, world_size

CPU = torch.device("cpu")


class Window(NamedTuple):
    """Figures since the last reading."""

    logs: dict[str, float]  # mean over the accepted steps and all processes; empty when there was none
    images_per_s: float  # images through the network (labeled, and every view of the unlabeled) per second
    data_wait: float  # share of the time spent on getting data, in [0, 1]
    seconds: float  # wall time, without what was paused
    steps: int  # accepted or not
    more: dict[str, float | list[float]]  # times by phase, pseudo-labels and statistics

    @property
    def figures(self) -> dict[str, float | list[float]]:
        """Everything, by the names of `semi_fast.observe.metrics`."""
        own = {"throughput/images_per_s": self.images_per_s, "time/data_wait_share": self.data_wait}
        return {**self.logs, **own, **self.more}


class Fetched(NamedTuple):
    """A window's values on the host."""

    rows: list[dict[str, float]]  # one entry a step
    statistics: dict[str, float | list[float]]
    counts: list[float]  # of the pseudo-labels, all processes together


class Meter:
    """Collects what each step logged, on the device, and reads it all with one transfer a window.

    Attributes that may be set before the first step:
        health: counts the pseudo-labels given to `count`.
        statistics: the method's, asked for once a window.
        samples_per_step: labeled and unlabeled images of a step, all processes together.
        ceiling: images per second the model alone reaches, all processes together; 0 when it is not known.

    Args:
        images_per_step: images through the network in one step, all processes together.
        step: the number of steps already done.
        accepts: takes a step (counted from 1) and its figures; False leaves them out of the means. It may raise, and
            remove figures that are not meant for the log.
        device: where the steps are computed.
    """

    def __init__(
        self,
        images_per_step: int,
        step: int = 0,
        accepts: Callable[[int, dict[str, float]], bool] = lambda step, figures: True,
        device: torch.device = CPU,
    ) -> None:
        self.stopwatch = Stopwatch(device)
        self.health: Health | None = None
        self.statistics: Callable[[], dict[str, Tensor]] = dict
        self.samples_per_step, self.ceiling = 0, 0.0
        self.images_per_step, self._accepts = images_per_step, accepts
        self.step = step  # steps read so far
        self.training_seconds = 0.0  # wall time of all timed steps
        self.training_steps = 0  # timed steps
        self._untimed = 1  # the first step of a session compiles what it uses
        self.restart()

    def restart(self) -> None:
        """Start a window now and forget the one under way."""
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []
        if self.health is not None:
            self.health.take()
        self._start_clocks()

    def _start_clocks(self) -> None:
        self._paused = 0.0
        self.stopwatch.clear()
        self._marks: list[Mark] = [self.stopwatch.mark()]  # the window's start, and the end of every step
        self._start = time.perf_counter()

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time spent within the block belongs to that part of the step: "forward_backward", "optimizer", ..."""
        return self.stopwatch.phase(name)

    def waiting(self) -> AbstractContextManager[None]:
        """Time spent within the block is waiting for data."""
        return self.stopwatch.phase("data_wait")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the block (evaluation, saving) does not count."""
        start = time.perf_counter()
        try:
            with self.stopwatch.stopped():
                yield
        finally:
            self._paused += time.perf_counter() - start
            if not self._rows:
                self._marks = [self.stopwatch.mark()]

    def count(self, pseudo: PseudoLabels | None, rows: Tensor) -> None:
        """Take in one step's pseudo-labels, of the images `rows` of train.npy; they stay on the device."""
        if self.health is not None and pseudo is not None:
            self.health.add(pseudo, rows)

    def add(self, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Take in one step's scalars; they stay on the device."""
        names = ("loss/total", *logs)
        self._rows.append((names, torch.stack([loss.detach(), *logs.values()]).float()))
        if self._untimed and len(self._rows) == self._untimed:
            self._start_clocks()
        self._marks.append(self.stopwatch.mark())

    def read(self) -> Window:
        """Close the window: the only place where the host waits for the device. Raises what `accepts` does."""
        fetched = self._fetch()
        now = time.perf_counter()
        seconds = max(1e-9, now - self._start - self._paused)
        logs = self._means(fetched.rows)
        steps = len(self._rows)
        timed = steps - self._untimed
        times, slowest = self.stopwatch.read(), max(self.stopwatch.seconds(self._marks), default=0.0)
        more: dict[str, float | list[float]] = {}
        if timed > 0:
            more = {f"time/{name}_ms": 1e3 * own / timed for name, own in times.own.items()}
            more |= {"time/step_ms": 1e3 * seconds / timed, "time/slowest_step_ms": 1e3 * slowest}
        rate = timed * self.images_per_step / seconds
        more["throughput/samples_per_s"] = timed * self.samples_per_step / seconds
        if self.ceiling:
            more["throughput/ceiling_share"] = rate / self.ceiling
        more |= fetched.statistics
        if self.health is not None:
            more |= self.health.figures(fetched.counts)
        waited = times.whole.get("data_wait", 0.0)
        window = Window(logs, rate, min(1.0, waited / seconds), seconds, steps, more)
        self.step += steps
        self.training_steps += timed
        self.training_seconds += seconds if timed else 0.0
        self._untimed = 0
        self.restart()
        self._start = now
        return window

    def _fetch(self) -> Fetched:
        """Everything there is on the device, in one transfer."""
        statistics = self.statistics()
        parts = [row for _, row in self._rows] + [value.flatten() for value in statistics.values()]
        if self.health is not None:
            parts.append(sum_ranks(self.health.take()))
        values = torch.cat([part.double() for part in parts]).tolist() if parts else []
        place = 0

        def take(count: int) -> list[float]:
            nonlocal place
            place += count
            return values[place - count : place]

        rows = [dict(zip(names, take(len(names)), strict=True)) for names, _ in self._rows]
        shown: dict[str, float | list[float]] = {}
        for name, tensor in statistics.items():
            found = take(tensor.numel())
            if all(map(math.isfinite, found)):  # NaN: nothing to tell yet
                shown[name] = found if tensor.dim() else found[0]
        return Fetched(rows, shown, take(len(values) - place))

    def _means(self, rows: list[dict[str, float]]) -> dict[str, float]:
        accepted = [row for offset, row in enumerate(rows) if self._accepts(self.step + offset + 1, row)]
        logged: dict[str, list[float]] = {}
        for row in accepted:
            for name, value in row.items():
                logged.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        if world_size() > 1 and means:
            here = torch.tensor(list(means.values()), dtype=torch.float64, device=self._rows[0][1].device)
            means = dict(zip(means, (sum_ranks(here) / world_size()).tolist(), strict=True))
        return means

    @property
    def images_per_s(self) -> float:
        """Images through the network per second over all timed steps read so far; 0 before the first."""
        return self.training_steps * self.images_per_step / max(1e-9, self.training_seconds)
