"""Running statistics: exact, read as they stood, and saved with the method."""

from __future__ import annotations

import torch

from semi_fast.parts.statistics import MovingAverage, RunningDistribution, class_counts
from semi_fast.processes.gather import gather_candidates, sum_ranks


def test_class_counts_counts_only_what_the_mask_keeps():
    classes, mask = torch.tensor([0, 2, 2, 1, 2]), torch.tensor([True, True, False, False, True])
    assert class_counts(classes, mask, 4).tolist() == [1, 0, 2, 0]


def test_running_distribution_is_uniform_until_something_was_counted():
    running = RunningDistribution(4)
    assert running.read().tolist() == [0.25] * 4
    running.update(torch.zeros(4, dtype=torch.int64))
    assert running.read().tolist() == [0.25] * 4
    running.update(torch.tensor([3, 0, 1, 0]))
    assert running.read().tolist() == [0.75, 0.0, 0.25, 0.0]


def test_running_distribution_counts_exactly_beyond_the_integers_of_float32():
    running = RunningDistribution(2)
    running.update(torch.tensor([2**24, 0]))
    for _ in range(3):
        running.update(torch.tensor([1, 0]))
    assert running.counts.tolist() == [2**24 + 3, 0]
    assert running.read().dtype == torch.float32


def test_moving_average_starts_at_zero_and_follows_its_equation():
    average, expected = MovingAverage(2, 0.9), [0.0, 0.0]
    for new in ([1.0, -2.0], [3.0, 0.5], [0.0, 8.0]):
        average.update(torch.tensor(new))
        expected = [0.9 * e + 0.1 * n for e, n in zip(expected, new, strict=True)]
    torch.testing.assert_close(average.read(), torch.tensor(expected))


def test_what_was_read_does_not_change_with_an_update():
    average, running = MovingAverage(2, 0.5), RunningDistribution(2)
    before = average.read(), running.read()
    average.update(torch.ones(2))
    running.update(torch.tensor([1, 0]))
    assert before[0].tolist() == [0.0, 0.0]
    assert before[1].tolist() == [0.5, 0.5]


def test_statistics_are_in_the_state_dict():
    average, running = MovingAverage(2, 0.5), RunningDistribution(2)
    average.update(torch.ones(2))
    running.update(torch.tensor([1, 3]))
    other_average, other_running = MovingAverage(2, 0.5), RunningDistribution(2)
    other_average.load_state_dict(average.state_dict())
    other_running.load_state_dict(running.state_dict())
    assert torch.equal(other_average.read(), average.read())
    assert torch.equal(other_running.read(), running.read())


def test_one_process_offers_its_strong_views_in_their_order():
    embeddings = torch.arange(12.0).view(6, 2).requires_grad_()
    got = gather_candidates(
        embeddings,
        torch.tensor([1, 0, 2]),
        torch.tensor([0.7, 0.8, 0.9]),
        torch.tensor([True, False, True]),
        torch.tensor([9, 7, 2**60]),
    )
    assert torch.equal(got.embeddings, embeddings)
    assert not got.embeddings.requires_grad
    assert got.classes.tolist() == [1, 0, 2] * 2
    assert got.mask.tolist() == [True, False, True] * 2
    assert got.rows.tolist() == [9, 7, 2**60] * 2
    torch.testing.assert_close(got.confidences, torch.tensor([0.7, 0.8, 0.9] * 2))
    assert sum_ranks(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
