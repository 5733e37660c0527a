"""The fused augmentation kernel for the CPU: one pass over a range of views, in uint8 scratch that stays in the cache.

`run` is compiled once, which takes some seconds, and cached beside this file or in the user's cache folder. It holds no
lock while it works and starts no thread: pipelines.augment.op splits the views over threads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pipelines.augment import ops_cpu as ops
from pipelines.augment import pixel_ops as px
from pipelines.augment.ops_cpu import BLOCK, cached, float_bits, jit, uint
from pipelines.augment.plan import BLACK, BORDER, CUT, FIRST, FLIP, GRAY, HEIGHT, LEFT, OPS, TOP, WIDTH

normalize, bfloat16_bits = jit(px.normalize), jit(px.bfloat16_bits)

# numba's cache looks at the file of the kernel alone; the kernel is made of these as well, and must change with them.
SOURCES = (px.__file__, ops.__file__, __file__)
STAMP = int.from_bytes(hashlib.sha256(b"".join(Path(f).read_bytes() for f in SOURCES)).digest()[:4], "big")


@jit
def write_float32(image, size, out, at, center, scale):
    """Normalize into `out` from `at` on; center, scale: (BLOCK,) float32."""
    for block in range(0, size - BLOCK + 1, BLOCK):
        for j in range(BLOCK):
            value = np.float32(image[uint(block + j)])
            out[uint(at + block + j)] = normalize(value, center[uint(j)], scale[uint(j)])
    for i in range(size - size % BLOCK, size):
        out[uint(at + i)] = normalize(np.float32(image[uint(i)]), center[uint(i % 3)], scale[uint(i % 3)])


@jit
def write_bfloat16(image, size, out, at, center, scale):
    """The same, rounded to bfloat16 bits in uint16."""
    for block in range(0, size - BLOCK + 1, BLOCK):
        for j in range(BLOCK):
            value = normalize(np.float32(image[uint(block + j)]), center[uint(j)], scale[uint(j)])
            out[uint(at + block + j)] = bfloat16_bits(float_bits(value))
    for i in range(size - size % BLOCK, size):
        value = normalize(np.float32(image[uint(i)]), center[uint(i % 3)], scale[uint(i % 3)])
        out[uint(at + i)] = bfloat16_bits(float_bits(value))


def build(stamp):
    """Compile the kernel. `stamp` becomes part of the cache's key because the kernel refers to it."""

    def run(stored, begins, plan, table, center, scale, out32, out16, start, stop):
        """Make the views `start` .. `stop - 1`.

        Args:
            stored: (B,) uint8, images of 3HW bytes.  begins: (V,) int64, where each view's image begins in it.
            plan: (V, OPS + n) int32, see augment.plan.
            table: (T, 7) float64: kind and p0..p5, see pipelines.augment.randaugment.parameter_table.
            center, scale: (3,) float32, the mean and 1 / std in units of pixel values.
            out32, out16: (V, H, 3W) float32 and uint16 (bits of bfloat16): one is written, the other has no rows.

        Returns: `stamp`.
        """
        height, width = out32.shape[1], out32.shape[2] // 3
        size = 3 * height * width
        full, half = out32.reshape(-1), out16.reshape(-1)
        room = (size + ops.SLACK) // 8 * 8
        image, other = np.empty(room, np.uint8), np.empty(room, np.uint8)
        lut, counts = np.empty(768, np.uint8), np.empty(768, np.int32)
        lows, highs = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint8)
        sums, sources = np.empty(size, np.uint16), np.empty(height * width + ops.RUN, np.int32)
        centers, scales = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        near, shares = np.empty(width, np.int32), np.empty(3 * width, np.int32)
        wide = 3 * width + ops.SLACK
        line, low, high = np.empty(wide, np.uint8), np.empty(wide, np.uint8), np.empty(wide, np.uint8)
        scratch = (near, shares, line, low, high)
        for i in range(BLOCK):
            centers[i], scales[i] = center[i % 3], scale[i % 3]
        for v in range(start, stop):
            p = plan[v]
            begin, black = begins[v], p[BORDER] == BLACK
            if p[HEIGHT]:
                box = p[FLIP], p[TOP], p[LEFT], p[HEIGHT], p[WIDTH]
                ops.crop_and_resize(stored, begin, image, other, height, width, box, scratch)
            elif p[FIRST]:
                ops.copy_bytes(stored, begin, image, 0, size)
            else:
                ops.crop(stored, begin, image, height, width, p[FLIP], p[TOP], p[LEFT], black)
            for slot in range(OPS, p.size):
                t = p[slot]
                kind, whole = np.int64(table[t, 0]), np.int64(table[t, 1])
                if kind == px.IDENTITY:
                    continue
                if kind in (px.AUTOCONTRAST, px.EQUALIZE):
                    if kind == px.AUTOCONTRAST:
                        ops.autocontrast_table(image, size, lut, lows, highs)
                    else:
                        ops.equalize_table(image, size, lut, counts)
                    ops.look_up(image, size, lut)
                elif kind == px.POSTERIZE:
                    ops.posterize(image, size, np.uint8(whole))
                elif kind == px.SOLARIZE:
                    ops.solarize(image, size, np.uint16(whole))
                elif kind == px.SOLARIZE_ADD:
                    ops.solarize_add(image, size, np.uint16(whole))
                elif kind == px.AFFINE:
                    ops.affine(image, other, height, width, table[t], sources)
                    image, other = other, image
                else:
                    ops.degenerate(kind, image, other, height, width, sums)
                    hundredths, parts = np.int64(table[t, 2]), np.int64(table[t, 3])
                    ops.blend_with(other, image, size, np.float32(table[t, 1]), hundredths, parts)
            if p[FIRST]:
                ops.crop(image, 0, other, height, width, p[FLIP], p[TOP], p[LEFT], black)
                image, other = other, image
            ops.cut_out(image, width, p[CUT], p[CUT + 1], p[CUT + 2], p[CUT + 3], np.uint8(p[GRAY]))
            if out32.shape[0]:
                write_float32(image, size, full, v * size, centers, scales)
            else:
                write_bfloat16(image, size, half, v * size, centers, scales)
        return stamp

    return run


run = cached(build(STAMP))
