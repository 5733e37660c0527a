"""The fused kernel equals Pillow to the bit, in every operation, level and sign, at odd and even sizes."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import pillow_views
from pipelines.augment import kernel_cpu as augment_cpu
from pipelines.augment import pixel_ops
from pipelines.augment.op import _pool, augment
from pipelines.augment.plan import BORDER, CUT, FLIP, LEFT, OPS, TOP, Planner
from pipelines.augment.randaugment import OPERATIONS, find_ops, parameter_table
from pipelines.augment.views import VIEWS
from tests.pipelines.view_cases import KINDS, pixels, stored, strong_batch

NAMES = tuple(OPERATIONS)
SIZES = [(1, 1), (2, 2), (7, 9), (16, 16), (17, 17), (32, 32), (33, 33), (64, 64)]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_operation_equals_pillow(name, height, width):
    images = np.stack([stored(kind, height, width, seed) for kind in KINDS for seed in range(2)])
    table = parameter_table(find_ops([name]), (0, 10), height, width)
    for level in range(11):
        for s, sign in enumerate((1, -1)):
            plan = np.zeros((len(images), OPS + 1))
            plan[:, OPS] = level * 2 + s
            got = pixels(images, list(range(len(images))), plan, table)
            for image, mine in zip(images, got, strict=True):
                expected = np.asarray(pillow_views.OPS[name](Image.fromarray(image), level, sign))
                np.testing.assert_array_equal(mine, expected, err_msg=f"{name} level {level} sign {sign}")


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (16, 16), (33, 33)])
def test_every_crop_equals_flip_then_pad_then_cut(height, width, flip):
    image = stored("noise", height, width)
    offsets = [(top, left) for top in range(1 - height, height, 2) for left in range(1 - width, width, 2)]
    plan = np.zeros((len(offsets), OPS))
    plan[:, FLIP] = flip
    plan[:, [TOP, LEFT]] = offsets
    source = image[:, ::-1] if flip else image
    for border, mode in ((0, "reflect"), (1, "constant")):
        plan[:, BORDER] = border
        padded = np.pad(source, ((height - 1,) * 2, (width - 1,) * 2, (0, 0)), mode=mode)
        got = pixels(image[None], [0] * len(plan), plan, np.zeros((1, 7)))
        for (top, left), mine in zip(offsets, got, strict=True):
            y, x = height - 1 + top, width - 1 + left
            np.testing.assert_array_equal(mine, padded[y : y + height, x : x + width], err_msg=f"{top}, {left}")


@pytest.mark.parametrize("name", ["weak", "strong"])
@pytest.mark.parametrize("side", [16, 17, 32, 33, 64])
def test_whole_views_equal_pillow_from_the_same_random_numbers(name, side, shared_images):
    images = shared_images(side)
    view, rows = VIEWS[name], list(np.random.default_rng(side).integers(0, len(images), 400))
    planner = Planner([view], side, side)
    plan = planner.sample(view, len(rows), torch.Generator().manual_seed(side))
    got = pixels(images, rows, plan, planner.table.numpy(), threads=2)
    draws = torch.rand(
        (len(rows), 5 + 4 * view.n), dtype=torch.float64, generator=torch.Generator().manual_seed(side)
    ).tolist()
    reference = getattr(pillow_views, name)
    for row, numbers, mine in zip(rows, draws, got, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(reference(Image.fromarray(images[row]), numbers)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), height=st.integers(1, 24), width=st.integers(1, 24))
def test_chains_of_operations_equal_pillow_on_any_image(data, height, width):
    values = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=6), label="values used")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), label="seed"))
    image = rng.choice(np.array(values, np.uint8), (height, width, 3))
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4), label="operations")
    choices = [(name, data.draw(st.integers(0, 10)), data.draw(st.sampled_from([1, -1]))) for name in names]
    plan = np.zeros((1, OPS + len(names)))
    expected = Image.fromarray(image)
    for i, (name, level, sign) in enumerate(choices):
        plan[0, OPS + i] = (NAMES.index(name) * 11 + level) * 2 + (sign < 0)
        expected = pillow_views.OPS[name](expected, level, sign)
    table = parameter_table(find_ops(NAMES), (0, 10), height, width)
    np.testing.assert_array_equal(pixels(image[None], [0], plan, table)[0], np.asarray(expected))


def test_output_is_channels_last_and_normalized_in_float32():
    arguments = strong_batch()
    images, rows, plan, table, mean, std = arguments
    raw = pixels(images.numpy(), rows.tolist(), plan.numpy(), table.numpy())
    out = augment(*arguments, torch.float32, 1)
    assert out.shape == (len(rows), 3, 16, 16)
    assert out.is_contiguous(memory_format=torch.channels_last)
    center, scale = (255 * mean).float().numpy(), (1 / (255 * std)).float().numpy()
    np.testing.assert_array_equal(out.permute(0, 2, 3, 1).numpy(), (raw.astype(np.float32) - center) * scale)
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), (raw / 255 - mean.numpy()) / std.numpy(), atol=2e-6)


def test_bfloat16_is_the_float32_view_rounded_to_nearest_even():
    arguments = strong_batch()
    full, half = (augment(*arguments, dtype, 1) for dtype in (torch.float32, torch.bfloat16))
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, full.to(torch.bfloat16))


@pytest.mark.parametrize("views", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_threads(views, dtype):
    arguments = strong_batch(views=views)
    before = torch.get_num_threads()
    results = [augment(*arguments, dtype, threads) for threads in (1, 2, 5)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.get_num_threads() == before


def test_threads_that_are_kept_busy_hold_nobody_up():
    arguments, free = strong_batch(views=130), threading.Event()
    last_resort = threading.Timer(30, free.set)
    last_resort.start()
    blocked = [_pool().submit(free.wait) for _ in range(os.cpu_count() or 1)]
    try:
        views = augment(*arguments, torch.float32, 4)
        assert not free.is_set()
    finally:
        free.set()
        last_resort.cancel()
    assert all(each.result() for each in blocked)
    assert torch.equal(views, augment(*arguments, torch.float32, 1))


def test_memory_is_used_again_only_when_nothing_refers_to_it():
    arguments = strong_batch()
    first = augment(*arguments, torch.float32, 1)
    address, kept = first.data_ptr(), first.clone()
    part = first[3:5]
    del first
    others = [
        augment(*arguments[:2], torch.zeros_like(arguments[2]), *arguments[3:], torch.float32, 1) for _ in range(4)
    ]
    assert len({address, *(other.data_ptr() for other in others)}) == 5
    assert torch.equal(part, kept[3:5])
    array = part.numpy()
    del part
    assert augment(*arguments, torch.float32, 1).data_ptr() != address
    np.testing.assert_array_equal(array, kept[3:5].numpy())
    del array
    free = {augment(*arguments, torch.float32, 1).data_ptr() for _ in range(3)}
    assert address in free


def test_no_views_give_an_empty_tensor():
    images, rows, plan, *rest = strong_batch()
    assert augment(images, rows[:0], plan[:0], *rest, torch.float32, 2).shape == (0, 3, 16, 16)


def test_the_operator_is_an_ordinary_one_for_torch():
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.semi_fast.augment.default, (*strong_batch(views=5), dtype, 1))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (TOP, 16, r"column 1 of the plan must be within -15..15, got 0..16"),
        (LEFT, -16, r"column 2 of the plan must be within -15..15, got -16..0"),
        (CUT, -1, r"column 4 .* within 0..16"),
        (CUT + 3, 17, r"column 7 .* within 0..16"),
        (OPS, 1, rf"column {OPS} .* within 0..0"),
    ],
)
def test_a_plan_that_points_outside_is_refused(column, value, message):
    images, rows, plan, _, mean, std = strong_batch(views=2)
    plan = torch.zeros_like(plan)
    plan[1, column] = value
    with pytest.raises(ValueError, match=message):
        augment(images, rows, plan, torch.zeros((1, 7), dtype=torch.float64), mean, std, torch.float32, 1)


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({0: torch.zeros((5, 16, 16, 3))}, "images must be contiguous"),
        ({0: torch.zeros((5, 16, 3, 16), dtype=torch.uint8).transpose(2, 3)}, "images must be contiguous"),
        ({1: torch.tensor([0, 5])}, r"rows must be int64 within 0..4, got torch.int64 0..5"),
        ({1: torch.tensor([0, -1])}, r"rows must be int64 within 0..4"),
        ({1: torch.tensor([0, 1], dtype=torch.int32)}, r"rows must be int64"),
        ({1: torch.tensor([0])}, rf"plan must be \(1, {OPS} or more\) int32, got \(2, {OPS + 2}\)"),
        ({6: torch.float16}, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
    ],
)
def test_wrong_arguments_are_refused(replace, message):
    arguments = [*strong_batch(views=2), torch.float32, 1]
    for position, value in replace.items():
        arguments[position] = value
    with pytest.raises(ValueError, match=message):
        augment(*arguments)


def test_smoothing_rounds_every_possible_sum_to_nearest():
    totals = np.arange(13 * 255 + 1)
    got = [int(pixel_ops.smooth(np.float32(total))) for total in totals]
    np.testing.assert_array_equal(got, (totals + 6) // 13)
    np.testing.assert_array_equal([pixel_ops.smooth_whole(total) for total in totals], got)


def test_blends_in_hundredths_are_those_in_float32_for_every_pair_of_values():
    low, high = np.indices((256, 256), np.uint16)
    levels = [OPERATIONS["color"].parameters(v, 1, 32, 32) for v in range(11)]
    assert [hundredths > 0 for _, hundredths in levels].count(True) == 10
    for factor, hundredths in levels:
        lows, highs = low.astype(np.float32), high.astype(np.float32)
        exact = (lows + np.float32(factor) * (highs - lows)).astype(np.int32)
        percent = hundredths or round(100 * factor)
        got = pixel_ops.blend_hundredths(low, high, np.uint16(100 - percent), np.uint16(percent))
        assert (got == exact).all() == (hundredths > 0)


def test_equalizing_by_the_inverse_is_dividing():
    for step in (*range(1, 300), 4111, 10**6 + 3):
        for before in {*range(0, min(255 * step, 2000), 3), step - step // 2, step - step // 2 - 1, 254 * step}:
            expected = min((step // 2 + before) // step, 255)
            assert pixel_ops.equalized_by(before, step, 1.0 / step) == pixel_ops.equalized(before, step) == expected


def test_the_cached_kernel_is_made_of_the_sources_as_they_are():
    stamp = augment_cpu.run(
        np.zeros(12, np.uint8),
        np.zeros(1, np.int64),
        np.zeros((1, OPS), np.int32),
        np.zeros((1, 7)),
        np.zeros(3, np.float32),
        np.ones(3, np.float32),
        np.zeros((1, 2, 6), np.float32),
        np.zeros((0, 2, 6), np.uint16),
        0,
        1,
    )
    assert stamp == augment_cpu.STAMP


@pytest.mark.parametrize("distance", [0, 1, 3 * 16 * 16 - 7, 3 * 16 * 16 + 5])
def test_images_may_lie_in_any_distance_from_one_another(distance):
    _, rows, *others = strong_batch()
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 4 * 1000, dtype=np.uint8))
    images = data[3:].as_strided((5, 16, 16, 3), (distance, 48, 3, 1), storage_offset=3)
    got, expected = (augment(form, rows, *others, torch.float32, 2) for form in (images, images.contiguous()))
    assert torch.equal(got, expected)


def test_a_forked_process_makes_views_too(root):
    script = """
import os, torch
from pipelines.augment.op import augment
from tests.pipelines.view_cases import strong_batch
arguments = strong_batch()
expected = augment(*arguments, torch.float32, 2)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(augment(*arguments, torch.float32, 2), expected) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=root, check=True, timeout=120)
