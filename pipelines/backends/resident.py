"""Back end `resident`: the kernel gathers rows straight from the uint8 array.

On the CPU the array is memory-mapped, so "resident" means the operating system's page cache, which all processes of a
machine share. On a GPU a split lives in its memory where there is room for it, which is decided once, before the
network takes its own; of a larger one, the images of a step are gathered on the CPU and copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.arrays import Arrays, as_tensor, copied

# Of a GPU's memory. Choice: the network comes first. A step of 256 images of 64 px through ResNet-50 in bf16 keeps some
# 16 GB until its backward, and needs room besides: a card of 40 GB has a quarter to spare.
GPU_SHARE = 0.25


class ResidentReader:
    """Reads by handing out the whole array: nothing is copied and no thread is started.

    Args:
        gpu: where the views are made, when that is a GPU.
    """

    name = "resident"

    def __init__(self, arrays: Arrays, gpu: torch.device | None = None) -> None:
        self._images = {"train": as_tensor(arrays.train), "test": as_tensor(arrays.test)}
        self._gpu = gpu
        room = 0 if gpu is None else room_for_images(gpu)
        self._for_gpu = set()
        for split, images in self._images.items():  # the training images first
            if images.nbytes <= room:
                self._for_gpu.add(split)
                room -= images.nbytes

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """For each array of row ids: images (N, H, W, 3) uint8, all of the split or just these, and where they lie."""
        images = self._split(split)
        for wanted in rows:
            if self._gpu is not None and images.device.type != self._gpu.type:
                yield copied(images, wanted)
            else:
                yield images, wanted

    def _split(self, split: str) -> Tensor:
        """The images of a split, on the GPU where they fit: copied at its first use, since not every run uses both."""
        if split in self._for_gpu:
            self._for_gpu.remove(split)
            self._images[split] = self._images[split].to(self._gpu)
        return self._images[split]

    def close(self) -> None:
        self._images.clear()


def room_for_images(device: torch.device) -> int:
    """Bytes of images that a device may keep.

    On a GPU `GPU_SHARE` of its memory, and at most half of what is free; on a CPU half of what can be had without
    swapping.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(int(GPU_SHARE * total), free // 2)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
