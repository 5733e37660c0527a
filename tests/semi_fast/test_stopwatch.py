"""Phases of a step: nested ones are taken out, threads and pauses do not mix in, CUDA events are read when passed."""

import threading
from typing import ClassVar

import pytest
import torch

from semi_fast.observe.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock[0]` is changed."""
    now = [0.0]
    monkeypatch.setattr("semi_fast.observe.stopwatch.time.perf_counter", lambda: now[0])
    return now


def test_a_phase_does_not_count_the_phases_within(clock):
    watch = Stopwatch(CPU)
    for _ in range(2):
        with watch.phase("outer"):
            clock[0] += 1
            with watch.phase("inner"):
                clock[0] += 10
                with watch.phase("innermost"):
                    clock[0] += 100
            with watch.phase("inner"):
                clock[0] += 10
    times = watch.read()
    assert times.own == {"outer": 2, "inner": 40, "innermost": 200}
    assert times.whole == {"outer": 242, "inner": 240, "innermost": 200}
    assert watch.read().own == {}, "a reading closes the window"


def test_a_phase_of_another_thread_lies_in_no_phase_of_this_one(clock):
    watch = Stopwatch(CPU)

    def other():
        with watch.phase("augment"):
            clock[0] += 5

    with watch.phase("forward_backward"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert watch.read().own == {"augment": 5, "forward_backward": 5}, "they overlap"


def test_a_phase_that_raises_is_measured_and_closed(clock):
    watch = Stopwatch(CPU)

    def fail():
        with watch.phase("a"):
            clock[0] += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with watch.phase("b"):
        clock[0] += 2
    assert watch.read().own == {"a": 1, "b": 2}


def test_nothing_is_measured_while_stopped(clock):
    watch = Stopwatch(CPU)
    with watch.stopped(), watch.phase("augment"):
        clock[0] += 1
    assert watch.read().own == {}


class Event:
    """A CUDA event on a device that works through its queue when told to: `queue` holds durations and events."""

    queue: ClassVar[list] = []
    reached = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.at = None
        Event.queue.append(self)

    def query(self):
        return self.at is not None

    def elapsed_time(self, end):
        assert self.query()
        assert end.query(), "the device has not passed it: reading would raise"
        return 1e3 * (end.at - self.at)

    @classmethod
    def work_off(cls):
        for item in cls.queue:
            if isinstance(item, Event):
                item.at = cls.reached
            else:
                cls.reached += item
        cls.queue = []


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.queue, Event.reached = [], 0.0
    return torch.device("cuda")


def test_on_a_gpu_the_device_time_counts_not_the_host_time(device):
    watch = Stopwatch(device)
    with watch.phase("forward_backward"):
        Event.queue.append(2.0)
        with watch.phase("bank"):
            Event.queue.append(0.5)
    with watch.phase("data_wait"):  # however long the host waits: the device has nothing to do for 0.25 s
        Event.queue.append(0.25)
    Event.work_off()
    assert watch.read().own == pytest.approx({"forward_backward": 2.0, "bank": 0.5, "data_wait": 0.25})


def test_what_the_device_has_not_reached_counts_in_the_next_window(device):
    watch = Stopwatch(device)
    with watch.phase("augment"):
        Event.queue.append(1.0)
    assert watch.read().own == {}
    Event.work_off()
    assert watch.read().own == {"augment": 1.0}
    assert len(watch._spare) == 2, "events are used again"


def test_marks_give_the_time_between_steps(device):
    watch = Stopwatch(device)
    marks = [watch.mark()]
    for seconds in (1.0, 3.0):
        Event.queue.append(seconds)
        marks.append(watch.mark())
    Event.work_off()
    assert watch.seconds(marks) == [1.0, 3.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_events_measure_a_kernel():
    watch = Stopwatch(torch.device("cuda"))
    x = torch.randn(2048, 2048, device="cuda")
    with watch.phase("work"):
        for _ in range(20):
            x = x @ x / 2048
    torch.cuda.synchronize()
    assert 0 < watch.read().own["work"] < 60
