"""The operations on whole images for the CPU: loops around the arithmetic of pipelines.augment.pixel_ops.

An image here is (height, 3 width) uint8, channels interleaved, so that whatever treats the channels alike is one loop
over contiguous bytes, which the compiler turns into vector instructions. `flat` is the same memory as one row of bytes,
`pixels` as (height * width, 3). Loops are written out where a slice assignment would do: those are slower to run and
take seconds to compile. Indices are cast to unsigned where numba would otherwise test each for being negative.
"""

from __future__ import annotations

import operator

import numba
import numpy as np

from pipelines.augment import pixel_ops as px

# Neither fuses nor reorders float arithmetic: the results are Pillow's to the bit.
jit = numba.njit(nogil=True, error_model="numpy")

blend, stretch = jit(px.make_blend(operator.mul)), jit(px.make_stretch(operator.mul))
crop_source, luma, mean_luma = jit(px.crop_source), jit(px.luma), jit(px.mean_luma)
smooth, solarized = jit(px.smooth), jit(px.solarize)
brightened_below = jit(px.solarize_add)
equalize_step, equalized = jit(px.equalize_step), jit(px.equalized)
uint = np.uintp


@jit
def copy_bytes(source, start, target, at, count):
    for i in range(count):
        target[uint(at + i)] = source[uint(start + i)]


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
    """Copy `count` pixels from `start` on leftwards to `at` on rightwards, both in bytes."""
    start, at = np.int32(start), np.int32(at)
    for _ in range(count):
        copy_pixel(source, start, target, at)
        start -= 3
        at += 3


@jit
def crop(image, out, flip, top, left, black):
    """Flip, pad and cut `image` into `out`."""
    height, width = out.shape[0], out.shape[1] // 3
    first, last = max(0, -left), min(width, width - left)  # columns that come from within the image
    for y in range(height):
        target, from_row = out[y], crop_source(y, top, height, 0, black)
        if from_row < 0:
            fill_bytes(target, 0, target.size, 0)
        elif flip:
            mirror_pixels(image[from_row], 3 * (width - 1 - first - left), target, 3 * first, last - first)
        else:
            copy_bytes(image[from_row], 3 * (first + left), target, 3 * first, 3 * (last - first))
    for i in range(width - last + first):  # columns of the padding, left and right
        x = i if i < first else last + i - first
        source = crop_source(x, left, width, flip, black)
        for y in range(height):
            from_row = crop_source(y, top, height, 0, black)
            if source < 0 or from_row < 0:
                fill_bytes(out[y], 3 * x, 3 * x + 3, 0)
            else:
                copy_pixel(image[from_row], 3 * source, out[y], 3 * x)


@jit
def look_up(pixels, lut):
    """Replace every value by its entry in the table of its channel, lut (3, 256) uint8."""
    for i in range(pixels.shape[0]):
        pixels[i, 0] = lut[0, pixels[i, 0]]
        pixels[i, 1] = lut[1, pixels[i, 1]]
        pixels[i, 2] = lut[2, pixels[i, 2]]


@jit
def autocontrast_table(image, lut, lows, highs):
    """Fill the entries of `lut` that the image uses. lows, highs: scratch, (3 width,) uint8."""
    for i in range(lows.size):
        lows[i], highs[i] = 255, 0
    for y in range(image.shape[0]):
        row = image[y]
        for i in range(row.size):
            lows[i] = min(lows[i], row[i])
            highs[i] = max(highs[i], row[i])
    for channel in range(3):
        low, high = np.int32(255), np.int32(0)
        for i in range(channel, lows.size, 3):
            low, high = min(low, np.int32(lows[i])), max(high, np.int32(highs[i]))
        entries = lut[channel]
        for value in range(low, high + 1):
            entries[value] = stretch(np.int32(value), low, high) if low < high else value


@jit
def equalize_table(pixels, lut, histogram):
    """Fill `lut`. histogram: scratch, (3, 256) int32."""
    for channel in range(3):
        for value in range(256):
            histogram[channel, value] = 0
    for i in range(pixels.shape[0]):
        histogram[0, pixels[i, 0]] += 1
        histogram[1, pixels[i, 1]] += 1
        histogram[2, pixels[i, 2]] += 1
    for channel in range(3):
        counts, entries = histogram[channel], lut[channel]
        last = 255
        while counts[last] == 0:
            last -= 1
        step = equalize_step(pixels.shape[0], counts[last])
        before = np.int32(0)
        for value in range(256):
            count = counts[value]
            counts[value] = before
            before += count
        for value in range(256):
            entries[value] = equalized(counts[value], step) if step else value


@jit
def posterize(flat, mask):
    for i in range(flat.size):
        flat[i] = flat[i] & mask


@jit
def solarize(flat, threshold):
    for i in range(flat.size):
        flat[i] = solarized(flat[i], threshold)


@jit
def solarize_add(flat, addition):
    for i in range(flat.size):
        flat[i] = brightened_below(flat[i], addition)


@jit
def blend_with_gray(flat, gray, factor):
    """Blend every byte with one gray value: brightness (0) and contrast (the mean)."""
    for i in range(flat.size):
        flat[i] = np.uint8(np.int32(blend(gray, np.float32(flat[i]), factor)))


@jit
def gray_mean(pixels):
    total = 0
    for i in range(pixels.shape[0]):
        total += luma(np.int32(pixels[i, 0]), np.int32(pixels[i, 1]), np.int32(pixels[i, 2]))
    return mean_luma(total, pixels.shape[0])


@jit
def color(image, factor, gray):
    """Blend with the image's own luma. gray: scratch, (3 width,) uint8, the luma of each pixel of a row, thrice."""
    for y in range(image.shape[0]):
        row = image[y]
        for x in range(row.size // 3):
            i = 3 * x
            value = luma(np.int32(row[uint(i)]), np.int32(row[uint(i + 1)]), np.int32(row[uint(i + 2)]))
            gray[uint(i)] = value
            gray[uint(i + 1)] = value
            gray[uint(i + 2)] = value
        for i in range(row.size):
            row[i] = np.uint8(np.int32(blend(np.float32(gray[i]), np.float32(row[i]), factor)))


@jit
def sharpen(image, out, factor, totals):
    """Blend the smoothed image with the original; the outermost pixels stay. totals: scratch, (3 width,) uint16."""
    height, length = image.shape
    for y in range(height):
        row, target = image[y], out[y]
        copy_bytes(row, 0, target, 0, length)
        if 0 < y < height - 1:
            above, below = image[y - 1], image[y + 1]
            for j in range(length - 6):
                i, left, right = uint(j + 3), uint(j), uint(j + 6)
                beside = row[left] + row[right] + above[i] + below[i]
                corners = above[left] + above[right] + below[left] + below[right]
                totals[j] = beside + corners + 5 * np.uint16(row[i])
            for j in range(length - 6):
                soft = smooth(np.float32(totals[j]))
                value = np.float32(row[uint(j + 3)])
                target[uint(j + 3)] = np.uint8(np.int32(blend(soft, value, factor)))


@jit
def affine(image, out, matrix):
    """Nearest-neighbor affine transform, black outside. matrix: int64 in 16.16 fixed point (xx, xy, x0, yx, yy, y0)."""
    height, width = image.shape[0], image.shape[1] // 3
    step_x, row_x, x0, step_y, row_y, y0 = matrix
    flat = image.reshape(-1)
    for y in range(height):
        target = out[y]
        if step_x == 65536 and step_y == 0:  # translation and horizontal shear move whole rows
            shift = x0 >> 16
            first, last = max(0, -shift), min(width, width - shift)
            if not 0 <= y0 >> 16 < height or first >= last:
                first = last = width
            fill_bytes(target, 0, 3 * first, 0)
            copy_bytes(flat, 3 * ((y0 >> 16) * width + first + shift), target, 3 * first, 3 * (last - first))
            fill_bytes(target, 3 * last, 3 * width, 0)
        else:
            at_x, at_y = x0, y0
            for x in range(width):
                source_x, source_y = at_x >> 16, at_y >> 16
                if 0 <= source_x < width and 0 <= source_y < height:
                    copy_pixel(flat, 3 * (source_y * width + source_x), target, 3 * x)
                else:
                    fill_bytes(target, 3 * x, 3 * x + 3, 0)
                at_x += step_x
                at_y += step_y
        x0 += row_x
        y0 += row_y


@jit
def cut_out(image, x0, y0, x1, y1, gray):
    for y in range(y0, y1):
        fill_bytes(image[y], 3 * x0, 3 * x1, gray)
