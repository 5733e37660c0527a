"""Throughput and logged figures of a run, gathered without making the host wait for the device; the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import psutil
import torch
from torch import Tensor

from semi_fast.observe.health import Health
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.processes.gather import sum_ranks, world_size

MIB = 2**20
Figures = dict[str, float | list[float]]  # by the names of the log; a list has one number a class


class Meter:
    """Collects what each step logged, on the device, and reads it all with one transfer a window.

    A window ends with `fetch`, where the host waits for the device, and `close`, which averages the steps to be kept.

    Attributes that may be set before the first step:
        health: counts the pseudo-labels given to `count`.
        statistics: the method's, asked for once a window.
        ceiling: images per second the model alone reaches, all processes together; 0 when it is not known.

    May be set at any time:
        images_per_step: from the next step on.

    Args:
        stopwatch: measures the phases of the steps.
        images_per_step: images through the network in one step, all processes together.
        samples_per_step: labeled and unlabeled images of a step, each counted once, all processes together.
        step: the number of steps already done.
    """

    def __init__(self, stopwatch: Stopwatch, images_per_step: int, samples_per_step: int, step: int = 0) -> None:
        self.health: Health | None = None
        self.statistics: Callable[[], dict[str, Tensor]] = dict
        self.ceiling = 0.0
        self.images_per_step, self.samples_per_step, self._stopwatch = images_per_step, samples_per_step, stopwatch
        self.step = step  # steps of the windows closed so far
        self.training_seconds = 0.0  # wall time of all timed steps
        self.training_steps = 0  # timed steps
        self.training_images = 0  # through the network in them
        self._untimed = 1  # the first step of a session compiles what it uses
        self.restart()

    def take_over(self, steps: int, seconds: float, images: int | None = None) -> None:
        """Count on from an earlier session's timed steps; what saved no images had as many in every step."""
        self.training_steps, self.training_seconds = steps, seconds
        self.training_images = steps * self.images_per_step if images is None else images

    def restart(self) -> None:
        """Start a window now and forget the one under way."""
        if self.health is not None:
            self.health.take()
        self._stopwatch.clear()
        self._open(time.perf_counter())

    def _open(self, now: float) -> None:
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []  # names and values, an entry a step
        self._beside: Figures = {}  # of the window as a whole: statistics, and counts of pseudo-labels
        self._images = 0  # through the network in its timed steps
        self._start, self._paused = now, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within the block (evaluation, saving) does not count."""
        start = time.perf_counter()
        try:
            with self._stopwatch.stopped():
                yield
        finally:
            self._paused += time.perf_counter() - start

    def count(self, pseudo: Tensor | None) -> None:
        """Take in one step's pseudo-labels, (4, B) float64 by `PseudoLabels.table`; they stay on the device."""
        if self.health is not None and pseudo is not None:
            self.health.add(pseudo)

    def add(self, names: tuple[str, ...], figures: Tensor) -> None:
        """Take in one step's figures, (n,) float32, by name; a copy stays on the device."""
        self._rows.append((names, figures.clone()))
        if self._untimed and len(self._rows) == self._untimed:
            self._start, self._paused = time.perf_counter(), 0.0
            self._stopwatch.clear()
        else:
            self._images += self.images_per_step
            self._stopwatch.end_step()

    def fetch(self) -> list[dict[str, float]]:
        """The figures of every step of the window, of this process: one transfer, for which the host waits."""
        statistics = self.statistics()
        parts = [row for _, row in self._rows] + [value.flatten() for value in statistics.values()]
        if self.health is not None:
            parts.append(sum_ranks(self.health.take()))
        values = iter(torch.cat([part.double() for part in parts]).tolist() if parts else [])
        rows = [dict(zip(names, islice(values, len(names)), strict=True)) for names, _ in self._rows]
        for name, tensor in statistics.items():
            numbers = list(islice(values, tensor.numel()))
            if all(map(math.isfinite, numbers)):  # NaN: nothing to tell yet
                self._beside[name] = numbers if tensor.dim() else numbers[0]
        if self.health is not None:
            self._beside |= self.health.figures(list(values))
        return rows

    def close(self, kept: Sequence[dict[str, float]]) -> Figures:
        """Close the window that was fetched; the next one begins.

        Args:
            kept: those of the steps that count, the same ones in every process; their means are over all processes.

        Returns: every figure of the window by name. Without a step kept there is no loss among them.
        """
        now = time.perf_counter()
        seconds, steps = max(1e-9, now - self._start - self._paused), self._timed
        times = self._stopwatch.read()
        rate = self._images / seconds
        figures: Figures = {
            **self._means(kept),
            "throughput/images_per_s": rate,
            "throughput/samples_per_s": steps * self.samples_per_step / seconds,
            "time/data_wait_share": min(1.0, times.whole.get("data_wait", 0.0) / seconds),
        }
        if steps:
            figures |= {f"time/{name}_ms": 1e3 * own / steps for name, own in times.own.items()}
            figures |= {"time/step_ms": 1e3 * seconds / steps}
            figures |= {"time/slowest_step_ms": 1e3 * max(times.steps, default=0.0)}
        if self.ceiling:
            figures["throughput/ceiling_share"] = rate / self.ceiling
        figures |= self._beside
        self.step += len(self._rows)
        self.training_steps += steps
        self.training_images += self._images
        self.training_seconds += seconds if steps else 0.0
        self._untimed = 0
        self._stopwatch.restart_step()
        self._open(now)
        return figures

    def _means(self, rows: Sequence[dict[str, float]]) -> dict[str, float]:
        logged: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                logged.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in logged.items()}
        if world_size() > 1 and means:
            here = torch.tensor(list(means.values()), dtype=torch.float64, device=self._rows[0][1].device)
            means = dict(zip(means, (sum_ranks(here) / world_size()).tolist(), strict=True))
        return means

    @property
    def _timed(self) -> int:
        return max(0, len(self._rows) - self._untimed)

    @property
    def images_per_s(self) -> float:
        """Images through the network per second over all timed steps of closed windows; 0 before the first."""
        return self.training_images / max(1e-9, self.training_seconds)

    @property
    def seconds_per_image(self) -> float | None:
        """Mean wall time, without what was paused, of an image through the network in the timed steps; None before."""
        seconds, images = self.training_seconds, self.training_images + self._images
        if self._timed:
            seconds += time.perf_counter() - self._start - self._paused
        return seconds / images if images else None


class Eta:
    """Seconds to the end of a run: those of its steps, and of evaluations and checkpoints that come between them.

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

    def seconds_left(self, step: int, training_seconds: float | None) -> float | None:
        """Seconds left once `step` steps and what follows them are done.

        Args:
            training_seconds: what the steps still to come will take; None where none was timed yet: then so is what
                is returned.
        """
        if training_seconds is None:
            return None
        left = training_seconds
        for kind, seconds in self._seconds.items():
            every = self._every[kind]
            if step < self._steps:
                left += seconds * (-(-self._steps // every) - step // every)
        return left


class Usage:
    """Reads memory and GPU utilization; what cannot be told is left out.

    Args:
        device: the device of this process.
        say: takes one line, once, where the GPU's utilization cannot be told.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self._device, self._say = device, say
        self._nvml = device.type == "cuda"

    def read(self) -> dict[str, float]:
        """Figures as they stand; never waits for the device."""
        figures = {"memory/host_mb": resident_bytes() / MIB}
        if self._device.type == "cuda":
            figures["memory/device_mb"] = torch.cuda.max_memory_allocated(self._device) / MIB
        if self._nvml:
            try:
                figures["gpu/utilization"] = float(torch.cuda.utilization(self._device))
            except Exception as error:  # NVML is optional: bindings, driver or permission may be missing
                self._nvml = False
                self._say(f"GPU utilization is not logged ({' '.join(f'{type(error).__name__}: {error}'.split())})")
        return figures


def resident_bytes() -> int:
    """Memory this process holds now."""
    return psutil.Process().memory_info().rss
