"""The meter: means over the accepted steps, honest time, one transfer a window."""

import pytest
import torch

from semi_fast.observe.console import console_line, duration
from semi_fast.observe.meter import Meter


def test_window_holds_means_over_the_steps_that_logged():
    meter = Meter(256)
    meter.add(torch.tensor(1.0), {"loss/labeled": torch.tensor(1.0)})
    meter.add(torch.tensor(3.0), {"loss/labeled": torch.tensor(2.0), "pseudo/used": torch.tensor(0.5)})
    window = meter.read()
    assert window.logs == {"loss/total": 2.0, "loss/labeled": 1.5, "pseudo/used": 0.5}
    assert meter.step == 2
    assert window.images_per_s == pytest.approx(256 / window.seconds), "the first step compiles and is not timed"


def test_steps_that_are_not_accepted_are_counted_but_left_out_of_the_means():
    seen = []

    def accepts(step, row):
        seen.append((step, row.pop("verdict")))
        return row["loss/total"] < 2

    meter = Meter(1, 10, accepts)
    for loss in (1.0, 5.0, 0.5):
        meter.add(torch.tensor(loss), {"verdict": torch.tensor(7.0)})
    window = meter.read()
    assert seen == [(11, 7.0), (12, 7.0), (13, 7.0)]
    assert (window.logs, window.steps, meter.step) == ({"loss/total": 0.75}, 3, 13)
    meter.add(torch.tensor(9.0), {"verdict": torch.tensor(7.0)})
    window = meter.read()
    assert (window.logs, window.steps) == ({}, 1)
    assert "loss not finite, all steps skipped" in console_line(14, 20, window, None, 0)


def test_paused_time_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("semi_fast.observe.meter.time.perf_counter", lambda: now[0])
    meter = Meter(10)
    now[0] += 50
    meter.add(torch.tensor(1.0), {})  # the first step compiles and is not timed
    with meter.waiting():
        now[0] += 1
    now[0] += 3
    with meter.paused():
        now[0] += 100
    meter.add(torch.tensor(1.0), {})
    window = meter.read()
    assert (window.seconds, window.data_wait, window.images_per_s) == (4.0, 0.25, 2.5)
    assert meter.images_per_s == 2.5


def test_console_line():
    meter = Meter(256)
    meter.add(torch.tensor(0.4123), {"pseudo/used": torch.tensor(0.714)})
    window = meter.read()._replace(images_per_s=38400.4, data_wait=0.003)
    assert console_line(12000, 250000, window, 78.12, 2460) == (
        "step 12,000/250,000 | loss 0.412 | used 71% | 38,400 img/s | data wait 0.3% | acc 78.1 | eta 41m"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.4, "5s"), (65, "1m05s"), (2460, "41m"), (7500, "2h05m"), (280_000, "3d05h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
