"""The meter: means over the kept steps, honest time, one transfer a window; and how long a run will still take."""

import math

import pytest
import torch

from semi_fast.observe.console import console_line, duration
from semi_fast.observe.meter import Eta, Meter
from semi_fast.observe.stopwatch import Stopwatch
from tests.semi_fast.whole_step import add

CPU = torch.device("cpu")


def open_meter(images=1, step=0):
    return Meter(Stopwatch(CPU), images, images // 2, step)


def read(meter):
    return meter.close(meter.fetch())


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock[0]` is changed."""
    now = [0.0]
    monkeypatch.setattr("semi_fast.observe.meter.time.perf_counter", lambda: now[0])
    return now


def test_a_window_holds_means_over_the_steps_that_logged():
    meter = open_meter(256)
    add(meter, torch.tensor(1.0), {"loss/labeled": torch.tensor(1.0)})
    add(meter, torch.tensor(3.0), {"loss/labeled": torch.tensor(2.0), "pseudo/used": torch.tensor(0.5)})
    figures = read(meter)
    means = {"loss/total": 2.0, "loss/labeled": 1.5, "pseudo/used": 0.5}
    assert {name: figures[name] for name in means} == means
    assert meter.step == 2
    seconds = figures["time/step_ms"] / 1e3
    assert figures["throughput/images_per_s"] == pytest.approx(256 / seconds), "the first step is not timed"
    assert figures["throughput/samples_per_s"] == pytest.approx(128 / seconds)


def test_the_rate_counts_the_images_that_each_step_showed_the_network(clock):
    meter = open_meter(100)
    meter.take_over(2, 4.0, 50)
    for images in (100, 100, 30, 30):  # the first step is not timed
        meter.images_per_step = images
        add(meter, torch.tensor(1.0), {})
        clock[0] += 1
    assert read(meter)["throughput/images_per_s"] == pytest.approx(160 / 4)
    assert meter.images_per_s == pytest.approx((50 + 160) / (4 + 4))
    meter.take_over(3, 6.0)
    assert meter.images_per_s == 3 * 30 / 6, "saved by a version that did not count images"


def test_steps_that_are_not_kept_are_counted_but_left_out_of_the_means():
    meter = open_meter(step=10)
    for loss in (1.0, 5.0, 0.5):
        add(meter, torch.tensor(loss), {})
    rows = meter.fetch()
    assert rows == [{"loss/total": 1.0}, {"loss/total": 5.0}, {"loss/total": 0.5}]
    assert (meter.close([rows[0], rows[2]])["loss/total"], meter.step) == (0.75, 13)
    add(meter, torch.tensor(9.0), {})
    meter.fetch()
    figures = meter.close([])
    assert "loss/total" not in figures
    assert meter.step == 14
    assert "loss not finite, all steps skipped" in console_line(14, 20, figures, None, 0)


def test_paused_time_does_not_count(clock):
    watch = Stopwatch(CPU)
    meter = Meter(watch, 10, 10)
    clock[0] += 50
    add(meter, torch.tensor(1.0), {})  # the first step compiles and is not timed
    with watch.phase("data_wait"):
        clock[0] += 1
    clock[0] += 3
    add(meter, torch.tensor(1.0), {})
    figures = read(meter)
    with meter.paused():
        clock[0] += 100
    clock[0] += 6
    add(meter, torch.tensor(1.0), {})
    names = ("time/step_ms", "time/slowest_step_ms", "time/data_wait_share", "throughput/images_per_s")
    assert [figures[name] for name in names] == [4000, 4000, 0.25, 2.5]
    figures = read(meter)
    assert [figures[name] for name in names] == [6000, 6000, 0, 10 / 6]
    assert meter.images_per_s == 2


def test_statistics_that_do_not_exist_yet_are_left_out():
    meter = open_meter()
    meter.statistics = lambda: {
        "bank/confidence_q50": torch.tensor(math.nan),
        "prior": torch.tensor([0.25, 0.75]),
        "bank/fill": torch.tensor(0.0),
    }
    add(meter, torch.tensor(1.0), {})
    figures = read(meter)
    assert "bank/confidence_q50" not in figures
    assert figures["prior"] == [0.25, 0.75]
    assert figures["bank/fill"] == 0


def test_the_first_step_which_compiles_is_no_measure_of_the_rest(clock):
    meter = open_meter()
    clock[0] += 60
    assert meter.seconds_per_image is None
    add(meter, torch.tensor(1.0), {})
    assert meter.seconds_per_image is None
    for seconds in (1, 3):
        clock[0] += seconds
        add(meter, torch.tensor(1.0), {})
    assert meter.seconds_per_image == 2, "within a window too"
    read(meter)
    with meter.paused():
        clock[0] += 1000
        assert meter.seconds_per_image == 2
    clock[0] += 5
    add(meter, torch.tensor(1.0), {})
    assert meter.seconds_per_image == 3


def test_what_is_left_counts_evaluations_and_checkpoints():
    eta = Eta(100, {"evaluation": 10, "checkpoint": 30})
    assert eta.seconds_left(5, None) is None
    assert eta.seconds_left(5, 190.0) == 190, "no evaluation was seen yet"
    eta.took("evaluation", 99.0)
    eta.took("evaluation", 7.0)
    assert eta.seconds_left(10, 180.0) == 180 + 9 * 7
    eta.took("checkpoint", 1.0)
    assert eta.seconds_left(35, 130.0) == 130 + 7 * 7 + 3 * 1, "after 60, 90 and 100 steps"
    assert eta.seconds_left(99, 2.0) == 2 + 7 + 1
    assert eta.seconds_left(100, 0.0) == 0


def test_console_line():
    figures = {
        "loss/total": 0.4123, "pseudo/used": 0.714, "throughput/images_per_s": 38400.4, "time/data_wait_share": 0.003,
    }  # fmt: skip
    assert console_line(12000, 250000, figures, 78.12, 2460) == (
        "step 12,000/250,000 | loss 0.412 | used 71% | 38,400 img/s | data wait 0.3% | acc 78.1 | eta 41m"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5s"), (65, "1m05s"), (2460, "41m"), (7500, "2h05m"), (280_000, "3d05h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
