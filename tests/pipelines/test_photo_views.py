"""Resized crops and color jitter: Pillow's pixels, torchvision's boxes, factors spread evenly in every order."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import pillow_views
from pipelines.augment import pixel_ops
from pipelines.augment.op import augment
from pipelines.augment.plan import CUT, FLIP, GRAY, HEIGHT, LEFT, OPS, TOP, WIDTH, Planner
from pipelines.augment.randaugment import jitter_tables
from pipelines.augment.views import VIEWS, View
from tests.pipelines.view_cases import KINDS, UNIT, ZERO, pixels, stored


def by_pillow(image: np.ndarray, flip: int, top: int, left: int, rows: int, columns: int) -> np.ndarray:
    picture = Image.fromarray(image[:, ::-1] if flip else image)
    box = (left, top, left + columns, top + rows)
    return np.asarray(picture.resize(picture.size, Image.Resampling.BILINEAR, box))


def crops(boxes: list[tuple[int, ...]]) -> np.ndarray:
    plan = np.zeros((len(boxes), OPS))
    plan[:, [FLIP, TOP, LEFT, HEIGHT, WIDTH]] = boxes
    return plan


def assert_pillow_s(image: np.ndarray, boxes: list[tuple[int, ...]]) -> None:
    for box, mine in zip(boxes, pixels(image[None], [0] * len(boxes), crops(boxes), np.zeros((1, 7))), strict=True):
        np.testing.assert_array_equal(mine, by_pillow(image, *box), err_msg=f"{image.shape}: {box}")


@settings(max_examples=80, deadline=None)
@given(data=st.data(), height=st.integers(1, 70), width=st.integers(1, 70))
def test_any_crop_of_any_image_is_resized_as_by_pillow(data, height, width):
    image = stored(data.draw(st.sampled_from(KINDS)), height, width, data.draw(st.integers(0, 9), label="seed"))
    boxes = []
    for _ in range(8):
        rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
        top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
        boxes.append((data.draw(st.integers(0, 1)), top, left, rows, columns))
    assert_pillow_s(image, boxes)


@pytest.mark.parametrize("side", [1, 2, 32, 33, 96, 224, 255, 384])
def test_the_whole_image_single_pixels_and_edges_are_resized_as_by_pillow(side):
    part = max(1, side // 3)
    boxes = [(flip, 0, 0, side, side) for flip in (0, 1)]
    boxes += [(0, side - 1, 0, 1, 1), (1, 0, side - 1, 1, 1), (1, 0, 0, 1, side), (0, 0, side - 1, side, 1)]
    boxes += [(0, side - part, side - part, part, part), (1, 0, 0, part, max(1, side - 1))]
    assert_pillow_s(stored("noise", side, side), boxes)


def test_the_whole_image_stays_as_it_is():
    image = stored("noise", 24, 17)
    np.testing.assert_array_equal(pixels(image[None], [0], crops([(0, 0, 0, 24, 17)]), np.zeros((1, 7)))[0], image)


def test_weights_are_pillow_s_doubles_rounded():
    for size in (1, 3, 7, 32, 224, 384, 9973):
        for extent in {1, 2, size // 3 + 1, size - 1 or 1, size}:
            index = np.arange(size)
            center = 5 + (index + 0.5) * (extent / size)
            first = np.floor(center - 0.5)
            low, high = 1 - np.abs(first - center + 0.5), 1 - np.abs(first + 1 - center + 0.5)
            assert (pixel_ops.resize_first(index, 5, extent, size) == first).all()
            share = pixel_ops.resize_share(index, extent, size)
            np.testing.assert_array_equal(share, (0.5 + high / (low + high) * 2**22).astype(int))
            np.testing.assert_array_equal(2**22 - share, (0.5 + low / (low + high) * 2**22).astype(int))


def drawn(view: View, height: int, width: int, count: int) -> tuple[list[list[float]], np.ndarray, Planner]:
    """Random numbers, and the plans that the planner makes of them."""
    planner = Planner([view], height, width)
    numbers = 5 + 4 * view.n + 20 * bool(view.area) + 4 * any(view.jitter)
    draws = torch.rand((count, numbers), dtype=torch.float64, generator=torch.Generator().manual_seed(height))
    return draws.tolist(), planner.sample(view, count, torch.Generator().manual_seed(height)), planner


@pytest.mark.parametrize("name", ["weak_photo", "strong_photo"])
@pytest.mark.parametrize("side", [17, 32, 96])
def test_whole_views_equal_pillow_from_the_same_random_numbers(name, side, shared_images):
    images, count = shared_images(side), 200
    draws, plan, planner = drawn(VIEWS[name], side, side, count)
    rows = [i % len(images) for i in range(count)]
    got = pixels(images, rows, plan, planner.table.numpy())
    for row, numbers, mine in zip(rows, draws, got, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(pillow_views.VIEWS[name](Image.fromarray(images[row]), numbers)))


@pytest.mark.parametrize(
    ("area", "ratio", "fallbacks"),
    [
        ((0.08, 1.0), (3 / 4, 4 / 3), False),
        ((0.3, 0.3), (1.0, 1.0), False),
        ((0.9, 1.0), (3.0, 4.0), True),  # none of the tries fits
        ((0.9, 1.0), (0.2, 0.3), True),
        ((1.0, 1.0), (0.1, 10.0), True),
        ((1e-4, 1e-3), (15.0, 20.0), True),  # nor does a pixel's height
    ],
)
@pytest.mark.parametrize(("height", "width"), [(30, 30), (20, 41), (41, 20)])
def test_boxes_are_torchvision_s_and_where_no_try_fits_the_middle(area, ratio, fallbacks, height, width):
    view = View(pad=0, area=area, ratio=ratio)
    draws, plan, planner = drawn(view, height, width, 200)
    image = stored("noise", height, width)
    got = pixels(image[None], [0] * len(plan), plan, planner.table.numpy())
    for numbers, mine in zip(draws, got, strict=True):
        reference = pillow_views.resized_crop(Image.fromarray(image), numbers, numbers[5:], area, ratio)
        np.testing.assert_array_equal(mine, np.asarray(reference))
    counts = np.unique(plan[:, [TOP, LEFT, HEIGHT, WIDTH]], axis=0, return_counts=True)[1]
    assert (counts.max() > len(plan) / 2) == fallbacks


def test_areas_are_uniform_and_ratios_log_uniform_and_corners_anywhere():
    view, side = View(pad=0, area=(0.1, 0.5), ratio=(0.5, 2.0)), 300
    plan = drawn(view, side, side, 20_000)[1].astype(float)
    area = plan[:, HEIGHT] * plan[:, WIDTH] / side**2
    shape = np.log2(plan[:, WIDTH] / plan[:, HEIGHT])
    for values, low, high in ((area, 0.1, 0.5), (shape, -1, 1)):
        counts, _ = np.histogram(values, 8, (low, high))
        assert abs(counts / len(plan) - 1 / 8).max() < 0.01
    for corner, extent in ((TOP, HEIGHT), (LEFT, WIDTH)):
        counts, _ = np.histogram(plan[:, corner] / (side - plan[:, extent] + 1), 8, (0, 1))
        assert abs(counts / len(plan) - 1 / 8).max() < 0.01


def test_factors_are_spread_evenly_and_come_in_every_order():
    view, count = View(flip=False, pad=0, jitter=(0.4, 0.0, 1.0)), 30_000
    _, plan, planner = drawn(view, 8, 8, count)
    assert (np.delete(plan, [GRAY, OPS, OPS + 1, OPS + 2], axis=1) == 0).all()
    chosen = planner.table.numpy()[plan[:, OPS : OPS + 3]]
    begins = np.cumsum([1, *map(len, jitter_tables(view.jitter))])
    which = np.searchsorted(begins, plan[:, OPS : OPS + 3], side="right") - 1
    orders, counts = np.unique(which, axis=0, return_counts=True)
    assert [tuple(order) for order in orders] == list(permutations(range(3)))
    assert abs(counts / count - 1 / 6).max() < 0.01
    for part, strength in enumerate(view.jitter):
        factors = chosen[which == part][:, 1]
        assert len(factors) == count
        if strength:
            counts, _ = np.histogram(factors, 8, (1 - strength, 1 + strength))
            assert abs(counts / count - 1 / 8).max() < 0.015
        else:
            assert (factors == 1).all()


def test_tables_of_jitter_have_each_factor_once_and_do_nothing_by_one():
    for strength, table in zip((0.4, 0.0, 1.0), jitter_tables((0.4, 0.0, 1.0)), strict=True):
        np.testing.assert_allclose(np.diff(table[:, 1]), 1 / 256, rtol=0)
        assert 0 <= table[0, 1] - (1 - strength) < 1 / 256
        assert 0 <= (1 + strength) - table[-1, 1] < 1 / 256
        assert ((table[:, 0] == pixel_ops.IDENTITY) == (table[:, 1] == 1)).all()


def test_blends_in_256ths_are_those_in_float32_for_every_pair_of_values():
    low, high = np.indices((256, 256), np.int16)
    lows, highs = low.astype(np.float32), high.astype(np.float32)
    for share in range(513):
        exact = np.clip(lows + np.float32(share / 256) * (highs - lows), 0, 255).astype(np.int16)
        assert (np.clip(pixel_ops.blend_256ths(low, high, np.int16(share)), 0, 255) == exact).all(), share


@pytest.mark.parametrize("factor", [0.0, 0.3, 77 / 256, 1.0, 1.4, 358 / 256, 2.0])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_factors_below_and_above_one_equal_pillow(which, factor):
    from PIL import ImageEnhance

    kind = (pixel_ops.BRIGHTNESS, pixel_ops.CONTRAST, pixel_ops.COLOR)[which]
    enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
    table, plan = np.zeros((2, 7)), np.zeros((len(KINDS), OPS + 1))
    table[1, :4], plan[:, OPS] = (kind, np.float32(factor), 0, 256 * factor if 256 * factor % 1 == 0 else 0), 1
    images = np.stack([stored(name, 17, 12) for name in KINDS])
    for image, mine in zip(images, pixels(images, list(range(len(KINDS))), plan, table), strict=True):
        np.testing.assert_array_equal(mine, np.asarray(enhancer(Image.fromarray(image)).enhance(factor)))


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0, -1, 0, 4, 4), r"within 8 x 9 pixels, got one of \[4, 4\] from \[-1, 0\] on"),
        ((0, 5, 0, 4, 4), r"got one of \[4, 4\] from \[5, 0\] on"),
        ((0, 0, 6, 4, 4), r"got one of \[4, 4\] from \[0, 6\] on"),
        ((0, 0, 0, 4, 0), r"got one of \[4, 0\] from \[0, 0\] on"),
        ((0, 0, 0, 0, 4), r"got one of \[0, 4\] from \[0, 0\] on"),
        ((0, 0, 0, 9, 9), r"column 10 of the plan must be within 0..8, got 0..9"),
        ((0, 0, 0, 8, -1), r"column 11 of the plan must be within 0..9, got -1..0"),
    ],
)
def test_a_crop_outside_of_the_image_is_refused(box, message):
    plan = torch.from_numpy(crops([(0, 0, 0, 0, 0) if min(box[3:]) else (0, 0, 0, 8, 8), box])).int()
    images, table = torch.zeros((1, 8, 9, 3), dtype=torch.uint8), torch.zeros((1, 7), dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        augment(images, torch.zeros(2, dtype=torch.int64), plan, table, ZERO, UNIT, torch.float32, 1)


def test_cutouts_and_operations_come_after_the_crop():
    image, side = np.full((1, 20, 20, 3), 200, np.uint8), 20
    view = View(pad=0, area=(0.2, 0.5), ops=("invert",), n=1, probability=1.0, cutout=0.5)
    _, plan, planner = drawn(view, side, side, 50)
    for p, mine in zip(plan, pixels(image, [0] * 50, plan, planner.table.numpy()), strict=True):
        expected = np.full((side, side, 3), 55, np.uint8)
        x0, y0, x1, y1 = p[CUT : CUT + 4]
        expected[y0:y1, x0:x1] = 127
        np.testing.assert_array_equal(mine, expected)
