"""Run in the simulator by test_augment_cuda: the CUDA kernel's views against the CPU kernel's, to the bit.

    python -m tests.pipelines.simulated_views

Prints how many views each part compared. Few threads: the simulator takes a process-wide turn for each of them.
"""

import sys

import numpy as np
import torch

from pipelines.augment.kernel_cuda import make_views
from pipelines.augment.op import augment
from pipelines.augment.plan import BLACK, BORDER, CUT, FIRST, FLIP, GRAY, HEIGHT, LEFT, OPS, TOP, WIDTH, Planner
from pipelines.augment.randaugment import OPERATIONS, find_ops, parameter_table
from pipelines.augment.views import VIEWS
from tests.pipelines.view_cases import KINDS, stored

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]).double(), torch.tensor([0.2471, 0.2435, 0.2616]).double()
NAMES = tuple(OPERATIONS)


def compare(images: np.ndarray, plan: np.ndarray, table: np.ndarray, *, threads: int = 3, **options: int) -> int:
    """Make the views on both sides in both dtypes, view i of image i modulo their number. Returns how many."""
    rows = torch.arange(len(plan)) % len(images)
    tensors = (torch.from_numpy(images), rows, torch.from_numpy(plan), torch.from_numpy(table), MEAN, STD)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        expected = augment(*tensors, dtype, 1).view(bits)
        got = make_views(*tensors, dtype, threads=threads, **options)
        assert got.is_contiguous(memory_format=torch.channels_last)
        wrong = (got.view(bits) != expected).flatten(1).any(1).nonzero().flatten().tolist()
        first = plan[wrong[0]].tolist() if wrong else None
        assert not wrong, f"{dtype}, {images.shape}: {len(wrong)} views differ, the first has the plan {first}"
    return 2 * len(plan)


def gallery(height: int, width: int) -> np.ndarray:
    return np.stack([stored(kind, height, width) for kind in KINDS])


def every_row(names: tuple[str, ...], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A table, and a plan with each of its rows once: every operation, level and sign."""
    table = parameter_table(find_ops(names), (0, 10), height, width)
    distinct = np.unique(table, axis=0, return_index=True)[1]
    plan = np.zeros((len(distinct), OPS + 1), np.int32)
    plan[:, OPS] = distinct
    return plan, table


def operations() -> int:
    """Every operation, level and sign, on sides that are even and odd; histograms where they have enough pixels."""
    compared = 0
    for height, width in ((6, 4), (5, 7)):
        compared += compare(gallery(height, width), *every_row(NAMES, height, width))
    images = gallery(17, 16)
    plan, table = every_row(("equalize", "autocontrast", "contrast"), 17, 16)
    plan = np.repeat(plan[plan[:, OPS] < 2 * 11 * 2 + 8], len(images), axis=0)
    return compared + compare(images, plan, table, threads=5)


def plans() -> int:
    """Crops, borders, cutouts, operations in turn and before the crop, by chance but in every combination."""
    rng = np.random.default_rng(0)
    compared = 0
    for height, width in ((1, 1), (4, 4), (7, 5)):
        table = parameter_table(find_ops(NAMES), (1, 9), height, width)
        plan = np.zeros((48, OPS + 3), np.int32)
        plan[:, FLIP], plan[:, BORDER], plan[:, FIRST] = np.indices((2, 2, 2)).reshape(3, 8).repeat(6, axis=1)
        plan[:, TOP], plan[:, LEFT] = (rng.integers(1 - side, side, 48) for side in (height, width))
        corners = rng.integers(0, [width + 1, height + 1], (48, 2, 2))
        plan[:, CUT : CUT + 4] = np.sort(corners, axis=1).reshape(48, 4)
        plan[:, GRAY] = rng.choice([0, 127, 255], 48)
        plan[:, OPS:] = rng.integers(0, len(table), (48, 3)) * (rng.random((48, 3)) < 0.8)
        assert (plan[:, BORDER] == BLACK).any()
        compared += compare(gallery(height, width), plan, table)
    return compared


def workspace() -> int:
    """Images in global memory, by more views than blocks; one thread alone; more threads than pixels."""
    height, width = 5, 6
    plan, table = every_row(("sharpness", "rotate", "equalize"), height, width)
    plan, images = plan[::3], gallery(height, width)
    compared = compare(images, plan, table, shared_bytes=0, workspace=3 * 2 * 3 * height * width)
    compared += compare(images, plan, table, threads=1)
    return compared + compare(gallery(2, 1), plan[:3], table, threads=9)


def crops() -> int:
    """Resized crops by chance, of one pixel up to all, in shared and in global memory; then a whole policy."""
    rng = np.random.default_rng(1)
    compared = 0
    for height, width, options in ((1, 2, {}), (6, 5, {}), (7, 9, {"shared_bytes": 0, "workspace": 2 * 2 * 3 * 7 * 9})):
        plan = np.zeros((24, OPS), np.int32)
        plan[:, FLIP] = np.arange(24) % 2
        for corner, extent, side in ((TOP, HEIGHT, height), (LEFT, WIDTH, width)):
            plan[:, extent] = rng.integers(1, side + 1, 24)
            plan[:, corner] = rng.integers(0, side - plan[:, extent] + 1)
        compared += compare(gallery(height, width), plan, np.zeros((1, 7)), **options)
    view = VIEWS["strong_photo"]
    planner = Planner([view], 8, 8)
    plan = planner.sample(view, 24, torch.Generator().manual_seed(0))
    return compared + compare(gallery(8, 8), plan, planner.table.numpy())


if __name__ == "__main__":
    sys.setswitchinterval(1e-4)  # threads of the simulator interrupt each other often, so that a race would show
    print(operations(), plans(), workspace(), crops())
