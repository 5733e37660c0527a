"""Phases of a step: nested ones are taken out, queues, threads and pauses do not mix, and no clock ends a run."""

import threading

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
    clock[0] += 2
    watch.end_step()
    assert watch.read() == ({}, {}, [2])


class Queue:
    """A stream of a device: durations and events, worked off in order when told to."""

    def __init__(self):
        self.waiting, self.time = [], 0.0

    def work_off(self):
        for item in self.waiting:
            if isinstance(item, Event):
                item.time = self.time
            else:
                self.time += item
        self.waiting = []


class Event:
    """A CUDA event: as strict as the real ones."""

    current: Queue  # the stream that events go into now

    def __init__(self, enable_timing=True):
        self.time = None

    def record(self):
        self.time = None
        Event.current.waiting.append(self)

    def query(self):
        return self.time is not None

    def elapsed_time(self, end):
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready")
        return 1e3 * (end.time - self.time)


@pytest.fixture
def streams():
    """The main and the side stream of a device, and a stopwatch for them."""
    main, side = Queue(), Queue()
    Event.current = main
    return main, side, Stopwatch(CPU, Event, lambda: Event.current)


def wait_for_data(watch, main, side):
    """What the loop and the loaders do: the next views are queued on the side stream while the main one waits."""
    with watch.phase("data_wait"):
        Event.current = side
        with watch.phase("augment"):
            side.waiting.append(2.0)
        Event.current = main
        main.waiting.append(0.25)


def test_the_device_time_counts_not_the_host_time(streams):
    main, _, watch = streams
    with watch.phase("forward_backward"):
        main.waiting.append(2.0)
        with watch.phase("inner"):
            main.waiting.append(0.5)
    with watch.phase("data_wait"):  # however long the host waits: the device has nothing to do for 0.25 s
        main.waiting.append(0.25)
    main.work_off()
    assert watch.read().own == pytest.approx({"forward_backward": 2.0, "inner": 0.5, "data_wait": 0.25})


def test_a_phase_of_another_stream_lies_in_no_phase_of_this_one(streams):
    main, side, watch = streams
    wait_for_data(watch, main, side)
    main.work_off()
    side.work_off()
    times = watch.read()
    assert times.own == times.whole == {"data_wait": 0.25, "augment": 2.0}


def test_a_stream_that_lags_behind_counts_in_the_next_window(streams):
    main, side, watch = streams
    wait_for_data(watch, main, side)
    main.work_off()
    assert watch.read().own == {"data_wait": 0.25}
    wait_for_data(watch, main, side)
    side.work_off()
    assert watch.read().own == {"augment": 4.0}
    main.work_off()
    assert watch.read().own == {"data_wait": 0.25}


def test_the_starts_are_waited_for_too(streams):
    main, side, watch = streams
    with watch.phase("a"):  # ends on a stream that is ahead of the one it began on
        main.waiting.append(1.0)
        Event.current = side
    side.work_off()
    assert watch.read().own == {}
    main.work_off()
    assert watch.read().own == {"a": 0.0}


def test_steps_that_the_device_has_not_done_count_in_the_next_window(streams):
    main, _, watch = streams
    for seconds in (1.0, 3.0):
        main.waiting.append(seconds)
        watch.end_step()
    assert watch.read().steps == []
    main.work_off()
    main.waiting.append(5.0)
    watch.end_step()
    assert watch.read().steps == [1.0, 3.0]
    main.work_off()
    assert watch.read().steps == [5.0]


@pytest.mark.parametrize("broken", ["record", "query", "elapsed_time"])
def test_an_event_of_no_use_is_left_out(streams, monkeypatch, broken):
    def fail(*_):
        raise RuntimeError("CUDA error")

    main, _, watch = streams
    with monkeypatch.context() as patch:
        patch.setattr(Event, broken, fail)
        with watch.phase("a"):
            main.waiting.append(1.0)
        watch.end_step()
        main.work_off()
        assert watch.read() == ({}, {}, [])
    with watch.phase("a"):
        main.waiting.append(2.0)
    main.work_off()
    assert watch.read().own == {"a": 2.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_events_measure_a_kernel_on_each_stream():
    watch, side = Stopwatch(torch.device("cuda")), torch.cuda.Stream()
    x = torch.randn(2048, 2048, device="cuda")
    torch.cuda.synchronize()
    with watch.phase("data_wait"), torch.cuda.stream(side), watch.phase("augment"):
        for _ in range(20):
            x = x @ x / 2048
    watch.read()
    torch.cuda.synchronize()
    watch.end_step()
    torch.cuda.synchronize()
    times = watch.read()
    assert 0 < times.own["augment"] < 60
    assert len(times.steps) == 1
