"""Images and arguments for kernels that make views. Without the libraries of tests: where a card is, they may lack."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.augment.op import augment
from pipelines.augment.plan import Planner
from pipelines.augment.views import VIEWS

# With this mean and std the output is the pixel value itself, exactly: (pixel - 0) * 1.
ZERO, UNIT = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1 / 255, dtype=torch.float64)
KINDS = ("noise", "ramp", "few", "flat", "one channel")


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


def strong_batch(side: int = 16, views: int = 130, name: str = "strong") -> tuple:
    """Arguments of `augment` without dtype and threads."""
    images = torch.from_numpy(np.stack([stored(kind, side, side) for kind in KINDS]))
    planner = Planner([VIEWS[name]], side, side)
    plan = torch.from_numpy(planner.sample(VIEWS[name], views, torch.Generator().manual_seed(3)))
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]).double(), torch.tensor([0.2471, 0.2435, 0.2616]).double()
    return images, torch.arange(views) % len(images), plan, planner.table, mean, std
