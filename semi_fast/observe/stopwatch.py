"""How long each part of a step takes: CUDA events on a GPU, a monotonic clock on a CPU, no waiting for either."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch


class HostEvent:
    """A moment of the host, as torch.cuda.Event is one of the device."""

    def record(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end._time - self._time)


class Stretch(NamedTuple):
    """Time of one thread and queue in which no phase began or ended."""

    phases: tuple[str, ...]  # those under way, the outermost first; none: a whole step
    start: Any
    end: Any


class Times(NamedTuple):
    """Seconds since the last reading."""

    own: dict[str, float]  # by phase, without the phases within
    whole: dict[str, float]  # with them
    steps: list[float]  # of each step


class Stopwatch:
    """Adds up the time of named phases, which may contain each other and may run in other threads.

    On a GPU a phase is what the device does between two events of the current stream: work of the phase, and gaps in
    which it has nothing to do. So a phase in which the host waits costs nothing as long as the device is busy.
    Different streams and threads run beside each other: no phase of one lies within a phase of another. What cannot be
    measured is left out, and never ends a run.

    Args:
        device: whose time counts.
        event: makes an event with `record()`, `query()` and `elapsed_time(end)` in ms; default: one of the device.
        queue: tells where `record()` puts it now: the events of a queue are passed in order.
    """

    def __init__(
        self,
        device: torch.device,
        event: Callable[[], Any] | None = None,
        queue: Callable[[], Hashable] | None = None,
    ) -> None:
        gpu = device.type == "cuda"
        self._event = event or (partial(torch.cuda.Event, enable_timing=True) if gpu else HostEvent)
        self._queue = queue or (torch.cuda.current_stream if gpu else lambda: None)
        self._stretches: deque[Stretch] = deque()  # of all threads: appending is atomic
        # By thread and queue: the phases under way, and when the last of them began or ended.
        self._under_way: dict[Hashable, tuple[tuple[str, ...], Any]] = {}
        self._stopped = False
        self.restart_step()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time spent within the block belongs to phase `name`."""
        if self._stopped:
            yield
            return
        line = threading.get_ident(), self._queue()
        outer, _ = self._under_way.get(line, ((), None))
        self._change(line, (*outer, name))
        try:
            yield
        finally:
            self._change(line, outer)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Phases that begin within the block are not measured, and the step under way begins anew after it."""
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False
            self.restart_step()

    def restart_step(self) -> None:
        """A step begins now; what went before belongs to none."""
        self._step = self._mark()

    def end_step(self) -> None:
        """A step ends now, and the next one begins."""
        start, self._step = self._step, self._mark()
        self._keep((), start, self._step)

    def read(self) -> Times:
        """What was measured since the last reading; what the device has not passed yet counts in the next one."""
        times = Times({}, {}, [])
        for _ in range(len(self._stretches)):
            stretch = self._stretches.popleft()
            try:
                if not (stretch.start.query() and stretch.end.query()):
                    self._stretches.append(stretch)
                    continue
                seconds = stretch.start.elapsed_time(stretch.end) / 1e3
            except RuntimeError:  # an event that is of no use: the stretch is left out
                continue
            if not stretch.phases:
                times.steps.append(seconds)
                continue
            for sums, names in ((times.own, stretch.phases[-1:]), (times.whole, set(stretch.phases))):
                for name in names:
                    sums[name] = sums.get(name, 0.0) + seconds
        return times

    def clear(self) -> None:
        """Forget what was measured since the last reading; a step begins now."""
        self._stretches.clear()
        self.restart_step()

    def _change(self, line: Hashable, phases: tuple[str, ...]) -> None:
        now = self._mark()
        before, since = self._under_way.get(line, ((), None))
        self._under_way[line] = phases, now
        if before:
            self._keep(before, since, now)

    def _keep(self, phases: tuple[str, ...], start: Any, end: Any) -> None:
        if start is not None and end is not None:
            self._stretches.append(Stretch(phases, start, end))

    def _mark(self) -> Any:
        try:
            event = self._event()
            event.record()
        except RuntimeError:  # what begins or ends here is left out
            return None
        return event
