"""The operations on whole images for CUDA: what the threads of a block do together, around pipelines.augment.pixel_ops.

An image here is 3 height width consecutive bytes of `pixels`, channels interleaved, from index `at` on. Every function
is called by all threads of a block. Those that read what other threads write end with a barrier; so does whoever calls
the others. Thread t takes bytes (or pixels) t, t + threads, ...: neighbors read and write neighboring memory.

Imported only where there is numba.cuda, through pipelines.augment.kernel_cuda.
"""

from __future__ import annotations

import operator

import numpy as np
from numba import cuda

from pipelines.augment import pixel_ops as px
from pipelines.cuda.launch import simulated

if simulated():

    def scalar(function):
        """The simulator calls plain Python."""
        return function

    device = cuda.jit(device=True)
    multiply32 = multiply64 = operator.mul

    def float_bits(value):
        return np.float32(value).view(np.uint32)

else:
    # Inlined, so that sizes that are constants of a kernel stay constants, and shared memory is known to be that.
    scalar = device = cuda.jit(device=True, forceinline=True)
    # Products with a rounding of their own: the compiler would fuse others with a sum that follows.
    multiply32, multiply64 = cuda.libdevice.fmul_rn, cuda.libdevice.dmul_rn
    float_bits = cuda.libdevice.float_as_int

blend, stretch = scalar(px.make_blend(multiply32)), scalar(px.make_stretch(multiply64))
resize_first, resize_share, resized = scalar(px.resize_first), scalar(px.resize_share), scalar(px.resized)
crop_source, luma, mean_luma = scalar(px.crop_source), scalar(px.luma), scalar(px.mean_luma)
smooth, solarized, brightened_below = scalar(px.smooth), scalar(px.solarize), scalar(px.solarize_add)
equalize_step, equalized = scalar(px.equalize_step), scalar(px.equalized)
normalize, bfloat16_bits = scalar(px.normalize), scalar(px.bfloat16_bits)

# Scratch in shared memory, int32: a count for each value of each channel, the sum of each 16 counts, each channel's
# lowest and highest value, and the sum of all luma.
BINS, GROUP = 768, 16
COUNTS, GROUPS, LOWS, HIGHS, TOTAL = 0, BINS, BINS + 48, BINS + 51, BINS + 54
SCRATCH = BINS + 55


@device
def crop(source, start, pixels, at, height, width, flip, top, left, black):
    """Flip, pad and cut the image at source[start] into pixels[at]."""
    for i in range(cuda.threadIdx.x, height * width, cuda.blockDim.x):
        y = crop_source(i // width, top, height, 0, black)
        x = crop_source(i % width, left, width, flip, black)
        inside = y >= 0 and x >= 0
        for channel in range(3):
            value = source[start + 3 * (y * width + x) + channel] if inside else np.uint8(0)
            pixels[at + 3 * i + channel] = value


@device
def resize_columns(source, start, pixels, at, height, width, flip, top, left, rows, columns):
    """Resize the columns of the box in the (flipped) image at source[start] to `width`, of those rows that
    `resize_rows` reads, into pixels[at]."""
    first = max(resize_first(0, top, rows, height), 0)
    last = min(resize_first(height - 1, top, rows, height) + 1, height - 1)
    for i in range(cuda.threadIdx.x, (last - first + 1) * width, cuda.blockDim.x):
        x, begin = i % width, left
        if flip:
            x, begin = width - 1 - x, width - left - columns
        near, share = resize_first(x, begin, columns, width), resize_share(x, columns, width)
        row = start + 3 * width * (first + i // width)
        near, far = row + 3 * max(near, 0), row + 3 * min(near + 1, width - 1)
        for channel in range(3):
            low, high = np.int32(source[near + channel]), np.int32(source[far + channel])
            pixels[at + 3 * i + channel] = np.uint8(resized(low, high, share))


@device
def resize_rows(pixels, at, to, height, width, top, rows):
    """Resize what `resize_columns` left at pixels[at] to `height` rows, into pixels[to]."""
    first, row = max(resize_first(0, top, rows, height), 0), 3 * width
    for i in range(cuda.threadIdx.x, height * row, cuda.blockDim.x):
        near, share = resize_first(i // row, top, rows, height), resize_share(i // row, rows, height)
        near, far = max(near, 0) - first, min(near + 1, height - 1) - first
        low, high = np.int32(pixels[at + near * row + i % row]), np.int32(pixels[at + far * row + i % row])
        pixels[to + i] = np.uint8(resized(low, high, share))


@device
def look_up(pixels, at, length, lut):
    """Replace every value by its entry in the table of its channel, lut (768) uint8."""
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        pixels[at + i] = lut[256 * (i % 3) + np.int32(pixels[at + i])]


@device
def autocontrast_table(pixels, at, length, lut, scratch):
    if cuda.threadIdx.x == 0:
        for channel in range(3):
            scratch[LOWS + channel], scratch[HIGHS + channel] = 255, 0
    cuda.syncthreads()
    for channel in range(3):
        low, high = np.int32(255), np.int32(0)
        for i in range(3 * cuda.threadIdx.x + channel, length, 3 * cuda.blockDim.x):
            value = np.int32(pixels[at + i])
            low, high = min(low, value), max(high, value)
        cuda.atomic.min(scratch, LOWS + channel, low)
        cuda.atomic.max(scratch, HIGHS + channel, high)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, BINS, cuda.blockDim.x):
        low, high, value = scratch[LOWS + i // 256], scratch[HIGHS + i // 256], np.int32(i % 256)
        lut[i] = np.uint8(stretch(value, low, high)) if low < high else np.uint8(value)
    cuda.syncthreads()


@device
def equalize_table(pixels, at, length, lut, scratch):
    for i in range(cuda.threadIdx.x, SCRATCH, cuda.blockDim.x):
        scratch[i] = 0
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        cuda.atomic.add(scratch, COUNTS + 256 * (i % 3) + np.int32(pixels[at + i]), 1)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, BINS // GROUP, cuda.blockDim.x):
        total, last = np.int32(0), np.int32(-1)
        for j in range(GROUP):
            count = scratch[COUNTS + GROUP * i + j]
            total += count
            last = np.int32((GROUP * i + j) % 256) if count else last
        scratch[GROUPS + i] = total
        if last >= 0:
            cuda.atomic.max(scratch, HIGHS + GROUP * i // 256, last)
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, BINS, cuda.blockDim.x):
        channel, value = i // 256, i % 256
        step = equalize_step(length // 3, scratch[COUNTS + 256 * channel + scratch[HIGHS + channel]])
        before = np.int32(0)
        for group in range(16 * channel, i // GROUP):
            before += scratch[GROUPS + group]
        for j in range(i // GROUP * GROUP, i):
            before += scratch[COUNTS + j]
        lut[i] = np.uint8(equalized(before, step)) if step else np.uint8(value)
    cuda.syncthreads()


@device
def posterize(pixels, at, length, mask):
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        pixels[at + i] = np.uint8(np.int32(pixels[at + i]) & mask)


@device
def solarize(pixels, at, length, threshold):
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        pixels[at + i] = np.uint8(solarized(np.int32(pixels[at + i]), threshold))


@device
def solarize_add(pixels, at, length, addition):
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        pixels[at + i] = np.uint8(brightened_below(np.int32(pixels[at + i]), addition))


@device
def blend_with_gray(pixels, at, length, gray, factor):
    for i in range(cuda.threadIdx.x, length, cuda.blockDim.x):
        pixels[at + i] = np.uint8(np.int32(blend(gray, np.float32(pixels[at + i]), factor)))


@device
def luma_at(pixels, i):
    return luma(np.int32(pixels[i]), np.int32(pixels[i + 1]), np.int32(pixels[i + 2]))


@device
def gray_mean(pixels, at, length, scratch):
    if cuda.threadIdx.x == 0:
        scratch[TOTAL] = 0
    cuda.syncthreads()
    total = np.int32(0)
    for i in range(3 * cuda.threadIdx.x, length, 3 * cuda.blockDim.x):
        total += np.int32(luma_at(pixels, at + i))
    cuda.atomic.add(scratch, TOTAL, total)
    cuda.syncthreads()
    return mean_luma(scratch[TOTAL], length // 3)


@device
def color(pixels, at, length, factor):
    for i in range(3 * cuda.threadIdx.x, length, 3 * cuda.blockDim.x):
        gray = np.float32(luma_at(pixels, at + i))
        for channel in range(3):
            j = at + i + channel
            pixels[j] = np.uint8(np.int32(blend(gray, np.float32(pixels[j]), factor)))


@device
def sharpen(pixels, at, to, height, width, factor):
    """Blend the smoothed image with the original; the outermost pixels stay."""
    row = 3 * width
    for i in range(cuda.threadIdx.x, height * row, cuda.blockDim.x):
        y, x, value = i // row, i % row, np.int32(pixels[at + i])
        if 0 < y < height - 1 and 3 <= x < row - 3:
            total = 4 * value
            for j in range(at + i - row, at + i + row + 1, row):
                total += np.int32(pixels[j - 3]) + np.int32(pixels[j]) + np.int32(pixels[j + 3])
            value = np.int32(blend(smooth(np.float32(total)), np.float32(value), factor))
        pixels[to + i] = np.uint8(value)


@device
def affine(pixels, at, to, height, width, entry):
    """Nearest-neighbor affine transform, black outside. entry: kind, then the matrix in 16.16 fixed point."""
    step_x, row_x, x0 = np.int64(entry[1]), np.int64(entry[2]), np.int64(entry[3])
    step_y, row_y, y0 = np.int64(entry[4]), np.int64(entry[5]), np.int64(entry[6])
    for i in range(cuda.threadIdx.x, height * width, cuda.blockDim.x):
        y, x = i // width, i % width
        source_x, source_y = (x0 + x * step_x + y * row_x) >> 16, (y0 + x * step_y + y * row_y) >> 16
        inside = 0 <= source_x < width and 0 <= source_y < height
        for channel in range(3):
            value = pixels[at + 3 * (source_y * width + source_x) + channel] if inside else np.uint8(0)
            pixels[to + 3 * i + channel] = value
