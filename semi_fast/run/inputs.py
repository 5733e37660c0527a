"""Images as a trained network takes them, outside of the training loaders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import Info


def normalized(images: NDArray[np.uint8] | Tensor, info: Info, device: torch.device | str = "cpu") -> Tensor:
    """Images (n, H, W, 3) uint8 -> (n, 3, H, W) float32, channels_last: pixels / 255, less the mean, over the std."""
    x = torch.as_tensor(images).to(device).float().div_(255)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=x.device) for values in (info.mean, info.std))
    return x.sub_(mean).div_(std).permute(0, 3, 1, 2)


def batches(
    images: NDArray[np.uint8],
    rows: Sequence[int] | NDArray[np.int64],
    info: Info,
    device: torch.device | str,
    size: int,
) -> Iterator[Tensor]:
    """The rows of an array of images, normalized, `size` at a time."""
    for start in range(0, len(rows), size):
        yield normalized(images[np.asarray(rows[start : start + size])], info, device)
