"""Plans: what is drawn, how often, and that it is the same everywhere."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipelines.augment.plan import BLACK, BORDER, CUT, FLIP, GRAY, LEFT, OPS, REFLECT, TOP, Planner
from pipelines.augment.randaugment import FIXMATCH_OPS, find_ops, parameter_table
from pipelines.augment.views import VIEWS, View, find_views


def sample(view: View, n: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return Planner([view], height, width).sample(view, n, torch.Generator().manual_seed(seed))


def test_the_plain_view_leaves_the_image_alone():
    plan = sample(VIEWS["plain"], 100)
    assert (np.delete(plan, [BORDER, GRAY], axis=1) == 0).all()


def test_the_weak_view_flips_half_and_crops_anywhere_within_the_padding():
    plan = sample(VIEWS["weak"], 20_000)
    assert abs(plan[:, FLIP].mean() - 0.5) < 0.02
    for column in (TOP, LEFT):
        values, counts = np.unique(plan[:, column], return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert abs(counts / len(plan) - 1 / 9).max() < 0.015
    assert (plan[:, CUT:GRAY] == 0).all()
    assert (plan[:, BORDER] == REFLECT).all()


def test_the_strong_view_draws_every_operation_level_and_sign_alike():
    plan = sample(VIEWS["strong"], 100_000)[:, OPS:]
    assert plan.shape[1] == 2
    assert abs((plan == 0).mean() - 0.5) < 0.01  # each is applied with probability 1/2
    counts = np.bincount(plan[plan > 0], minlength=1 + 14 * 9 * 2)[1:]
    expected = (plan > 0).sum() / (14 * 9 * 2)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 251 + 5 * (2 * 251) ** 0.5
    assert abs(np.corrcoef(plan[:, 0], plan[:, 1])[0, 1]) < 0.02


@settings(deadline=None)
@given(side=st.integers(2, 70), seed=st.integers(0, 1000))
def test_cutouts_are_within_the_image_and_at_most_half_of_it_and_one_pixel_wide(side, seed):
    plan = sample(VIEWS["strong"], 50, side, side, seed)
    for axis in (0, 1):
        near, far = plan[:, CUT + axis], plan[:, CUT + 2 + axis]
        assert (near >= 0).all()
        assert (far <= side).all()
        assert (near < far).all()
        assert (far - near <= side // 2 + 1).all()


def test_plans_are_the_same_whatever_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        plans = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plans.append(sample(VIEWS["strong"], 5000))
    finally:
        torch.set_num_threads(before)
    assert all((plan == plans[0]).all() for plan in plans)


def test_two_views_of_one_planner_point_into_one_table():
    bright = View(ops=("brightness",), n=1, probability=1, levels=(3, 3))
    solarized = View(ops=("solarize", "rotate"), n=3, probability=1)
    planner = Planner([bright, solarized, bright], 20, 20)
    generator = torch.Generator().manual_seed(0)
    table = planner.table.numpy()
    for view, kinds in ((bright, {"brightness"}), (solarized, {"solarize", "rotate"})):
        plan = planner.sample(view, 200, generator)
        assert plan.shape == (200, OPS + 3)
        used = plan[:, OPS : OPS + view.n]
        assert {int(kind) for kind in table[used, 0].reshape(-1)} == {op.kind for op in find_ops(list(kinds))}
        assert (plan[:, OPS + view.n :] == 0).all()
        whole = parameter_table(find_ops(view.ops), view.levels, 20, 20)
        assert {tuple(row) for row in table[used].reshape(-1, 7)} == {tuple(row) for row in whole}


def test_sampling_views_together_equals_sampling_them_one_by_one():
    views = [VIEWS[name] for name in ("weak", "strong", "strong", "weak", "strong_photo", "weak_photo")]
    planner = Planner(views, 32, 32)
    together = planner.sample_all(views, 33, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    one_by_one = [planner.sample(view, 33, generator) for view in views]
    np.testing.assert_array_equal(together, np.concatenate(one_by_one))


@pytest.mark.parametrize("world", [2, 3])
def test_an_image_of_the_global_batch_has_the_same_plan_whatever_the_number_of_ranks(world):
    views = [VIEWS[name] for name in ("weak", "strong", "strong", "weak", "strong_photo", "strong_photo")]
    planner = Planner(views, 32, 32)
    alone = planner.sample_all(views, 4 * world, torch.Generator().manual_seed(2)).reshape(len(views), 4 * world, -1)
    shares = [
        planner.sample_all(views, 4, torch.Generator().manual_seed(2), rank=rank, world=world) for rank in range(world)
    ]
    together = np.concatenate([share.reshape(len(views), 4, -1) for share in shares], axis=1)
    np.testing.assert_array_equal(together, alone)


def test_a_black_border_and_no_padding():
    assert (sample(View(border="black"), 5)[:, BORDER] == BLACK).all()
    assert (sample(View(pad=0), 50)[:, [TOP, LEFT]] == 0).all()


def test_views_are_found_by_name():
    assert find_views(["weak", "strong", "weak"]) == (VIEWS["weak"], VIEWS["strong"], VIEWS["weak"])
    with pytest.raises(UserError, match=r"Unknown view 'stong'. Did you mean 'strong'\?"):
        find_views(["weak", "stong"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ops": ("rotat",), "n": 1}, "Unknown operation 'rotat'. Did you mean 'rotate'"),
        ({"border": "mirror"}, "Unknown border 'mirror'"),
        ({"pad": 1.0}, "pad must be at least 0 and below 1, got 1.0"),
        ({"area": (0.5, 1.0)}, r"pad must be 0 where there is an area, of which nothing is padded, got 0.125"),
        ({"pad": 0, "area": (0.0, 1.0)}, r"area must be two numbers above 0 and up to 1, .* got \(0.0, 1.0\)"),
        ({"pad": 0, "area": (0.5, 1.1)}, r"area must be two numbers"),
        ({"pad": 0, "area": (0.5, 0.4)}, r"area must be two numbers .* the smaller first, got \(0.5, 0.4\)"),
        ({"pad": 0, "area": (0.5,)}, r"area must be two numbers"),
        ({"pad": 0, "area": (0.5, 1.0), "ops_first": True}, "ops_first must be false where there is an area, got True"),
        ({"ratio": (0.0, 1.0)}, r"ratio must be two numbers above 0, the smaller first, got \(0.0, 1.0\)"),
        ({"ratio": (1.5, 1.2)}, r"ratio must be two numbers above 0"),
        ({"ratio": ()}, r"ratio must be two numbers above 0"),
        ({"jitter": (0.4, 0.4)}, r"jitter must be three numbers within 0..1, got \(0.4, 0.4\)"),
        ({"jitter": (0.4, 0.4, 1.1)}, r"jitter must be three numbers within 0..1"),
        ({"n": 2}, "n must be 0 where there are no ops, got 2"),
        ({"n": -1}, "n must be 0 or more, got -1"),
        ({"ops": FIXMATCH_OPS, "n": 2, "levels": (1, 11)}, r"levels must be two whole numbers .* got \(1, 11\)"),
        ({"ops": FIXMATCH_OPS, "n": 2, "levels": (5, 4)}, r"levels must be"),
        ({"probability": 1.5}, "probability must be within 0..1, got 1.5"),
        ({"cutout": -0.1}, "cutout must be within 0..1, got -0.1"),
        ({"gray": 300}, "gray must be within 0..255, got 300"),
    ],
)
def test_a_policy_out_of_range_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        View(**values)
