"""`augment`: stored uint8 images in, finished views out, in one call for all views of a step.

An ordinary operator of torch (`torch.ops.semi_fast.augment`), so that torch.compile and autocast can handle it. Work is
split over a pool of plain threads: the kernel releases the GIL, and neither torch's nor numba's thread settings take
part or change.
"""

from __future__ import annotations

import math
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.cores import usable_cores
from pipelines.augment import kernel_cpu as augment_cpu
from pipelines.augment.plan import CUT, HEIGHT, LEFT, OPS, TOP, WIDTH
from pipelines.cuda import launch as cuda_launch

DTYPES = (torch.float32, torch.bfloat16)

# Threads take parts of about this many views as they come, so that one that another process delays does not keep the
# others waiting. Of fewer, handing out work costs more than it saves.
_VIEWS_A_PART = 32


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, usable_cores() - 1), thread_name_prefix="augment")


# A forked child has no copy of the threads, only of the object that believes it has them.
os.register_at_fork(after_in_child=_pool.cache_clear)


_free: dict[int, list[NDArray[np.uint8]]] = {}  # memory of views that are no more, by its size in bytes


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in the memory of an earlier one, once nothing refers to that or a slice of it any more.

    Fresh memory of this size comes from the operating system, page by page, at half the cost of the views.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        memory = _free[size].pop()
    except (KeyError, IndexError):
        _free.clear()  # sizes that are not in use any more
        memory = torch.empty(size, dtype=torch.uint8).numpy()  # torch's is aligned to vectors
    lent = memory[:]  # an object of its own, which nothing but the tensor's storage keeps
    weakref.finalize(lent, lambda: _free.setdefault(size, []).append(memory)).atexit = False
    return torch.from_numpy(lent).view(dtype).view(shape)


# Defined by its schema: what torch.library.custom_op puts around an operator costs more than a view.
torch.library.define(
    "semi_fast::augment",
    "(Tensor images, Tensor rows, Tensor plan, Tensor table, Tensor mean, Tensor std, ScalarType dtype, int threads)"
    " -> Tensor",
)


def augment(
    images: Tensor,
    rows: Tensor,
    plan: Tensor,
    table: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    threads: int,
) -> Tensor:
    """Make one view for each row of the plan.

    Args:
        images: (N, H, W, 3) uint8, contiguous; may be memory-mapped. The view is made where they are: on the CPU or on
            a CUDA device, where this queues one launch and waits for nothing. The other tensors are on the CPU.
            On the CPU the images may lie in other distances from one another, and overlap.
        rows: (V,) int64, the image that each view shows.
        plan: (V, C) int32, see `pipelines.augment.plan`.
        table: (T, 7) float64, the parameters that the plan refers to.
        mean, std: (3,) float64 in units of pixels / 255; std above 0.
        dtype: float32 or bfloat16.
        threads: of the CPU, 1 or more; the result does not depend on it.

    Returns: (V, 3, H, W) channels_last: (pixel - 255 mean) * (1 / (255 std)) in float32, rounded to `dtype`.

    Raises: ValueError for a shape or dtype other than these, and for rows or plans that point outside of the images.
        UserError where images are on a CUDA device and numba-cuda is not installed.
    """
    return torch.ops.semi_fast.augment(images, rows, plan, table, mean, std, dtype, threads)


def _make_on_cpu(
    images: Tensor,
    rows: Tensor,
    plan: Tensor,
    table: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    threads: int,
) -> Tensor:
    _check(images, rows, plan, table, dtype)
    views, (count, height, width, _) = len(rows), images.shape
    distance = images.stride(0)
    flat = _empty((views, height, 3 * width), dtype)
    full = dtype == torch.float32
    arguments = (
        images.as_strided((count and (count - 1) * distance + 3 * height * width,), (1,)).numpy(),
        rows.numpy() * distance,
        plan.numpy(),
        table.numpy(),
        (255.0 * mean.numpy()).astype(np.float32),
        (1.0 / (255.0 * std.numpy())).astype(np.float32),
        flat.numpy() if full else np.empty((0, height, 3 * width), np.float32),
        np.empty((0, height, 3 * width), np.uint16) if full else flat.view(torch.uint16).numpy(),
    )
    parts = max(1, views // _VIEWS_A_PART) if threads > 1 else 1
    bounds = [views * i // parts for i in range(parts + 1)]
    left = iter(range(parts))  # shared: taking from it is one step of the interpreter

    def make() -> None:
        for part in left:
            augment_cpu.run(*arguments, bounds[part], bounds[part + 1])

    others = [_pool().submit(make) for _ in range(min(threads, parts) - 1)]
    make()
    for other in others:
        if not other.cancel():  # one that has not begun finds nothing left to do
            other.result()
    return flat.view(views, height, width, 3).permute(0, 3, 1, 2)


torch.library.impl("semi_fast::augment", "CPU", _make_on_cpu)


@torch.library.impl("semi_fast::augment", "CUDA")
def _(images, rows, plan, table, mean, std, dtype, threads):
    _check(images, rows, plan, table, dtype)
    cuda_launch.cuda()
    from pipelines.augment.kernel_cuda import make_views  # imports numba.cuda

    return make_views(images, rows, plan, table, mean, std, dtype)


@torch.library.register_fake("semi_fast::augment")
def _(images, rows, plan, table, mean, std, dtype, threads):
    _, height, width, _ = images.shape
    shape = (rows.shape[0], 3, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


def _check(images: Tensor, rows: Tensor, plan: Tensor, table: Tensor, dtype: torch.dtype) -> None:
    """The kernel reads and writes without bounds checks: everything it indexes with is checked here, on the CPU."""
    if not (rows.is_cpu and plan.is_cpu and table.is_cpu):
        elsewhere = [str(tensor.device) for tensor in (rows, plan, table) if not tensor.is_cpu]
        raise ValueError(f"rows, plan and table must be on the CPU, where they are checked, got {elsewhere[0]}")
    in_form = images.is_contiguous() or (images.is_cpu and images[:1].is_contiguous())
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or not in_form:
        raise ValueError(f"images must be contiguous (N, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if plan.dtype != torch.int32 or plan.dim() != 2 or len(plan) != len(rows) or plan.shape[1] < OPS:
        raise ValueError(f"plan must be ({len(rows)}, {OPS} or more) int32, got {tuple(plan.shape)} {plan.dtype}")
    if not len(rows):
        return
    count, height, width, _ = images.shape
    limits, lowest, spreads = _limits(height, width, plan.shape[1], len(table))
    if ((plan.numpy() - lowest).view(np.uint32) > spreads).any():
        _check_columns(plan.numpy(), limits, lowest)
        _check_crops(plan.numpy(), height, width)
    if rows.dtype != torch.int64 or int(rows.numpy().view(np.uint64).max()) >= count:
        raise ValueError(f"rows must be int64 within 0..{count - 1}, got {rows.dtype} {rows.min()}..{rows.max()}")


def _check_columns(plan: NDArray[np.int32], limits: dict[int, int], lowest: NDArray[np.int32]) -> None:
    smallest, largest = plan.min(0), plan.max(0)
    for column, limit in limits.items():
        if smallest[column] < lowest[column] or largest[column] >= limit:
            allowed, got = f"{lowest[column]}..{limit - 1}", f"{smallest[column]}..{largest[column]}"
            raise ValueError(f"column {column} of the plan must be within {allowed}, got {got}")


def _check_crops(plan: NDArray[np.int32], height: int, width: int) -> None:
    """Those that are resized have pixels, all of them within the image."""
    corners, boxes = plan[:, TOP : LEFT + 1], plan[:, HEIGHT : WIDTH + 1]
    outside = (corners < 0) | (boxes < 1) | (corners + boxes > (height, width))
    wrong = boxes.any(1) & outside.any(1)
    if wrong.any():
        corner, box = corners[wrong][0].tolist(), boxes[wrong][0].tolist()
        raise ValueError(f"a crop must lie within {height} x {width} pixels, got one of {box} from {corner} on")


@lru_cache
def _limits(height: int, width: int, columns: int, entries: int) -> tuple[dict[int, int], NDArray[Any], NDArray[Any]]:
    """What a plan may hold: an end for each column that is an index, then the least and the spread of every column of a
    plan that needs no closer look: one without resized crops."""
    limits = {TOP: height, LEFT: width, HEIGHT: height + 1, WIDTH: width + 1}
    limits |= {CUT: width + 1, CUT + 1: height + 1, CUT + 2: width + 1, CUT + 3: height + 1}
    limits |= dict.fromkeys(range(OPS, columns), entries)
    lowest = np.full(columns, -(2**31), np.int32)
    spreads = np.full(columns, 2**32 - 1, np.uint32)
    for column, limit in limits.items():
        lowest[column] = 1 - limit if column in (TOP, LEFT) else 0
        spreads[column] = 0 if column in (HEIGHT, WIDTH) else limit - 1 - lowest[column]
    return limits, lowest, spreads
