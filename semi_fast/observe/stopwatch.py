"""How long each part of a step takes: CUDA events on a GPU, a monotonic clock on a CPU, no waiting for either."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch


class Span:
    """A stretch of time between two marks, and the spans within it."""

    __slots__ = ("end", "inner", "name", "start")

    def __init__(self, name: str, start: Mark) -> None:
        self.name, self.start = name, start
        self.end: Mark | None = None
        self.inner: list[Span] = []


Mark = float | torch.cuda.Event


class Times(NamedTuple):
    """Seconds by phase since the last reading."""

    own: dict[str, float]  # without the phases within
    whole: dict[str, float]  # with them


class Stopwatch:
    """Adds up the time of named phases, which may contain each other and may run in other threads.

    On a GPU a phase is what the device does between two events of the current stream: work of the phase, and gaps in
    which it has nothing to do. So a phase in which the host waits costs nothing as long as the device is busy.

    Args:
        device: whose time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._stopped = False
        self._finished: list[Span] = []  # outermost spans; appending is atomic
        self._open = threading.local()
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent within the block belongs to phase `name`."""
        if self._stopped:
            yield
            return
        around: list[Span] = self._open.__dict__.setdefault("spans", [])
        span = Span(name, self.mark())
        around.append(span)
        try:
            yield
        finally:
            around.pop()
            span.end = self.mark()
            (around[-1].inner if around else self._finished).append(span)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Phases that begin within the block are not measured."""
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False

    def mark(self) -> Mark:
        """This moment: of the host, or of the device when it gets there."""
        if not self.on_gpu:
            return time.perf_counter()
        try:
            event = self._spare.pop()
        except IndexError:
            event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: list[Mark]) -> list[float]:
        """Seconds between one mark and the next. On a GPU the device must have passed all of them."""
        found = [_between(a, b) for a, b in pairwise(marks)]
        self._recycle(marks)
        return found

    def read(self) -> Times:
        """Close the window. Spans whose end the device has not reached yet count in the next one."""
        spans, self._finished = self._finished, []
        times = Times({}, {})
        for span in spans:
            if isinstance(span.end, torch.cuda.Event) and not span.end.query():
                self._finished.append(span)
            else:
                self._add(span, times)
        return times

    def clear(self) -> None:
        """Forget what was measured since the last reading."""
        self._finished = []

    def _add(self, span: Span, times: Times) -> float:
        assert span.end is not None, f"phase {span.name} is still open"
        whole = _between(span.start, span.end)
        inner = sum(self._add(part, times) for part in span.inner)
        times.own[span.name] = times.own.get(span.name, 0.0) + whole - inner
        times.whole[span.name] = times.whole.get(span.name, 0.0) + whole
        self._recycle([span.start, span.end])
        return whole

    def _recycle(self, marks: list[Mark]) -> None:
        self._spare += [mark for mark in marks if isinstance(mark, torch.cuda.Event)]


def _between(start: Mark, end: Mark) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert not isinstance(start, float)
    assert not isinstance(end, float)
    return start.elapsed_time(end) / 1e3
