"""The arithmetic of every operation on one pixel, as scalar functions in plain Python.

The kernels compile these functions (numba.njit for the CPU, numba.cuda.jit for GPUs), from one source for every device,
so that they agree to the bit. None calls another, which keeps them compilable one by one. Each states the formula of
Pillow that it equals. Two rules keep them exact:

- No float expression has the form `a * b + c` where fusing it into one rounding could change the result. The two
  functions that are made of one, `blend` and `stretch`, are made for a multiplication that cannot be fused: that is
  `operator.mul` for compilers that keep their hands off, and an intrinsic for those that do not.
- Values are held in float32 or float64 exactly where Pillow holds them in C float or double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Kinds of operation, as the kernels see them: column 0 of the parameter table made by pipelines.augment.randaugment.
IDENTITY = 0
AUTOCONTRAST = 1
EQUALIZE = 2
POSTERIZE = 3  # p0: bit mask
SOLARIZE = 4  # p0: threshold
# p0: blend factor, here and in the next three; p1, p2: the same in hundredths and in 256ths where that is exact, or 0
BRIGHTNESS = 5
CONTRAST = 6
COLOR = 7
SHARPNESS = 8
AFFINE = 9  # p0..p5: 16.16 fixed-point matrix, see pipelines.augment.randaugment.fixed_point
SOLARIZE_ADD = 10  # p0: what is added


def crop_source(index, offset, size, flip, black):
    """Row or column of the stored image that lands on `index` of the crop, or -1 where the border is black.

    The image is flipped first (columns only: pass flip = 0 for rows), padded, then cut at `offset` within [-pad, pad],
    pad < size. Padding mirrors without repeating the edge, as numpy's `reflect` does, unless it is black.
    """
    source = index + offset
    if source < 0 or source >= size:
        if black:
            return -1
        source = -source if source < 0 else 2 * size - 2 - source
    return size - 1 - source if flip else source


def resize_first(index, start, extent, size):
    """The first of the two neighbors between which Image.resize by BILINEAR finds `index` of the result, where it makes
    `size` pixels of the `extent` from `start` on, extent <= size. Either may lie one pixel outside of the image: the
    outermost pixel stands for it.

    Pillow's double start + (index + 1/2) * extent / size is the center, less 1/2 and rounded down; here in integers.
    """
    return start + ((2 * index + 1) * extent + size) // (2 * size) - 1


def resize_share(index, extent, size):
    """The weight of the second neighbor in units of 2^-22, to which Pillow rounds its double; the first has the rest.

    Integers round alike: a weight is a multiple of 1 / (2 size), so that none is a tie, or nearer to one than a double
    errs, below 10,000 pixels.
    """
    rest = ((2 * index + 1) * extent + size) % (2 * size)
    return ((rest << 22) + size) // (2 * size)


def resized(low, high, share):
    """Image.resize between two neighbors, rounded to 0..255: one pass of two, each with weights of its own. int32."""
    return np.int32(np.int32(low << 22) + np.int32(np.int32(high - low) * share) + np.int32(1 << 21)) >> 22


def luma(red, green, blue):
    """Pillow's RGB to L: ITU-R 601-2 in 16-bit fixed point, rounded; uint8 in, 0..255 out."""
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def mean_luma(total, count):
    """int(mean + 0.5) of ImageEnhance.Contrast from the sum of luma values, in integers (the double never differs)."""
    return (2 * total + count) // (2 * count)


def make_blend(multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`blend` with this multiplication of two float32, rounded to float32 before it is added to anything."""

    def blend(low, high, factor):
        """Image.blend of two pixel values: float32 in, float32 in [0, 255] out, to be truncated by the caller.

        `low` is the degenerate image: factor 0 gives it, 1 the original; values outside [0, 1] extrapolate and clip.
        """
        value = low + multiply(factor, high - low)
        if value < np.float32(0.0):
            value = np.float32(0.0)
        if value > np.float32(255.0):
            value = np.float32(255.0)
        return value

    return blend


def blend_hundredths(low, high, rest, share):
    """Image.blend by the factor share / 100, rest = 100 - share, in integers: all in 0..255, given as uint16.

    Rounds down what `blend` truncates; they agree for every pair of values where
    pipelines.augment.randaugment.Op says so.
    """
    return np.uint16(np.uint16(low * rest) + np.uint16(high * share)) // np.uint16(100)


def blend_256ths(low, high, share):
    """Image.blend by the factor share / 256, 0 <= share <= 512, for vectors of 16 bits: low, high and share int16, the
    result int16, to be clipped to 0..255 by the caller.

    float32 holds what `blend` computes exactly, so that truncating it is rounding down, above 0.
    """
    return np.int16(low + np.int16((np.int32(np.int16((high - low) << 6)) * np.int32(np.int16(share << 2))) >> 16))


def smooth(total):
    """ImageFilter.SMOOTH from the sum of the 3x3 neighborhood with the center counted five times, in float32.

    Rounds total / 13. Pillow sums float32 products instead; 13 is odd, so total / 13 is never within 1/26 of a tie, and
    both ways agree for every sum that can be.
    """
    return np.float32(np.int32((total + np.float32(6.5)) * np.float32(1 / 13)))


def smooth_whole(total):
    """`smooth` in integers, for vectors of 16 bits."""
    return (total + 6) // 13


def solarize(value, threshold):
    """ImageOps.solarize: invert the values from `threshold` up."""
    return 255 - value if value >= threshold else value


def solarize_add(value, addition):
    """AutoAugment's SolarizeAdd: add to the values below 128, at most up to 255."""
    return min(np.uint16(value + addition), np.uint16(255)) if value < 128 else value


def make_stretch(multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`stretch` with this multiplication of two float64, rounded to float64 before it is added to anything."""

    def stretch(value, low, high):
        """ImageOps.autocontrast for a value of a channel with extremes low < high, in double as Pillow computes it."""
        scale = 255.0 / (high - low)
        return min(max(np.int32(multiply(np.float64(value), scale) + multiply(np.float64(-low), scale)), 0), 255)

    return stretch


def equalize_step(total, last):
    """Step of ImageOps.equalize: pixels in the channel less those of its brightest value, over 255; 0 = leave alone."""
    return (total - last) // 255


def equalized(before, step):
    """ImageOps.equalize for a value with `before` pixels below it: (step // 2 + before) // step, at most 255.

    In double, which vector units divide; the added half keeps the quotient away from whole numbers on either side.
    """
    return min(np.int32((step // 2 + before + 0.5) / step), 255)


def equalized_by(before, step, inverse):
    """`equalized` with inverse = 1 / step in double, for loops that divide once: the half outweighs the rounding."""
    return min(np.int32((step // 2 + before + 0.5) * inverse), 255)


def normalize(value, center, scale):
    """(value - center) * scale in float32: a pixel in 0..255 to the network's input. Cannot be fused."""
    return (value - center) * scale


def bfloat16_bits(bits):
    """Upper half of a finite float32 (given as uint32), rounded to nearest, ties to even."""
    return (bits + 32767 + ((bits >> 16) & 1)) >> 16
