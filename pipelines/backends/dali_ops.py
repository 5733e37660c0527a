"""The operations of `pipelines.augment.randaugment` in DALI's operators, as augmentations of `nvidia.dali.auto_aug`.

Operations, levels and parameters come from the same table as the fused kernel's, and every operation is written to give
the kernel's pixels where DALI's arithmetic can: all but `equalize`, which is OpenCV's with Pillow's step.

Import this module only where DALI is installed (`pipelines.backends.dali` checks).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types
from nvidia.dali import math as dali_math
from nvidia.dali.auto_aug.core import augmentation, select
from nvidia.dali.pipeline import do_not_convert

from pipelines.augment import pixel_ops as px
from pipelines.augment.randaugment import find_ops, parameter_table
from pipelines.augment.views import View

Node = Any  # nvidia.dali.data_node.DataNode; images are (H, W, 3) uint8 in all functions here
LUMA = np.array([[[19595, 38470, 7471]]], np.int32)  # pipelines.augment.pixel_ops.luma
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)


class Table(NamedTuple):
    """What a view's operations can do to an image, one row each; the first row does nothing."""

    kinds: tuple[int, ...]  # of pipelines.augment.pixel_ops, those that occur
    which: NDArray[np.int32]  # (T,) index into `kinds`
    values: NDArray[np.float32]  # (T,) blend factor, threshold or mask
    matrices: NDArray[np.float32]  # (T, 2, 3) affine matrix from result to source
    chances: list[float]  # (T,) with which a row is drawn


def make_table(view: View, side: int) -> Table:
    """The table of a view for square images of `side` pixels. The view must have operations."""
    entries = parameter_table(find_ops(view.ops), view.levels, side, side)
    entries = np.concatenate([np.zeros((1, entries.shape[1])), entries])
    chances = np.full(len(entries), view.probability / (len(entries) - 1))
    chances[0] = 1 - view.probability
    kinds = np.unique(entries[:, 0])
    return Table(
        tuple(int(kind) for kind in kinds),
        np.searchsorted(kinds, entries[:, 0]).astype(np.int32),
        entries[:, 1].astype(np.float32),
        np.stack([_matrix(entry[1:]) for entry in entries]),
        chances.tolist(),
    )


def operate(image: Node, table: Table, side: int) -> Node:
    """Draw a row of the table for each image, and do what it says."""
    entry = fn.random.choice(len(table.which), p=table.chances)
    value = types.Constant(table.values)[entry]
    return select(
        [AUGMENTATIONS[kind] for kind in table.kinds],
        types.Constant(table.which)[entry],
        data=image,
        value=value.gpu() if image.device == "gpu" else value,
        matrix=types.Constant(table.matrices)[entry],
        side=side,
    )


def _matrix(fixed: NDArray[np.float64]) -> NDArray[np.float32]:
    """Undo randaugment.fixed_point, which steps from center to center of pixels: (2, 3), as DALI takes it."""
    a, b, c, d, e, f = fixed
    return (np.array([[a, b, c - (a + b) / 2], [d, e, f - (d + e) / 2]]) / 65536).astype(np.float32)


def _truncated(values: Node) -> Node:
    """Floats to uint8 as C does it, clipped to 0..255."""
    return fn.cast(dali_math.floor(values), dtype=types.UINT8)


def _blend(low: Node, image: Node, factor: Node) -> Node:
    """pipelines.augment.pixel_ops.blend; `low` in float32."""
    return _truncated(low + factor * (image - low))


def _luma(image: Node) -> Node:
    """(H, W, 1) int32 in 0..255."""
    return (fn.reductions.sum(image * LUMA, axes=[2], keep_dims=True) + 32768) // 65536


def _count(mask: Node) -> Node:
    """(1, 1, 3) int32, how often a mask (H, W, 3) holds in each channel."""
    return fn.reductions.sum(fn.cast(mask, dtype=types.INT32), axes=[0, 1], keep_dims=True)


def _inverse(image: Node) -> Node:
    return types.Constant(255, dtype=types.UINT8) - image


@augmentation
@do_not_convert
def identity(data: Node, _: Node) -> Node:
    return data


@augmentation
@do_not_convert
def autocontrast(data: Node, _: Node) -> Node:
    low = fn.cast(fn.reductions.min(data, axes=[0, 1], keep_dims=True), dtype=types.FLOAT64)
    high = fn.cast(fn.reductions.max(data, axes=[0, 1], keep_dims=True), dtype=types.FLOAT64)
    flat = high == low
    scale = types.Constant(255.0, dtype=types.FLOAT64) / (high - low + flat)
    return _truncated(data * scale + -low * scale) * (flat ^ True) + data * flat


@augmentation
@do_not_convert
def equalize(data: Node, _: Node, side: int) -> Node:
    # OpenCV's formula maps ranks to 0..255. Pillow's divides them by a step rounded down, and clips what goes beyond,
    # which brightens small images a good deal: from OpenCV's result back to ranks, then on with Pillow's step.
    least = _count(data == fn.reductions.min(data, axes=[0, 1], keep_dims=True))
    last = _count(data == fn.reductions.max(data, axes=[0, 1], keep_dims=True))
    step = (side * side - last) // 255
    ranks = fn.equalize(data) * ((side * side - least) / 255.0)
    changes = step > 0
    equalized = _truncated((ranks + (step // 2 + 0.5)) / dali_math.max(step, 1))
    return equalized * changes + data * (changes ^ True)


@augmentation
@do_not_convert
def posterize(data: Node, _: Node, value: Node) -> Node:
    return data & fn.cast(value, dtype=types.UINT8)


@augmentation
@do_not_convert
def solarize(data: Node, _: Node, value: Node) -> Node:
    inverted = data >= value
    return data * (inverted ^ True) + _inverse(data) * inverted


@augmentation
@do_not_convert
def brightness(data: Node, _: Node, value: Node) -> Node:
    return _truncated(data * value)


@augmentation
@do_not_convert
def contrast(data: Node, _: Node, value: Node) -> Node:
    mean = fn.reductions.mean(_luma(data), axes=[0, 1, 2], keep_dims=True, dtype=types.FLOAT)
    return _blend(dali_math.floor(mean + 0.5), data, value)


@augmentation
@do_not_convert
def color(data: Node, _: Node, value: Node) -> Node:
    return _blend(fn.cast(_luma(data), dtype=types.FLOAT), data, value)


@augmentation
@do_not_convert
def sharpness(data: Node, _: Node, value: Node, side: int) -> Node:
    inner = np.zeros((side, side, 1), np.uint8)  # Pillow smooths only where all neighbors exist
    inner[1:-1, 1:-1] = 1
    smooth = fn.filter(data, SMOOTH) * inner + data * (1 - inner)  # the filter rounds
    return _blend(fn.cast(smooth, dtype=types.FLOAT), data, value)


@augmentation
@do_not_convert
def solarize_add(data: Node, _: Node, value: Node) -> Node:
    dark = data < types.Constant(128, dtype=types.UINT8)
    return fn.cast(data + dark * value, dtype=types.UINT8)  # saturates


@augmentation
@do_not_convert
def affine(data: Node, _: Node, matrix: Node) -> Node:
    return fn.warp_affine(data, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0, inverse_map=True)


AUGMENTATIONS = {
    px.IDENTITY: identity,
    px.AUTOCONTRAST: autocontrast,
    px.EQUALIZE: equalize,
    px.POSTERIZE: posterize,
    px.SOLARIZE: solarize,
    px.BRIGHTNESS: brightness,
    px.CONTRAST: contrast,
    px.COLOR: color,
    px.SHARPNESS: sharpness,
    px.AFFINE: affine,
    px.SOLARIZE_ADD: solarize_add,
}
