"""Batches at the speed of the hardware: `open_loaders` and `read_info`, and what they take and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError, unknown
from pipelines.arrays import Arrays, open_arrays, read_info
from pipelines.augment.op import DTYPES
from pipelines.augment.views import VIEWS, View
from pipelines.backends.dali import DaliLoaders
from pipelines.backends.ffcv import FfcvReader
from pipelines.backends.resident import ResidentReader, room_for_images
from pipelines.batch import Batch, Group, Info, Sizes, Stream, check_streams
from pipelines.cuda import launch as cuda_launch
from pipelines.loaders import Loaders

__all__ = ["VIEWS", "Batch", "Group", "Info", "Loaders", "Sizes", "Stream", "View", "open_loaders", "read_info"]

BACKENDS = ("auto", "resident", "ffcv", "dali")


def open_loaders(
    folder: str | Path,
    streams: Mapping[str, Stream],
    *,
    batch: int,
    mu: int = 1,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    rank: int = 0,
    world: int = 1,
    policies: Mapping[str, View] = VIEWS,
    threads: int | None = None,
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Loaders:
    """Open a data folder for training and testing.

    Args:
        folder: a folder made by data_prep/build.py.
        streams: what to read at every step, by name, in the order of `Batch.images`. The names decide the order of
            reading together with the seed.
        batch: images a step and process of streams that set none; a batch larger than its rows wraps around.
        mu: unlabeled images for each labeled one.
        seed: 0 or more; decides order and random views together with the step.
        device: where the batches are wanted.
        dtype: torch.float32 or torch.bfloat16.
        backend: "resident" (the array in memory), "ffcv" (train.beton, of FFCV), "dali" (DALI reads the shards and
            makes the views; of the streams "labeled" and "unlabeled" alone), or "auto": resident where there is room
            for the images on the device that makes the views (`room_for_images`) or there is no .beton of raw pixels,
            else ffcv.
        rank, world: this process and how many there are; ranks read disjoint parts of one order.
        policies: the views by name.
        threads: CPU threads for reading and augmenting; default: as many as torch uses.
        phase: a function from a phase's name ("augment") to a context manager put around it, for measuring time.

    Raises: UserError for a missing or damaged folder, an unknown view, part or back end, or a value out of range.
    """
    for rule, holds, got in (
        ("batch must be 1 or more", batch >= 1, batch),
        ("mu must be 1 or more", mu >= 1, mu),
        ("seed must be 0 or more", seed >= 0, seed),
        ("rank must be within 0..world - 1", 0 <= rank < world, f"rank {rank} of {world}"),
        ("threads must be 1 or more", threads is None or threads >= 1, threads),
        ("dtype must be float32 or bfloat16", dtype in DTYPES, dtype),
    ):
        if not holds:
            raise UserError(f"{rule}, got {got}")
    if backend not in BACKENDS:
        raise unknown("back end", backend, BACKENDS)
    if device.type == "cuda" and device.index is None:  # not GPU 0 for every process
        device = torch.device("cuda", torch.cuda.current_device())
    arrays = open_arrays(folder)
    check_streams(streams, policies, arrays.info)
    fault = cuda_launch.fault(device) if device.type == "cuda" else None
    gpu = device if device.type == "cuda" and fault is None else None
    reason = "as set"
    if backend == "auto":
        backend, reason = choose_backend(arrays, gpu or torch.device("cpu"))
    if backend == "ffcv" and arrays.manifest.origin.beton != "raw":
        reason += "; training images are what JPEG of quality 90 leaves"
    if fault is not None and backend != "dali":
        reason += f"; views are made on the CPU, much slower: {fault}"
    threads = threads or torch.get_num_threads()
    return (DaliLoaders if backend == "dali" else Loaders)(
        arrays,
        FfcvReader(arrays, gpu, threads) if backend == "ffcv" else ResidentReader(arrays, gpu),
        Sizes(dict(streams), batch, mu, world),
        policies,
        seed=seed,
        device=device,
        dtype=dtype,
        rank=rank,
        threads=threads,
        phase=phase,
        reason=reason,
        kernel_on_gpu=gpu is not None,
    )


def choose_backend(arrays: Arrays, device: torch.device) -> tuple[str, str]:
    """The back end that `auto` stands for, and why, by the size of the images and the room for them on the device that
    makes the views.

    DALI is never chosen, nor FFCV's files of JPEGs: their views differ from the others' in their bits, and a run may go
    on on another machine.
    """
    size, room = arrays.train.nbytes + arrays.test.nbytes, room_for_images(device)
    where = "on the GPU" if device.type == "cuda" else "in memory"
    sizes = f"{_bytes(size)} of images, room for {_bytes(room)} {where}"
    if size <= room:
        return "resident", sizes
    if "train.beton" not in arrays.manifest.files:
        return "resident", f"{sizes}, but the data set has no .beton files: images are paged in from disk"
    if arrays.manifest.origin.beton != "raw":
        return "resident", f"{sizes}, but train.beton keeps JPEGs, for data.backend=ffcv: images are paged in from disk"
    if find_spec("ffcv") is None:
        return "resident", f"{sizes}, but FFCV is not installed: images are paged in from disk"
    return "ffcv", sizes


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
