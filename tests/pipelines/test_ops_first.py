"""Policies whose operations come before flip and crop."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import pillow_views
from pipelines.augment.plan import BLACK, BORDER, CUT, FIRST, FLIP, GRAY, LEFT, OPS, TOP, Planner
from pipelines.augment.randaugment import find_ops
from pipelines.augment.views import VIEWS, View
from tests.pipelines.view_cases import KINDS, pixels, stored


@pytest.mark.parametrize("side", [16, 17, 32])
def test_operations_then_crop_then_cutout_equal_pillow(side):
    images = np.stack([stored(kind, side, side) for kind in KINDS])
    view = VIEWS["randaugment_3_4"]
    planner, rows = Planner([view], side, side), [i % len(images) for i in range(200)]
    plan = planner.sample(view, len(rows), torch.Generator().manual_seed(side))
    assert (plan[:, FIRST] == 1).all()
    assert (plan[:, BORDER] == BLACK).all()
    assert (plan[:, GRAY] == 0).all()
    got, pad = pixels(images, rows, plan, planner.table.numpy()), int(side / 8)
    for row, p, mine in zip(rows, plan, got, strict=True):
        image = Image.fromarray(images[row])
        for entry in p[OPS:]:  # of the parameter table: its first row, then op by op, one level, two signs
            op, sign = divmod(int(entry) - 1, 2)
            image = pillow_views.OPS[view.ops[op]](image, 4, -1 if sign else 1)
        values = np.asarray(image)[:, ::-1] if p[FLIP] else np.asarray(image)
        padded = np.pad(values, ((pad, pad), (pad, pad), (0, 0)))
        top, left = pad + p[TOP], pad + p[LEFT]
        expected = padded[top : top + side, left : left + side].copy()
        x0, y0, x1, y1 = p[CUT : CUT + 4]
        expected[y0:y1, x0:x1] = 0
        np.testing.assert_array_equal(mine, expected)


def test_the_border_is_operated_upon_only_where_the_crop_comes_first():
    image = np.full((1, 16, 16, 3), 200, np.uint8)
    results = {}
    for first in (False, True):
        view = View(border="black", ops=("invert",), n=1, probability=1.0, ops_first=first)
        planner = Planner([view], 16, 16)
        plan = planner.sample(view, 100, torch.Generator().manual_seed(0))
        results[first] = set(np.unique(pixels(image, [0] * 100, plan, planner.table.numpy())))
    assert results == {False: {55, 255}, True: {55, 0}}


def test_the_ready_named_policy_draws_three_of_fifteen_operations_at_level_four():
    view = VIEWS["randaugment_3_4"]
    assert (view.n, view.levels, view.probability, view.gray) == (3, (4, 4), 1.0, 0)
    assert len(find_ops(view.ops)) == 15
    assert {"invert", "solarize_add"} < set(view.ops)
