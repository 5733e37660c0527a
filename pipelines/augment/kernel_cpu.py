"""The fused augmentation kernel for the CPU: one pass over a range of views, in uint8 scratch that stays in the cache.

`run` is compiled once, which takes some seconds, and cached beside this file or in the user's cache folder. It holds no
lock while it works and starts no thread: pipelines.augment.op splits the views over threads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba
import numpy as np

from pipelines.augment import ops_cpu as ops
from pipelines.augment import pixel_ops as px
from pipelines.augment.ops_cpu import jit
from pipelines.augment.plan import BLACK, BORDER, CUT, FIRST, FLIP, GRAY, LEFT, OPS, TOP

normalize, bfloat16_bits = jit(px.normalize), jit(px.bfloat16_bits)

# numba's cache looks at the file of the kernel alone; the kernel is made of these as well, and must change with them.
SOURCES = (px.__file__, ops.__file__, __file__)
STAMP = int.from_bytes(hashlib.sha256(b"".join(Path(f).read_bytes() for f in SOURCES)).digest()[:4], "big")


@jit
def write_float32(image, out, center, scale):
    """Normalize into out (height, 3 width) float32; center, scale: (3 width,) float32."""
    for y in range(image.shape[0]):
        source, target = image[y], out[y]
        for i in range(source.size):
            target[i] = normalize(np.float32(source[i]), center[i], scale[i])


@jit
def write_bfloat16(image, out, center, scale, row):
    """The same, rounded to bfloat16 bits in uint16. row: scratch, (3 width,) float32."""
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
            images: (N, H, 3W) uint8.  rows: (V,) int64 into images.  plan: (V, OPS + n) int32, see augment.plan.
            table: (T, 7) float64: kind and p0..p5, see pipelines.augment.randaugment.parameter_table.
            center, scale: (3,) float32, the mean and 1 / std in units of pixel values.
            out32, out16: (V, H, 3W) float32 and uint16 (bits of bfloat16): one is written, the other has no rows.

        Returns: `stamp`.
        """
        height, length = images.shape[1], images.shape[2]
        image, other = np.empty((height, length), np.uint8), np.empty((height, length), np.uint8)
        lut, histogram = np.empty((3, 256), np.uint8), np.empty((3, 256), np.int32)
        row_a, row_b = np.empty(length, np.uint8), np.empty(length, np.uint8)
        totals, floats = np.empty(length, np.uint16), np.empty(length, np.float32)
        centers, scales = np.empty(length, np.float32), np.empty(length, np.float32)
        for i in range(length):
            centers[i], scales[i] = center[i % 3], scale[i % 3]
        for v in range(start, stop):
            p = plan[v]
            stored, black = images[rows[v]], p[BORDER] == BLACK
            if p[FIRST]:
                ops.copy_bytes(stored.reshape(-1), 0, image.reshape(-1), 0, height * length)
            else:
                ops.crop(stored, image, p[FLIP], p[TOP], p[LEFT], black)
            for slot in range(OPS, p.size):
                entry = table[p[slot]]
                kind, whole, factor = np.int64(entry[0]), np.int64(entry[1]), np.float32(entry[1])
                flat, pixels = image.reshape(-1), image.reshape(-1, 3)
                if kind == px.IDENTITY:
                    continue
                if kind == px.AUTOCONTRAST:
                    ops.autocontrast_table(image, lut, row_a, row_b)
                    ops.look_up(pixels, lut)
                elif kind == px.EQUALIZE:
                    ops.equalize_table(pixels, lut, histogram)
                    ops.look_up(pixels, lut)
                elif kind == px.POSTERIZE:
                    ops.posterize(flat, np.uint8(whole))
                elif kind == px.SOLARIZE:
                    ops.solarize(flat, np.uint16(whole))
                elif kind == px.SOLARIZE_ADD:
                    ops.solarize_add(flat, np.uint16(whole))
                elif kind == px.BRIGHTNESS:
                    ops.blend_with_gray(flat, np.float32(0.0), factor)
                elif kind == px.CONTRAST:
                    ops.blend_with_gray(flat, np.float32(ops.gray_mean(pixels)), factor)
                elif kind == px.COLOR:
                    ops.color(image, factor, row_a)
                else:  # these read pixels around the one they write
                    if kind == px.SHARPNESS:
                        ops.sharpen(image, other, factor, totals)
                    else:
                        ops.affine(image, other, entry[1:].astype(np.int64))
                    image, other = other, image
            if p[FIRST]:
                ops.crop(image, other, p[FLIP], p[TOP], p[LEFT], black)
                image, other = other, image
            ops.cut_out(image, p[CUT], p[CUT + 1], p[CUT + 2], p[CUT + 3], np.uint8(p[GRAY]))
            if out32.shape[0]:
                write_float32(image, out32[v], centers, scales)
            else:
                write_bfloat16(image, out16[v], centers, scales, floats)
        return stamp

    return run


def _compiled():
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(build(STAMP))
    except RuntimeError:  # numba finds no folder it may write to
        return numba.njit(**options)(build(STAMP))


run = _compiled()
