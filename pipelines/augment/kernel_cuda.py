"""The fused augmentation kernel for CUDA: a block of threads makes a view, in uint8 scratch in shared memory.

The same plan, the same table and the same scalar functions as on the CPU, and the same result to the bit. The kernel is
compiled for one size of image, so that divisions by the width are multiplications, when the first batch of that size
comes. Scratch is two copies of an image: in shared memory up to 86 x 86 pixels, where 48 KiB (what a block may have
without asking) hold them; above that in global memory, where the caches of the device hold them, for at most
`WORKSPACE` bytes of views at a time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from numba import cuda
from torch import Tensor

from pipelines.augment import ops_cuda as ops
from pipelines.augment import pixel_ops as px
from pipelines.augment import plan as plans
from pipelines.augment.plan import BLACK, BORDER, CUT, FIRST, FLIP, GRAY, HEIGHT, LEFT, OPS, TOP, WIDTH
from pipelines.cuda.launch import jit_cached, kept_array, kept_copy, launch, sources_version

THREADS = 256
SHARED_BYTES = 48 * 1024
WORKSPACE = 1 << 28

SCRATCH, BINS = ops.SCRATCH, ops.BINS
STATIC_BYTES = 4 * SCRATCH + BINS  # shared memory besides the images
VERSION = sources_version(ops, px, plans)


@ops.device
def change(pixels, at, other, height, width, entry, lut, scratch):
    """Apply one operation to the image at `at`. Returns where the result is: `at`, or `other`."""
    length = 3 * height * width
    kind, whole, factor = np.int32(entry[0]), np.int32(entry[1]), np.float32(entry[1])
    if kind == px.AUTOCONTRAST:
        ops.autocontrast_table(pixels, at, length, lut, scratch)
        ops.look_up(pixels, at, length, lut)
    elif kind == px.EQUALIZE:
        ops.equalize_table(pixels, at, length, lut, scratch)
        ops.look_up(pixels, at, length, lut)
    elif kind == px.POSTERIZE:
        ops.posterize(pixels, at, length, whole)
    elif kind == px.SOLARIZE:
        ops.solarize(pixels, at, length, whole)
    elif kind == px.SOLARIZE_ADD:
        ops.solarize_add(pixels, at, length, whole)
    elif kind == px.BRIGHTNESS:
        ops.blend_with_gray(pixels, at, length, np.float32(0.0), factor)
    elif kind == px.CONTRAST:
        gray = ops.gray_mean(pixels, at, length, scratch)
        ops.blend_with_gray(pixels, at, length, np.float32(gray), factor)
    elif kind == px.COLOR:
        ops.color(pixels, at, length, factor)
    else:  # these read pixels around the one they write
        if kind == px.SHARPNESS:
            ops.sharpen(pixels, at, other, height, width, factor)
        else:
            ops.affine(pixels, at, other, height, width, entry)
        at = other
    cuda.syncthreads()
    return at


@ops.device
def make_view(source, start, p, ops_end, table, pixels, home, height, width, lut, scratch):
    """Crop the image at source[start], padded or resized, and operate on it as the plan's row `p` says, whose
    operations end before column `ops_end`, within the two images' worth of bytes at pixels[home]. Returns where the
    result is."""
    at, other = home, home + 3 * height * width
    first, flip, top, left, black = p[FIRST] != 0, p[FLIP], p[TOP], p[LEFT], p[BORDER] == BLACK
    if p[HEIGHT]:
        ops.resize_columns(source, start, pixels, other, height, width, flip, top, left, p[HEIGHT], p[WIDTH])
        cuda.syncthreads()
        ops.resize_rows(pixels, other, at, height, width, top, p[HEIGHT])
    elif first:
        ops.crop(source, start, pixels, at, height, width, 0, 0, 0, black)
    else:
        ops.crop(source, start, pixels, at, height, width, flip, top, left, black)
    cuda.syncthreads()
    for slot in range(OPS, ops_end):
        entry = table[p[slot]]
        if entry[0] != px.IDENTITY:
            done = change(pixels, at, other, height, width, entry, lut, scratch)
            at, other = done, at + other - done
    if first:
        ops.crop(pixels, at, pixels, other, height, width, flip, top, left, black)
        cuda.syncthreads()
        at = other
    return at


@ops.device
def write_view(pixels, at, height, width, p, normal, out, start, full):
    """Cut out, normalize, round and write the image at `at` to out[start]."""
    row = 3 * width
    for i in range(cuda.threadIdx.x, height * row, cuda.blockDim.x):
        y, x, channel = i // row, i % row // 3, i % 3
        cut = p[CUT] <= x < p[CUT + 2] and p[CUT + 1] <= y < p[CUT + 3]
        pixel = np.int32(p[GRAY]) if cut else np.int32(pixels[at + i])
        value = ops.normalize(np.float32(pixel), normal[channel], normal[3 + channel])
        if full:
            out[start + i] = value
        else:
            out[start + i] = np.uint16(ops.bfloat16_bits(np.uint32(ops.float_bits(value))))


def build(height: int, width: int, full: bool, shared: bool) -> Any:
    """The kernel, as plain Python, for images of this size.

    Args:
        full: write float32; else the bits of bfloat16.
        shared: keep the images in shared memory; else in `workspace`, 6 height width bytes for each block.
    """
    length = 3 * height * width
    room = 2 * length if shared else 1
    version = VERSION

    def run(images, plan, table, normal, out, workspace):
        """Views blockIdx.x, blockIdx.x + gridDim.x, ... of the plan; `signature` has the types of the arguments.

        The last column of the plan here is the row of the image. images, out and workspace are flat; normal: the mean
        of each channel in pixel values, then 1 / std of each.
        """
        version  # noqa: B018
        scratch = cuda.shared.array(SCRATCH, numba.int32)
        lut = cuda.shared.array(BINS, numba.uint8)
        near = cuda.shared.array(room, numba.uint8)
        pixels, home = (near, 0) if shared else (workspace, 2 * length * cuda.blockIdx.x)
        columns = plan.shape[1] - 1
        for v in range(cuda.blockIdx.x, plan.shape[0], cuda.gridDim.x):
            p = plan[v]
            start = np.int64(p[columns]) * length
            at = make_view(images, start, p, columns, table, pixels, home, height, width, lut, scratch)
            write_view(pixels, at, height, width, p, normal, out, v * length, full)
            cuda.syncthreads()

    return run


def signature(full: bool) -> Any:
    """numba's types of the kernel's arguments."""
    u8, out = numba.uint8[::1], numba.float32[::1] if full else numba.uint16[::1]
    return numba.void(u8, numba.int32[:, ::1], numba.float64[:, ::1], numba.float32[::1], out, u8)


def launch_bounds(shared: bool) -> tuple[int, int]:
    """Threads of a block, and how many blocks shall fit on a multiprocessor: as many as registers allow unspilled."""
    return THREADS, 4 if shared else 3


@lru_cache
def kernel(height: int, width: int, full: bool, shared: bool) -> Any:
    """What `launch` takes; compiled when it is first launched on this machine."""
    return jit_cached(build(height, width, full, shared), launch_bounds=launch_bounds(shared))


def make_views(
    images: Tensor,
    rows: Tensor,
    plan: Tensor,
    table: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    *,
    threads: int = THREADS,
    shared_bytes: int = SHARED_BYTES,
    workspace: int = WORKSPACE,
) -> Tensor:
    """The CUDA side of `pipelines.augment.op.augment`, which says what the tensors are and has checked them.

    images are on the device, the others, which are small, on the CPU. Queues one copy and one launch on torch's current
    stream and waits for nothing, but at its first call, when constants are sent.
    """
    (_, height, width, _), views, device = images.shape, len(rows), images.device
    length, full = 3 * height * width, dtype == torch.float32
    out = torch.empty((views, 3, height, width), dtype=dtype, device=device, memory_format=torch.channels_last)
    if not views:
        return out
    shared = 2 * length + STATIC_BYTES <= shared_bytes
    blocks = views if shared else min(views, max(1, workspace // (2 * length)))
    stored = kept_array(images, flat=True)
    launch(
        kernel(height, width, full, shared),
        blocks,
        threads,
        device,
        stored,
        _send(plan, rows, device),
        kept_array(kept_copy(table, device)),
        kept_array(_normal(tuple(mean.tolist()), tuple(std.tolist()), device)),
        out.permute(0, 2, 3, 1).reshape(-1),
        # Images in shared memory need none, and the kernel does not touch what it gets.
        stored if shared else torch.empty(blocks * 2 * length, dtype=torch.uint8, device=device),
    )
    return out


def _send(plan: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Plan and rows beside each other, copied to the device at once and without waiting.

    Pinned memory makes that possible, and torch keeps it until it was read.
    """
    both = torch.empty((len(rows), plan.shape[1] + 1), dtype=torch.int32, pin_memory=device.type == "cuda")
    both[:, :-1], both[:, -1] = plan, rows
    return both.to(device, non_blocking=True)


@lru_cache
def _normal(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """255 mean, then 1 / (255 std), (6,) float32 on the device."""
    means, stds = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    return torch.cat((255.0 * means, 1.0 / (255.0 * stds))).float().to(device)
