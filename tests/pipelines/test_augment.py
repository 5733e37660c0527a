"""The fused kernel equals Pillow to the bit, in every operation, level and sign, at odd and even sizes."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import pillow_views
from pipelines.augment_cpu import augment
from pipelines.plan import OPS
from pipelines.randaugment import FIXMATCH_OPS, find_ops, parameter_table

# With this mean and std the output is the pixel value itself, exactly: (pixel - 0) * 1.
ZERO, UNIT = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1 / 255, dtype=torch.float64)
SIZES = [(1, 1), (2, 2), (7, 9), (16, 16), (17, 17), (32, 32), (33, 33), (64, 64)]


def stored(kind: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image that exercises histograms: noise, a ramp, few values, one value, or one value in one channel only."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "ramp":
        ramp = np.linspace(40, 180, height * width).reshape(height, width, 1) + np.array([0, 20, 60])
        return (ramp + rng.integers(0, 6, (height, width, 3))).astype(np.uint8)
    if kind == "few":
        return rng.choice(np.array([3, 90, 91, 255], np.uint8), (height, width, 3), p=[0.7, 0.1, 0.1, 0.1])
    image = np.full((height, width, 3), 200, np.uint8)
    if kind == "one channel":
        image[..., 1] = rng.integers(0, 256, (height, width))
    return image


KINDS = ("noise", "ramp", "few", "flat", "one channel")


def pixels(images: np.ndarray, rows: list[int], plan: np.ndarray, table: np.ndarray, threads: int = 1) -> np.ndarray:
    """Run the kernel and undo nothing: (V, H, W, 3) uint8."""
    out = augment(
        torch.from_numpy(images),
        torch.tensor(rows),
        torch.from_numpy(plan.astype(np.int32)),
        torch.from_numpy(table),
        ZERO,
        UNIT,
        torch.float32,
        threads,
    )
    values = out.permute(0, 2, 3, 1).numpy()
    assert (values == values.astype(np.uint8)).all()
    return values.astype(np.uint8)


@pytest.mark.parametrize("name", FIXMATCH_OPS)
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
