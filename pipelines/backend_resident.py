"""Back end `resident`: the kernel gathers rows straight from the uint8 array.

On the CPU the array is memory-mapped, so "resident" means the operating system's page cache, which all processes of a
machine share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays


class ResidentReader:
    """Reads by handing out the whole array: nothing is copied and no thread is started."""

    name = "resident"

    def __init__(self, arrays: Arrays) -> None:
        self._images = {"train": torch.from_numpy(arrays.train), "test": torch.from_numpy(arrays.test)}

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """For each array of row ids: all images of the split (N, H, W, 3) uint8, and where in them the rows are."""
        images = self._images[split]
        for wanted in rows:
            yield images, wanted

    def close(self) -> None:
        self._images.clear()
