"""The operations of RandAugment as data: each a name, its levels and what its level means to the kernels.

The first 14 operations and their ranges are those of FixMatch's RandAugment, which the SeMi paper takes over
(sec. 4.1): a level v out of 10 sets the strength. The others are for further policies. `parameter_table` turns
(operation, level, sign) into the numbers a kernel reads, once for each size of image, so that drawing a view is only
drawing indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import unknown
from pipelines.augment import pixel_ops as px

COLUMNS = 7  # kind, p0 .. p5
FRACTION = 256  # jitter's factors are multiples of 1 / 256: neighbors differ by less than one pixel value
Parameters = tuple[float, ...]


class Op(NamedTuple):
    """An operation: `parameters(v, sign, height, width)` gives p0.. for level v in 0..10 and sign -1 or +1.

    `kind` is the code of pipelines.augment.pixel_ops. Operations that are not `signed` are called with sign +1 only.
    """

    name: str
    kind: int
    parameters: Callable[[int, int, int, int], Parameters]
    signed: bool = False


def _none(v: int, sign: int, height: int, width: int) -> Parameters:
    return ()


def _factor(v: int, sign: int, height: int, width: int) -> Parameters:
    """Blend factor 0.9 v / 10 + 0.05, in float32 as Pillow's C code takes it, and in hundredths.

    In hundredths 0 where float32 lies so far below the factor that blends of whole numbers come out below them.
    """
    return (float(np.float32(0.9 * v / 10 + 0.05)), 0 if v == 6 else 9 * v + 5)


def _mask(v: int, sign: int, height: int, width: int) -> Parameters:
    """Keep the upper int(4 v / 10) + 4 bits."""
    bits = int(4 * v / 10) + 4
    return (256 - (1 << (8 - bits)),)


def _threshold(v: int, sign: int, height: int, width: int) -> Parameters:
    return (256 - int(256 * v / 10),)


def _always(v: int, sign: int, height: int, width: int) -> Parameters:
    """Threshold 0: solarizing every value is inverting."""
    return (0,)


def _addition(v: int, sign: int, height: int, width: int) -> Parameters:
    """AutoAugment's range: up to 110."""
    return (int(110 * v / 10),)


def _rotate(v: int, sign: int, height: int, width: int) -> Parameters:
    """Image.rotate by sign * int(30 v / 10) degrees, counterclockwise: Pillow's inverse matrix about the center."""
    angle = -math.radians((sign * int(30 * v / 10)) % 360.0)
    cos, sin, minus_sin = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
    center_x, center_y = width / 2, height / 2
    x0 = cos * -center_x + sin * -center_y + 0.0 + center_x
    y0 = minus_sin * -center_x + cos * -center_y + 0.0 + center_y
    return fixed_point((cos, sin, x0, minus_sin, cos, y0))


def _shear_x(v: int, sign: int, height: int, width: int) -> Parameters:
    return fixed_point((1, sign * 0.3 * v / 10, 0, 0, 1, 0))


def _shear_y(v: int, sign: int, height: int, width: int) -> Parameters:
    return fixed_point((1, 0, 0, sign * 0.3 * v / 10, 1, 0))


def _translate_x(v: int, sign: int, height: int, width: int) -> Parameters:
    return fixed_point((1, 0, sign * int(0.3 * v / 10 * width), 0, 1, 0))


def _translate_y(v: int, sign: int, height: int, width: int) -> Parameters:
    return fixed_point((1, 0, 0, 0, 1, sign * int(0.3 * v / 10 * height)))


def fixed_point(matrix: Sequence[float]) -> Parameters:
    """The 16.16 fixed-point form in which Pillow applies an affine matrix (a, b, c, d, e, f) to pixel centers."""
    a, b, c, d, e, f = matrix

    def fix(value: float) -> int:
        return math.floor(value * 65536.0 + 0.5)

    return (fix(a), fix(b), fix(c + a * 0.5 + b * 0.5), fix(d), fix(e), fix(f + d * 0.5 + e * 0.5))


OPERATIONS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("identity", px.IDENTITY, _none),
        Op("autocontrast", px.AUTOCONTRAST, _none),
        Op("equalize", px.EQUALIZE, _none),
        Op("brightness", px.BRIGHTNESS, _factor),
        Op("color", px.COLOR, _factor),
        Op("contrast", px.CONTRAST, _factor),
        Op("sharpness", px.SHARPNESS, _factor),
        Op("solarize", px.SOLARIZE, _threshold),
        Op("posterize", px.POSTERIZE, _mask),
        Op("rotate", px.AFFINE, _rotate, signed=True),
        Op("shear_x", px.AFFINE, _shear_x, signed=True),
        Op("shear_y", px.AFFINE, _shear_y, signed=True),
        Op("translate_x", px.AFFINE, _translate_x, signed=True),
        Op("translate_y", px.AFFINE, _translate_y, signed=True),
        Op("invert", px.SOLARIZE, _always),
        Op("solarize_add", px.SOLARIZE_ADD, _addition),
    )
}

FIXMATCH_OPS = tuple(OPERATIONS)[:14]


def find_ops(names: Sequence[str]) -> tuple[Op, ...]:
    """The operations of these names. Raises UserError naming the nearest for a name that does not exist."""
    for name in names:
        if name not in OPERATIONS:
            raise unknown("operation", name, OPERATIONS)
    return tuple(OPERATIONS[name] for name in names)


def parameter_table(ops: Sequence[Op], levels: tuple[int, int], height: int, width: int) -> NDArray[np.float64]:
    """Everything a view can do to an image of this size, one row each: (T, 7) float64 of kind and p0..p5.

    Row `(op * L + level - levels[0]) * 2 + s`, with L levels (both ends included) and s = 0 for the sign +, 1 for -, is
    that operation at that level. float64 holds both the integers and float32 values exactly.
    """
    table = np.zeros((len(ops) * (levels[1] - levels[0] + 1) * 2, COLUMNS))
    row = 0
    for op in ops:
        for level in range(levels[0], levels[1] + 1):
            for sign in (1, -1):
                values = op.parameters(level, sign if op.signed else 1, height, width)
                table[row, 0] = op.kind
                table[row, 1 : 1 + len(values)] = values
                row += 1
    return table


def jitter_tables(strengths: Sequence[float]) -> list[NDArray[np.float64]]:
    """Brightness, contrast and saturation by every multiple of 1 / FRACTION in [1 - s, 1 + s], s of each: 3 of (T, 7).

    Where all strengths are 0, there are no rows.
    """
    if not any(strengths):
        return [np.zeros((0, COLUMNS))] * 3
    tables = []
    for kind, strength in zip((px.BRIGHTNESS, px.CONTRAST, px.COLOR), strengths, strict=True):
        most = int(strength * FRACTION)
        shares = np.arange(FRACTION - most, FRACTION + most + 1)
        table = np.zeros((len(shares), COLUMNS))
        table[:, 0] = np.where(shares == FRACTION, px.IDENTITY, kind)
        table[:, 1], table[:, 3] = shares / FRACTION, shares
        tables.append(table)
    return tables
