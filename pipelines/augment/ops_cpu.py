"""The operations on whole images for the CPU: loops around the arithmetic of pipelines.augment.pixel_ops.

An image here is a row of 3 height width bytes, channels interleaved, so that whatever treats the channels alike is one
loop over contiguous bytes, which the compiler turns into vector instructions; scratch has `SLACK` bytes more. Where the
channels differ, loops run over blocks of `BLOCK` bytes, whose constant length is whole pixels and whole vectors. Rows
are moved in vectors of fixed length, since loops of a row's length would do the rest of each byte by byte. Indices are
cast to unsigned where numba would otherwise test each for being negative.
"""

from __future__ import annotations

import operator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from pipelines.augment import pixel_ops as px

# Neither fuses nor reorders float arithmetic: the results are Pillow's to the bit.
OPTIONS = {"nogil": True, "error_model": "numpy"}
# Inlined: a call would count the references to each array, in a way that other threads may do the same.
jit = numba.njit(**OPTIONS, forceinline=True)


def cached(function: Any) -> Any:
    """Compile a function that is called from Python, and keep that beside its file or in the user's cache folder."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # numba finds no folder it may write to
        return numba.njit(**OPTIONS)(function)


blend, stretch = jit(px.make_blend(operator.mul)), jit(px.make_stretch(operator.mul))
crop_source, luma, mean_luma = jit(px.crop_source), jit(px.luma), jit(px.mean_luma)
smooth, solarized = jit(px.smooth_whole), jit(px.solarize)
brightened_below, blended, blended_by = jit(px.solarize_add), jit(px.blend_hundredths), jit(px.blend_256ths)
resize_first, resize_share, resized = jit(px.resize_first), jit(px.resize_share), jit(px.resized)
equalize_step, equalized = jit(px.equalize_step), jit(px.equalized_by)
uint = np.uintp

BLOCK = 192
SLACK = 64
CHUNK, PIXELS, RUN = 32, 16, 32  # bytes of a row copied, pixels mirrored, pixels transformed, at a time


def mover(count: int, order: list[int] | None = None) -> Any:
    """`move(source, start, target, at)`: copy `count` bytes of one array of uint8 to another, in this order.

    A vector of LLVM's, which it makes of what the processor has; unaligned, and without a check of the bounds.
    """
    vector = ir.VectorType(ir.IntType(8), count)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), count), order or list(range(count)))

    @intrinsic
    def move(_, source, start, target, at):
        def generate(context, builder, signature, args):
            def pointer(array, index):
                data = context.make_array(signature.args[array])(context, builder, args[array]).data
                return builder.bitcast(builder.gep(data, [args[index]]), vector.as_pointer())

            value = builder.load(pointer(0, 1), align=1)
            if order:
                value = builder.shuffle_vector(value, value, mask)
            builder.store(value, pointer(2, 3), align=1)
            return context.get_dummy_value()

        return types.void(source, types.intp, target, types.intp), generate

    return move


move_pixel_and_byte, move_chunk = mover(4), mover(CHUNK)
move_mirrored = mover(3 * PIXELS, [3 * (PIXELS - 1 - i // 3) + i % 3 for i in range(3 * PIXELS)])


@intrinsic
def float_bits(_, value):
    """The bits of a float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@jit
def copy_bytes(source, start, target, at, count):
    if count < CHUNK:
        for i in range(count):
            target[uint(at + i)] = source[uint(start + i)]
    else:
        for i in range(0, count - CHUNK, CHUNK):
            move_chunk(source, start + i, target, at + i)
        move_chunk(source, start + count - CHUNK, target, at + count - CHUNK)


@jit
def fill_bytes(target, at, end, value):
    for i in range(at, end):
        target[uint(i)] = value


@jit
def copy_pixel(source, start, target, at):
    target[uint(at)] = source[uint(start)]
    target[uint(at + 1)] = source[uint(start + 1)]
    target[uint(at + 2)] = source[uint(start + 2)]


@jit
def mirror_pixels(source, start, target, at, count):
    """Copy the `count` pixels from `start` on to `at` in reverse order; both in bytes."""
    if count < PIXELS:
        for i in range(count):
            copy_pixel(source, start + 3 * (count - 1 - i), target, at + 3 * i)
    else:
        for i in range(0, count - PIXELS, PIXELS):
            move_mirrored(source, start + 3 * (count - PIXELS - i), target, at + 3 * i)
        move_mirrored(source, start, target, at + 3 * (count - PIXELS))


@jit
def crop(source, start, out, height, width, flip, top, left, black):
    """Flip, pad and cut the image at source[start] into `out`."""
    row = 3 * width
    first, last = max(0, -left), min(width, width - left)  # columns that come from within the image
    if black:
        fill_bytes(out, 0, height * row, 0)
    for y in range(height):
        from_y = crop_source(y, top, height, 0, black)
        if from_y >= 0 and flip:
            begin = start + from_y * row + 3 * (width - last - left)
            mirror_pixels(source, begin, out, y * row + 3 * first, last - first)
        elif from_y >= 0:
            begin = start + from_y * row + 3 * (first + left)
            copy_bytes(source, begin, out, y * row + 3 * first, 3 * (last - first))
    for i in range(0 if black else width - last + first):  # columns of the padding, left and right
        x = i if i < first else last + i - first
        from_x = crop_source(x, left, width, flip, False)
        for y in range(height):
            from_y = crop_source(y, top, height, 0, False)
            copy_pixel(source, start + from_y * row + 3 * from_x, out, y * row + 3 * x)


@jit
def resize_columns(source, start, out, width, flip, left, columns, first, last, near, shares, line, low, high):
    """Resize `columns` columns from `left` on of rows first..last of the (flipped) image at source[start] to `width`.

    The rest is scratch: near (width) and shares (3 width) int32; line, low, high (3 width + SLACK) uint8.
    """
    row = 3 * width
    for x in range(width):
        index, begin = (width - 1 - x, width - left - columns) if flip else (x, left)
        near[uint(x)] = 3 * (1 + resize_first(index, begin, columns, width))
        share = np.int32(resize_share(index, columns, width))
        for channel in range(3):
            shares[uint(3 * x + channel)] = share
    for y in range(first, last + 1):
        # With a pixel more on either side: an image ends in two equal pixels.
        copy_pixel(source, start + y * row, line, 0)
        copy_bytes(source, start + y * row, line, 3, row)
        copy_pixel(source, start + y * row + row - 3, line, row + 3)
        for x in range(width):  # each byte too many is overwritten by the next pixel
            at = np.intp(near[uint(x)])
            move_pixel_and_byte(line, at, low, 3 * x)
            move_pixel_and_byte(line, at + 3, high, 3 * x)
        begin = (y - first) * row
        for i in range(row):
            value = resized(np.int32(low[uint(i)]), np.int32(high[uint(i)]), shares[uint(i)])
            out[uint(begin + i)] = np.uint8(value)


@jit
def resize_rows(image, out, height, width, top, rows, first):
    """Resize `rows` rows from `top` on to `height`; the first of `image` is row `first` of what they are rows of."""
    row = 3 * width
    for y in range(height):
        at, share = resize_first(y, top, rows, height), np.int32(resize_share(y, rows, height))
        near, far = (max(at, 0) - first) * row, (min(at + 1, height - 1) - first) * row
        for i in range(row):
            value = resized(np.int32(image[uint(near + i)]), np.int32(image[uint(far + i)]), share)
            out[uint(y * row + i)] = np.uint8(value)


@jit
def crop_and_resize(source, start, out, other, height, width, box, scratch):
    """Flip, cut and resize the image at source[start] into `out`, through `other`.

    box: flip, top, left, rows and columns. scratch: see `resize_columns`.
    """
    flip, top, left, rows, columns = box
    first = max(resize_first(0, top, rows, height), 0)
    last = min(resize_first(height - 1, top, rows, height) + 1, height - 1)
    resize_columns(source, start, other, width, flip, left, columns, first, last, *scratch)
    resize_rows(other, out, height, width, top, rows, first)


@jit
def look_up(image, size, lut):
    """Replace every value by its entry in the table of its channel, lut (768) uint8; the slack's as well."""
    words = image.view(np.uint64)
    for begin in range((size + 23) // 24):
        for k in range(3):
            word = words[uint(3 * begin + k)]
            for j in range(8):
                value = (word >> np.uint64(8 * j)) & np.uint64(255)
                image[uint(24 * begin + 8 * k + j)] = lut[uint(256 * ((8 * k + j) % 3)) + value]


@jit
def extremes(image, size, lows, highs):
    """Each channel's lowest and highest value, into the first three of lows and highs, (BLOCK) uint8."""
    for j in range(BLOCK):
        lows[uint(j)], highs[uint(j)] = 255, 0
    for block in range(0, size - BLOCK + 1, BLOCK):
        for j in range(BLOCK):
            value = image[uint(block + j)]
            lows[uint(j)], highs[uint(j)] = min(lows[uint(j)], value), max(highs[uint(j)], value)
    for j in range(size % BLOCK):
        value = image[uint(size - size % BLOCK + j)]
        lows[uint(j)], highs[uint(j)] = min(lows[uint(j)], value), max(highs[uint(j)], value)
    half = BLOCK // 2
    while half >= 3:
        for j in range(half):
            lows[uint(j)] = min(lows[uint(j)], lows[uint(j + half)])
            highs[uint(j)] = max(highs[uint(j)], highs[uint(j + half)])
        half //= 2


@jit
def autocontrast_table(image, size, lut, lows, highs):
    """Fill the entries of `lut` that the image uses. lows, highs: scratch, (BLOCK) uint8."""
    extremes(image, size, lows, highs)
    for channel in range(3):
        low, high = np.int32(lows[channel]), np.int32(highs[channel])
        for value in range(low, high + 1):
            lut[uint(256 * channel + value)] = stretch(np.int32(value), low, high) if low < high else value


@jit
def equalize_table(image, size, lut, counts):
    """Fill `lut`. counts: scratch, (768) int32."""
    for i in range(768):
        counts[uint(i)] = 0
    for i in range(0, size, 3):
        counts[image[uint(i)]] += 1
        counts[uint(256) + image[uint(i + 1)]] += 1
        counts[uint(512) + image[uint(i + 2)]] += 1
    for channel in range(3):
        begin, last = 256 * channel, 256 * channel + 255
        while counts[uint(last)] == 0:
            last -= 1
        step = equalize_step(size // 3, counts[uint(last)])
        before, inverse = np.int32(0), 1.0 / max(step, 1)
        for value in range(256):
            lut[uint(begin + value)] = equalized(before, step, inverse) if step else value
            before += counts[uint(begin + value)]


@jit
def posterize(image, size, mask):
    for i in range(size):
        image[uint(i)] = image[uint(i)] & mask


@jit
def solarize(image, size, threshold):
    for i in range(size):
        image[uint(i)] = solarized(image[uint(i)], threshold)


@jit
def solarize_add(image, size, addition):
    for i in range(size):
        image[uint(i)] = brightened_below(np.uint16(image[uint(i)]), addition)


@jit
def luma_at(image, i):
    return np.uint8(luma(np.int32(image[uint(i)]), np.int32(image[uint(i + 1)]), np.int32(image[uint(i + 2)])))


@jit
def gray_mean(image, size):
    total = 0
    for begin in range(0, size, 3 * 65536):  # of so many pixels 32 bits hold the sum
        part = np.uint32(0)
        for i in range(begin, min(size, begin + 3 * 65536), 3):
            part = np.uint32(part + luma_at(image, i))
        total += part
    return mean_luma(total, size // 3)


@jit
def grayscale(image, size, out):
    """The luma of each pixel, in all channels."""
    for i in range(0, size, 3):
        value = luma_at(image, i)
        out[uint(i)] = value
        out[uint(i + 1)] = value
        out[uint(i + 2)] = value


@jit
def smoothed(image, out, height, width, sums):
    """ImageFilter.SMOOTH; the outermost pixels stay. sums: scratch, (3 height width) uint16."""
    row, size = 3 * width, 3 * height * width
    if height < 3 or width < 3:
        copy_bytes(image, 0, out, 0, size)
        return
    for i in range(row, size - row):
        beside = np.uint16(image[uint(i - row)]) + np.uint16(image[uint(i + row)])
        sums[uint(i)] = beside + image[uint(i)]
    for i in range(row + 3, size - row - 3):  # of the outermost columns too, which are nonsense
        rows = np.uint16(np.uint16(sums[uint(i - 3)] + sums[uint(i)]) + sums[uint(i + 3)])
        total = np.uint16(rows + 4 * np.uint16(image[uint(i)]))
        out[uint(i)] = smooth(total)
    copy_bytes(image, 0, out, 0, row)
    copy_bytes(image, size - row, out, size - row, row)
    for i in range(row, size, row):  # the last column and the first of the next row
        move_pixel_and_byte(image, i - 3, out, i - 3)
        move_pixel_and_byte(image, i - 1, out, i - 1)


@jit
def degenerate(kind, image, out, height, width, sums):
    """What Pillow blends an image with, into `out`, by the kind of operation."""
    size = 3 * height * width
    if kind == px.COLOR:
        grayscale(image, size, out)
    elif kind == px.SHARPNESS:
        smoothed(image, out, height, width, sums)
    else:
        fill_bytes(out, 0, size, np.uint8(gray_mean(image, size) if kind == px.CONTRAST else 0))


@jit
def blend_with(low, image, size, factor, hundredths, parts):
    """Image.blend of `low` and `image` into `image`; parts: the factor in 256ths."""
    if hundredths:
        rest, share = np.uint16(100 - hundredths), np.uint16(hundredths)
        for i in range(size):
            image[uint(i)] = blended(np.uint16(low[uint(i)]), np.uint16(image[uint(i)]), rest, share)
    elif parts:
        for i in range(size):
            value = blended_by(np.int16(low[uint(i)]), np.int16(image[uint(i)]), np.int16(parts))
            image[uint(i)] = np.uint8(min(max(value, np.int16(0)), np.int16(255)))
    else:
        for i in range(size):
            value = blend(np.float32(low[uint(i)]), np.float32(image[uint(i)]), factor)
            image[uint(i)] = np.uint8(np.int32(value))


@jit
def affine(image, out, height, width, entry, sources):
    """Nearest-neighbor affine transform, black outside. entry: kind, then the matrix in 16.16 fixed point.

    sources: scratch, (height width + RUN) int32.
    """
    row, size = 3 * width, 3 * height * width
    step_x, row_x, x0 = np.int32(entry[1]), np.int64(entry[2]), np.int64(entry[3])
    step_y, row_y, y0 = np.int32(entry[4]), np.int64(entry[5]), np.int64(entry[6])
    if step_x == 65536 and step_y == 0:  # translation and horizontal shear move whole rows
        fill_bytes(out, 0, size, 0)
        for y in range(height):
            from_x, from_y = (x0 + y * row_x) >> 16, (y0 + y * row_y) >> 16
            first, last = max(0, -from_x), min(width, width - from_x)
            if 0 <= from_y < height and first < last:
                start = from_y * row + 3 * (first + from_x)
                copy_bytes(image, start, out, y * row + 3 * first, 3 * (last - first))
        return
    black = np.int32(size + 4)  # within the slack, behind what the last pixel of another transform spilled
    fill_bytes(image, black, black + 4, 0)
    wide, high = np.int32(width), np.int32(height)
    for y in range(height):
        at_x, at_y = x0 + y * row_x, y0 + y * row_y
        # Whole part and fraction apart: what is added up along a row fits 32 bits.
        from_x, from_y = np.int32(at_x >> 16), np.int32(at_y >> 16)
        part_x, part_y = np.int32(at_x & 65535), np.int32(at_y & 65535)
        for begin in range(y * width, y * width + width, RUN):
            for j in range(RUN):
                source_x = np.int32(from_x + np.int32(part_x >> 16))
                source_y = np.int32(from_y + np.int32(part_y >> 16))
                inside = (np.uint32(source_x) < np.uint32(wide)) & (np.uint32(source_y) < np.uint32(high))
                source = np.int32(np.int32(source_y * wide) + source_x)
                sources[uint(begin + j)] = np.int32(3 * source) if inside else black
                part_x, part_y = np.int32(part_x + step_x), np.int32(part_y + step_y)
    for i in range(height * width):  # each byte too many is overwritten by the next pixel
        move_pixel_and_byte(image, sources[uint(i)], out, 3 * i)


@jit
def cut_out(image, width, x0, y0, x1, y1, gray):
    for y in range(y0, y1):
        fill_bytes(image, 3 * (y * width + x0), 3 * (y * width + x1), gray)
