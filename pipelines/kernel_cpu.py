"""The fused augmentation kernel for the CPU: one pass over a range of views, in uint8 scratch that stays in the cache.

`run` takes a few seconds to compile, once: it is cached beside this file or in the user's cache folder. It holds no
lock while it works and starts no thread: pipelines.augment_cpu splits the views over threads. Scratch images are
(height, 3 width) uint8, channels interleaved, so that whatever treats the channels alike is one loop over contiguous
bytes, which the compiler turns into vector instructions.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np

from pipelines import pixel_ops as px
from pipelines.plan import BLACK, BORDER, CUT, FLIP, GRAY, LEFT, OPS, TOP

jit = numba.njit(nogil=True, error_model="numpy")

crop_source, luma, mean_luma, blend = jit(px.crop_source), jit(px.luma), jit(px.mean_luma), jit(px.blend)
smooth, solarized, stretch = jit(px.smooth), jit(px.solarize), jit(px.stretch)
equalize_step, equalized, normalize = jit(px.equalize_step), jit(px.equalized), jit(px.normalize)
bfloat16_bits = jit(px.bfloat16_bits)

# Numbers the compiled kernel depends on but numba's cache does not look at: a change here must compile anew.
SOURCES = (px.__file__, __file__)
STAMP = int.from_bytes(hashlib.sha256(b"".join(Path(f).read_bytes() for f in SOURCES)).digest()[:4], "big")

IDENTITY, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE = (
    px.IDENTITY,
    px.AUTOCONTRAST,
    px.EQUALIZE,
    px.POSTERIZE,
    px.SOLARIZE,
)
BRIGHTNESS, CONTRAST, COLOR, SHARPNESS, AFFINE = px.BRIGHTNESS, px.CONTRAST, px.COLOR, px.SHARPNESS, px.AFFINE


@jit
def crop(image, out, flip, top, left, black):
    """Flip, pad and cut `image` (H, 3W) into `out` (H, 3W)."""
    height, width = out.shape[0], out.shape[1] // 3
    first, last = max(0, -left), min(width, width - left)  # columns that need no padding
    for y in range(height):
        target = out[y]
        from_row = crop_source(y, top, height, 0, black)
        if from_row < 0:
            target[:] = 0
            continue
        row = image[from_row]
        if flip:
            for x in range(first, last):
                source = np.uintp(3 * (width - 1 - x - left))
                x3 = np.uintp(3 * x)
                target[x3] = row[source]
                target[x3 + np.uintp(1)] = row[source + np.uintp(1)]
                target[x3 + np.uintp(2)] = row[source + np.uintp(2)]
        else:
            target[3 * first : 3 * last] = row[3 * (first + left) : 3 * (last + left)]
        for x in range(width):
            if first <= x < last:
                continue
            source = crop_source(x, left, width, flip, black)
            for channel in range(3):
                target[3 * x + channel] = row[3 * source + channel] if source >= 0 else 0


@jit
def find_extremes(image, lows, highs):
    """Smallest and largest value of each of the 3 channels."""
    lows[:] = 255
    highs[:] = 0
    pixels = image.reshape(-1, 3)
    for i in range(pixels.shape[0]):
        for c in range(3):
            lows[c] = min(lows[c], pixels[i, c])
            highs[c] = max(highs[c], pixels[i, c])


@jit
def autocontrast_table(image, lut, lows, highs):
    find_extremes(image, lows, highs)
    for c in range(3):
        low, high = np.int64(lows[c]), np.int64(highs[c])
        if low >= high:
            lut[c, low] = low
            continue
        for value in range(low, high + 1):
            lut[c, value] = stretch(value, low, high)


@jit
def equalize_table(image, lut, histogram):
    histogram[:] = 0
    pixels = image.reshape(-1, 3)
    for i in range(pixels.shape[0]):
        for c in range(3):
            histogram[c, pixels[i, c]] += 1
    for c in range(3):
        last = 255
        while histogram[c, last] == 0:
            last -= 1
        step = equalize_step(pixels.shape[0], histogram[c, last])
        before = 0
        for value in range(last + 1):
            count = histogram[c, value]
            if count:
                lut[c, value] = equalized(before, step) if step else value
            before += count


@jit
def look_up(image, lut):
    pixels = image.reshape(-1, 3)
    for i in range(pixels.shape[0]):
        pixels[i, 0] = lut[0, pixels[i, 0]]
        pixels[i, 1] = lut[1, pixels[i, 1]]
        pixels[i, 2] = lut[2, pixels[i, 2]]


@jit
def posterize(image, mask):
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] & mask


@jit
def solarize(image, threshold):
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = solarized(flat[i], threshold)


@jit
def blend_with_gray(image, gray, factor):
    """Blend every byte with one gray value: brightness (0) and contrast (the mean)."""
    flat = image.reshape(-1)
    for i in range(flat.size):
        flat[i] = np.uint8(np.int32(blend(gray, np.float32(flat[i]), factor)))


@jit
def gray_mean(image):
    pixels = image.reshape(-1, 3)
    total = 0
    for i in range(pixels.shape[0]):
        total += luma(np.uint32(pixels[i, 0]), np.uint32(pixels[i, 1]), np.uint32(pixels[i, 2]))
    return mean_luma(total, pixels.shape[0])


@jit
def color(image, factor):
    pixels = image.reshape(-1, 3)
    for i in range(pixels.shape[0]):
        red, green, blue = pixels[i, 0], pixels[i, 1], pixels[i, 2]
        gray = np.float32(np.int32(luma(np.uint32(red), np.uint32(green), np.uint32(blue))))
        pixels[i, 0] = np.uint8(np.int32(blend(gray, np.float32(red), factor)))
        pixels[i, 1] = np.uint8(np.int32(blend(gray, np.float32(green), factor)))
        pixels[i, 2] = np.uint8(np.int32(blend(gray, np.float32(blue), factor)))


@jit
def sharpen(image, out, factor):
    """Blend the smoothed image with the original; the outermost pixels stay as they are."""
    height, length = image.shape
    out[0] = image[0]
    out[height - 1] = image[height - 1]
    for y in range(1, height - 1):
        above, row, below, target = image[y - 1], image[y], image[y + 1], out[y]
        target[:3] = row[:3]
        target[length - 3 :] = row[length - 3 :]
        for i in range(3, length - 3):
            total = np.uint32(
                np.uint32(above[i - 3])
                + above[i]
                + above[i + 3]
                + row[i - 3]
                + np.uint32(5) * row[i]
                + row[i + 3]
                + below[i - 3]
                + below[i]
                + below[i + 3]
            )
            soft = np.float32(np.int32(smooth(total)))
            target[i] = np.uint8(np.int32(blend(soft, np.float32(row[i]), factor)))


@jit
def shift_row(source, target, shift):
    """Move a row by `shift` whole pixels; what comes from outside is black."""
    width = target.size // 3
    first, last = min(max(0, -shift), width), max(min(width, width - shift), 0)
    target[: 3 * first] = 0
    target[3 * max(first, last) :] = 0
    if first < last:
        target[3 * first : 3 * last] = source[3 * (first + shift) : 3 * (last + shift)]


@jit
def affine(image, out, matrix):
    """Nearest-neighbor affine transform, black outside. matrix: int64 in 16.16 fixed point (xx, xy, x0, yx, yy, y0)."""
    height, width = image.shape[0], image.shape[1] // 3
    step_x, row_x, x0, step_y, row_y, y0 = matrix
    flat = image.reshape(-1)
    for y in range(height):
        target = out[y]
        if step_x == 65536 and step_y == 0:  # translation and horizontal shear: whole rows move
            source_y = y0 >> 16
            if 0 <= source_y < height:
                shift_row(image[source_y], target, x0 >> 16)
            else:
                target[:] = 0
        else:
            at_x, at_y = x0, y0
            for x in range(width):
                source_x, source_y = at_x >> 16, at_y >> 16
                x3 = np.uintp(3 * x)
                if 0 <= source_x < width and 0 <= source_y < height:
                    source = np.uintp(3 * (source_y * width + source_x))
                    target[x3] = flat[source]
                    target[x3 + np.uintp(1)] = flat[source + np.uintp(1)]
                    target[x3 + np.uintp(2)] = flat[source + np.uintp(2)]
                else:
                    target[x3] = 0
                    target[x3 + np.uintp(1)] = 0
                    target[x3 + np.uintp(2)] = 0
                at_x += step_x
                at_y += step_y
        x0 += row_x
        y0 += row_y


@jit
def cut_out(image, x0, y0, x1, y1, gray):
    for y in range(y0, y1):
        image[y, 3 * x0 : 3 * x1] = gray


@jit
def write_float32(image, out, center, scale):
    for y in range(image.shape[0]):
        source, target = image[y], out[y]
        for i in range(source.size):
            target[i] = normalize(np.float32(source[i]), center[i], scale[i])


@jit
def write_bfloat16(image, out, center, scale, row):
    bits = row.view(np.uint32)
    for y in range(image.shape[0]):
        source, target = image[y], out[y]
        for i in range(source.size):
            row[i] = normalize(np.float32(source[i]), center[i], scale[i])
        for i in range(source.size):
            target[i] = bfloat16_bits(bits[i])


def build(stamp):
    """Compile the kernel. `stamp` becomes part of the cache's key because the kernel refers to it."""

    def run(images, rows, plan, table, center, scale, out32, out16, start, stop):
        """Make the views `start` .. `stop - 1`.

        Args:
            images: (N, H, 3W) uint8.  rows: (V,) int64 into images.  plan: (V, OPS + n) int32, see pipelines.plan.
            table: (T, 7) float64: kind and p0..p5, see pipelines.randaugment.parameter_table.
            center, scale: (3W,) float32, the mean and 1 / std in units of pixel values, repeated over a row.
            out32, out16: (V, H, 3W) float32 and uint16 (bits of bfloat16): one is written, the other has no rows.

        Returns: `stamp`.
        """
        height, length = images.shape[1], images.shape[2]
        image = np.empty((height, length), np.uint8)
        other = np.empty((height, length), np.uint8)
        lut = np.empty((3, 256), np.uint8)
        histogram = np.empty((3, 256), np.int32)
        lows, highs = np.empty(3, np.uint8), np.empty(3, np.uint8)
        row = np.empty(length, np.float32)
        for v in range(start, stop):
            p = plan[v]
            crop(images[rows[v]], image, p[FLIP], p[TOP], p[LEFT], p[BORDER] == BLACK)
            for slot in range(OPS, p.size):
                entry = table[p[slot]]
                kind = np.int64(entry[0])
                if kind == IDENTITY:
                    continue
                whole, factor = np.int64(entry[1]), np.float32(entry[1])
                if kind == AUTOCONTRAST:
                    autocontrast_table(image, lut, lows, highs)
                    look_up(image, lut)
                elif kind == EQUALIZE:
                    equalize_table(image, lut, histogram)
                    look_up(image, lut)
                elif kind == POSTERIZE:
                    posterize(image, np.uint8(whole))
                elif kind == SOLARIZE:
                    solarize(image, whole)
                elif kind == BRIGHTNESS:
                    blend_with_gray(image, np.float32(0.0), factor)
                elif kind == CONTRAST:
                    blend_with_gray(image, np.float32(gray_mean(image)), factor)
                elif kind == COLOR:
                    color(image, factor)
                else:
                    if kind == SHARPNESS:
                        sharpen(image, other, factor)
                    else:
                        affine(
                            image,
                            other,
                            (
                                whole,
                                np.int64(entry[2]),
                                np.int64(entry[3]),
                                np.int64(entry[4]),
                                np.int64(entry[5]),
                                np.int64(entry[6]),
                            ),
                        )
                    image, other = other, image
            cut_out(image, p[CUT], p[CUT + 1], p[CUT + 2], p[CUT + 3], np.uint8(p[GRAY]))
            if out32.shape[0]:
                write_float32(image, out32[v], center, scale)
            else:
                write_bfloat16(image, out16[v], center, scale, row)
        return stamp

    return run


def _compiled():
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(build(STAMP))
    except RuntimeError:  # numba finds no folder it may write to
        return numba.njit(**options)(build(STAMP))


run = _compiled()
