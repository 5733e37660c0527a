"""Back end `resident`: the kernel gathers rows straight from the uint8 array.

On the CPU the array is memory-mapped, so "resident" means the operating system's page cache, which all processes of a
machine share. On a GPU a split lives in its memory where it fits into half of what is free; of a larger one, the images
of a step are gathered on the CPU and copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays


class ResidentReader:
    """Reads by handing out the whole array: nothing is copied and no thread is started.

    Args:
        gpu: where the views are made, when that is a GPU.
    """

    name = "resident"

    def __init__(self, arrays: Arrays, gpu: torch.device | None = None) -> None:
        self._images = {"train": torch.from_numpy(arrays.train), "test": torch.from_numpy(arrays.test)}
        self._gpu = gpu

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """For each array of row ids: images (N, H, W, 3) uint8, all of the split or just these, and where they lie."""
        images = self._split(split)
        for wanted in rows:
            if self._gpu is not None and images.device.type != self._gpu.type:
                yield images[torch.from_numpy(wanted)], np.arange(len(wanted), dtype=np.int64)
            else:
                yield images, wanted

    def _split(self, split: str) -> Tensor:
        """The images of a split, on the GPU where they fit: copied at its first use, since not every run uses both."""
        images, gpu = self._images[split], self._gpu
        if gpu is not None and images.device.type != gpu.type and images.nbytes <= torch.cuda.mem_get_info(gpu)[0] // 2:
            self._images[split] = images = images.to(gpu)
        return images

    def close(self) -> None:
        self._images.clear()
