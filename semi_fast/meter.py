"""Throughput and logged figures of a run, gathered without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Figures since the last reading."""

    logs: dict[str, float]  # mean over the accepted steps; empty when there was none
    images_per_s: float  # images through the network (labeled, and every view of the unlabeled) per second
    data_wait: float  # share of the time spent waiting for data, in [0, 1]
    seconds: float  # wall time, without what was paused
    steps: int  # accepted or not


class Meter:
    """Collects what each step logged, on the device, and reads it all with one transfer a window.

    Args:
        images_per_step: images through the network in one step, all processes together.
        step: the number of steps already done.
        accepts: takes a step (counted from 1) and its figures; False leaves them out of the means. It may raise, and
            remove figures that are not meant for the log.
    """

    def __init__(
        self,
        images_per_step: int,
        step: int = 0,
        accepts: Callable[[int, dict[str, float]], bool] = lambda step, figures: True,
    ) -> None:
        self.images_per_step, self._accepts = images_per_step, accepts
        self.step = step  # steps read so far
        self.training_seconds = 0.0  # wall time of all timed steps
        self.training_steps = 0  # timed steps
        self._untimed = 1  # the first step of a session compiles what it uses
        self.restart()

    def restart(self) -> None:
        """Start a window now and forget the one under way."""
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []
        self._waited = self._paused = 0.0
        self._start = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent within the block is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the block (evaluation, saving) does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def add(self, loss: Tensor, logs: dict[str, Tensor]) -> None:
        """Take in one step's scalars; they stay on the device."""
        names = ("loss/total", *logs)
        self._rows.append((names, torch.stack([loss.detach(), *logs.values()]).float()))
        if self._untimed and len(self._rows) == self._untimed:
            self._waited = self._paused = 0.0
            self._start = time.perf_counter()

    def read(self) -> Window:
        """Close the window: the only place where the host waits for the device. Raises what `accepts` does."""
        values = torch.cat([row for _, row in self._rows]).tolist() if self._rows else []
        now = time.perf_counter()
        seconds = max(1e-9, now - self._start - self._paused)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        place = 0
        for offset, (names, _) in enumerate(self._rows):
            row = dict(zip(names, values[place : place + len(names)], strict=True))
            place += len(names)
            if not self._accepts(self.step + offset + 1, row):
                continue
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value
                counts[name] = counts.get(name, 0) + 1
        steps = len(self._rows)
        timed = steps - self._untimed
        window = Window(
            {name: sums[name] / counts[name] for name in sums},
            timed * self.images_per_step / seconds,
            min(1.0, self._waited / seconds),
            seconds,
            steps,
        )
        self.step += steps
        self.training_steps += timed
        self.training_seconds += seconds if timed else 0.0
        self._untimed = 0
        self.restart()
        self._start = now
        return window

    @property
    def images_per_s(self) -> float:
        """Images through the network per second over all timed steps read so far; 0 before the first."""
        return self.training_steps * self.images_per_step / max(1e-9, self.training_seconds)
