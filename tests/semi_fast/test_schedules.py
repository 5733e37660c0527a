"""Learning rates over a stage."""

import math

import pytest

from semi_fast.config import OptimSettings
from semi_fast.training.schedules import learning_rate


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("cosine_7_16", lambda t: math.cos(7 * math.pi * t / 16)),
        ("cosine_1_16", lambda t: math.cos(math.pi * t / 16)),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("constant", lambda t: 1.0),
    ],
)
def test_schedules_follow_their_formulas(schedule, formula):
    optim = OptimSettings(lr=0.03, schedule=schedule)
    for step in (0, 1, 499, 500, 999):
        assert learning_rate(optim, step, 1000) == pytest.approx(0.03 * formula(step / 1000))
    assert learning_rate(optim, 0, 1000) == 0.03


def test_the_default_is_the_same_to_the_bit_as_its_formula():
    for step in range(0, 250_000, 997):
        assert learning_rate(OptimSettings(), step, 250_000) == 0.03 * math.cos(7 / 16 * math.pi * (step / 250_000))


def test_milestones_are_shares_and_hold_from_their_step_on():
    published = [[0.799996, 0.01], [0.9, 0.01]]
    optim = OptimSettings(lr=0.1, schedule="milestones", milestones=published)
    rates = [learning_rate(optim, step, 250_000) for step in (0, 199_998, 199_999, 224_999, 225_000, 249_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.001, 0.001, 0.00001, 0.00001])
    assert learning_rate(optim, 799, 1000) == 0.1
    assert learning_rate(optim, 800, 1000) == pytest.approx(0.001)


def test_warm_up_rises_from_zero_and_multiplies_the_schedule():
    optim = OptimSettings(lr=0.1, schedule="constant", warmup=0.025)
    rates = [learning_rate(optim, step, 250_000) for step in (0, 3_124, 6_249, 6_250, 200_000)]
    assert rates == pytest.approx([0.1 / 6_250, 0.05, 0.1, 0.1, 0.1])
    warmed = OptimSettings(lr=0.1, warmup=0.5)
    assert learning_rate(warmed, 1, 10) == pytest.approx(learning_rate(OptimSettings(lr=0.1), 1, 10) * 2 / 5)
    assert learning_rate(warmed, 0, 1) > 0  # a stage too short for a warm-up has none


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "milestones"},
        {"milestones": [[0.5, 0.1]]},
        {"schedule": "milestones", "milestones": [[0.5, 0.1], [0.4, 0.1]]},
        {"schedule": "milestones", "milestones": [[1.5, 0.1]]},
        {"schedule": "milestones", "milestones": [[0.5, 0]]},
        {"schedule": "milestones", "milestones": [[0.5]]},
    ],
)
def test_wrong_milestones_are_refused(wrong):
    with pytest.raises(ValueError, match="milestones"):
        OptimSettings(**wrong)
