"""The meter: means, diverging losses named by step and part, one transfer a window."""

import pytest
import torch

from semi_fast.meter import DivergedError, Meter
from semi_fast.tracking import console_line, duration


def test_window_holds_means_over_the_steps_that_logged():
    meter = Meter(256)
    meter.add(torch.tensor(1.0), {"loss/labeled": torch.tensor(1.0)})
    meter.add(torch.tensor(3.0), {"loss/labeled": torch.tensor(2.0), "pseudo/used": torch.tensor(0.5)})
    window = meter.read()
    assert window.logs == {"loss/total": 2.0, "loss/labeled": 1.5, "pseudo/used": 0.5}
    assert meter.step == 2
    assert window.images_per_s == pytest.approx(256 / window.seconds), "the first step compiles and is not timed"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_loss_names_step_and_part(value):
    meter = Meter(1, step=10)
    good, bad = torch.tensor(1.0), torch.tensor(value)
    meter.add(good, {"loss/labeled": good, "loss/ea": good})
    meter.add(good + bad, {"loss/labeled": good, "loss/ea": bad})
    with pytest.raises(DivergedError, match=r"not finite at step 12: loss/ea = (nan|inf)") as caught:
        meter.read()
    assert "\n" not in str(caught.value)


def test_only_losses_need_to_be_finite():
    meter = Meter(1)
    meter.add(torch.tensor(1.0), {"bank/lowest": torch.tensor(float("inf"))})
    assert meter.read().logs["loss/total"] == 1.0


def test_paused_time_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("semi_fast.meter.time.perf_counter", lambda: now[0])
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
