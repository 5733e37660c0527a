"""The order of reading: every image once an epoch over all ranks, and a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.order import indices_at, permutation, plan_seed, positions


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


def test_ranks_read_disjoint_places():
    places = np.concatenate([positions(step, 5, rank, 3) for step in range(4) for rank in range(3)])
    assert sorted(places) == list(range(4 * 3 * 5))


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
