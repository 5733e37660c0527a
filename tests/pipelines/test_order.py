"""The order of reading: every image once an epoch over all ranks, and a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import balanced_at, by_class, indices_at, part_number, permutation, plan_seed, positions


def read(n: int, steps: range, batch: int, world: int, seed: int = 0, part: int = 0) -> np.ndarray:
    """What all ranks read in these steps: (steps, world * batch)."""
    ranks = [
        [indices_at(n, step, batch, seed=seed, part=part, rank=rank, world=world) for rank in range(world)]
        for step in steps
    ]
    return np.array(ranks).reshape(len(steps), -1)


@settings(deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 12), world=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_every_image_comes_once_an_epoch_over_all_ranks(n, batch, world, seed):
    steps = -(-3 * n // (batch * world))
    endless = read(n, range(steps), batch, world, seed).reshape(-1)
    for epoch in range(3):
        assert sorted(endless[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(deadline=None)
@given(n=st.integers(1, 40), batch=st.integers(1, 12), start=st.integers(0, 50))
def test_a_step_does_not_depend_on_the_steps_before(n, batch, start):
    np.testing.assert_array_equal(
        read(n, range(start, start + 3), batch, 2), read(n, range(start + 3), batch, 2)[start:]
    )


def test_the_order_does_not_depend_on_how_it_is_split_over_ranks():
    one, four = read(37, range(20), 8, 1), read(37, range(20), 2, 4)
    np.testing.assert_array_equal(one, four)


def test_ranks_read_disjoint_positions():
    covered = np.concatenate([positions(step, 5, rank, 3) for step in range(4) for rank in range(3)])
    assert sorted(covered) == list(range(4 * 3 * 5))


def test_a_batch_larger_than_the_set_wraps_into_the_next_epochs():
    chosen = indices_at(3, 0, 8, seed=1, part=0, rank=0, world=1)
    epochs = [permutation(3, 1, 0, epoch) for epoch in range(3)]
    np.testing.assert_array_equal(chosen, np.concatenate(epochs)[:8])


@pytest.mark.parametrize("other", [(50, 1, 0, 0), (50, 0, 1, 0), (50, 0, 0, 1)])
def test_seed_part_and_epoch_each_change_the_order(other):
    assert (permutation(50, 0, 0, 0) != permutation(*other)).any()


def test_a_shared_order_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 0, 0, 0)[0] = 1


def test_plan_seeds_differ_in_every_argument_and_fit_a_generator():
    arguments = [(s, p, t) for s in range(9) for p in range(2) for t in range(20)]
    seeds = {plan_seed(*each) for each in arguments}
    assert len(seeds) == len(arguments)
    assert all(0 <= seed < 2**63 for seed in seeds)


def balanced(labels: list[int], steps: int, batch: int, world: int = 1, seed: int = 0, part: int = 0) -> np.ndarray:
    """What all ranks draw in balance in these steps: (steps, world * batch)."""
    classes = by_class(np.array(labels))
    ranks = [
        [balanced_at(classes, step, batch, seed=seed, part=part, rank=rank, world=world) for rank in range(world)]
        for step in range(steps)
    ]
    return np.array(ranks).reshape(steps, -1)


def test_a_balanced_draw_takes_every_class_alike_and_every_image_within_it():
    labels = np.array([7] * 90 + [0] * 9 + [3])  # class 1 has no image and is never drawn
    drawn = balanced(labels.tolist(), 100, 300).reshape(-1)
    assert drawn.dtype == np.int64
    shares = np.bincount(labels[drawn], minlength=8) / len(drawn)
    assert abs(shares[[7, 0, 3]] - 1 / 3).max() < 0.02
    assert shares.sum() == pytest.approx(shares[[7, 0, 3]].sum())
    counts = np.bincount(drawn, minlength=100)
    for k, n in ((7, 90), (0, 9)):
        expected = len(drawn) / 3 / n
        chi_square = ((counts[labels == k] - expected) ** 2 / expected).sum()
        assert chi_square < n + 5 * (2 * n) ** 0.5


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=30), batch=st.integers(1, 7), world=st.integers(1, 4))
def test_the_balanced_draw_of_all_ranks_is_that_of_one_process(labels, batch, world):
    together, alone = balanced(labels, 3, batch, world), balanced(labels, 3, batch * world)
    np.testing.assert_array_equal(together, alone)
    assert together.min() >= 0
    assert together.max() < len(labels)


def test_a_balanced_draw_is_a_function_of_seed_part_and_step():
    labels = [0, 0, 1, 1, 1, 2]
    whole = balanced(labels, 4, 20)
    classes = by_class(np.array(labels))
    np.testing.assert_array_equal(balanced_at(classes, 3, 20, seed=0, part=0, rank=0, world=1), whole[3])
    assert (
        len({row.tobytes() for row in (*whole, balanced(labels, 1, 20, seed=1), balanced(labels, 1, 20, part=1))}) == 6
    )


def test_part_numbers_stay_what_they_are():
    assert [part_number(name) for name in ("labeled", "unlabeled", "balanced")] == [0, 1, 3262407114]
