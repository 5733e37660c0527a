"""The views in plain Pillow and NumPy, one image at a time: what the kernels are compared with, in tests and in speed.

Written from the definitions of the operations, not from the project's tables, so that the comparison means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def _factor(v: int) -> float:
    return 0.9 * v / 10 + 0.05


#: Each takes the image, the level v (1..9 of 10) and the sign (-1 or 1).
OPS: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {
    "identity": lambda image, v, s: image,
    "autocontrast": lambda image, v, s: ImageOps.autocontrast(image),
    "equalize": lambda image, v, s: ImageOps.equalize(image),
    "brightness": lambda image, v, s: ImageEnhance.Brightness(image).enhance(_factor(v)),
    "color": lambda image, v, s: ImageEnhance.Color(image).enhance(_factor(v)),
    "contrast": lambda image, v, s: ImageEnhance.Contrast(image).enhance(_factor(v)),
    "sharpness": lambda image, v, s: ImageEnhance.Sharpness(image).enhance(_factor(v)),
    "solarize": lambda image, v, s: ImageOps.solarize(image, 256 - int(256 * v / 10)),
    "posterize": lambda image, v, s: ImageOps.posterize(image, int(4 * v / 10) + 4),
    "rotate": lambda image, v, s: image.rotate(s * int(30 * v / 10)),
    "shear_x": lambda image, v, s: _affine(image, (1, s * 0.3 * v / 10, 0, 0, 1, 0)),
    "shear_y": lambda image, v, s: _affine(image, (1, 0, 0, s * 0.3 * v / 10, 1, 0)),
    "translate_x": lambda image, v, s: _affine(image, (1, 0, s * int(0.3 * v / 10 * image.width), 0, 1, 0)),
    "translate_y": lambda image, v, s: _affine(image, (1, 0, 0, 0, 1, s * int(0.3 * v / 10 * image.height))),
    "invert": lambda image, v, s: ImageOps.invert(image),
    "solarize_add": lambda image, v, s: image.point(lambda p: min(p + int(110 * v / 10), 255) if p < 128 else p),
}
NAMES = tuple(OPS)[:14]  # FixMatch's


def flip_and_crop(image: Image.Image, flip: bool, top: int, left: int, pad: int) -> Image.Image:
    """Mirror left to right, pad by reflection, cut the original size at (top, left), each in 0..2 pad."""
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if pad:
        rows, columns = _reflected(image.height, pad), _reflected(image.width, pad)
        pixels = np.asarray(image)
        image = Image.fromarray(pixels[rows[top : top + image.height, None], columns[left : left + image.width]])
    return image


@lru_cache
def _reflected(side: int, pad: int) -> np.ndarray:
    """Where the rows of a padded image come from; indexing with it is several times faster than np.pad."""
    return np.pad(np.arange(side), pad, mode="reflect")


def cut_out(image: Image.Image, center_x: float, center_y: float, side: float) -> Image.Image:
    """A gray square around a real center, both corners included; `image` is drawn upon."""
    x0, y0 = int(max(0, center_x - side / 2)), int(max(0, center_y - side / 2))
    x1, y1 = int(min(image.width, x0 + side)), int(min(image.height, y0 + side))
    ImageDraw.Draw(image).rectangle((x0, y0, x1, y1), (127, 127, 127))
    return image


def weak(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """The weak view from 3 numbers in [0, 1): flip, top, left."""
    pad_y, pad_x = image.height // 8, image.width // 8
    top, left = int(draws[1] * (2 * pad_y + 1)), int(draws[2] * (2 * pad_x + 1))
    if pad_x != pad_y:
        raise ValueError(f"the reference pads all sides alike, got an image of {image.size}")
    return flip_and_crop(image, draws[0] < 0.5, top, left, pad_x)


def strong(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """The strong view from 13 numbers in [0, 1): the weak view's 3, the cutout's center, 4 for each of 2 operations."""
    return operate_and_cut(weak(image, draws), draws)


def operate_and_cut(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Two operations and a cutout, from the strong view's numbers."""
    for which, whether, level, sign in (draws[5:9], draws[9:13]):
        if whether < 0.5:
            name = NAMES[int(which * len(NAMES))]
            image = OPS[name](image, 1 + int(level * 9), 1 if sign < 0.5 else -1)
    if image.readonly:
        image = image.copy()
    return cut_out(image, draws[3] * image.width, draws[4] * image.height, min(image.size) / 2)


def resized_crop(
    image: Image.Image,
    draws: Sequence[float],
    tries: Sequence[float],
    area: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Image.Image:
    """Mirror, cut and resize to the size before, from flip, top and left and 20 numbers for torchvision's 10 tries."""
    if draws[0] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = image.size
    for size, shape in zip(tries[::2], tries[1::2], strict=True):
        target = width * height * (area[0] + size * (area[1] - area[0]))
        aspect = math.exp(math.log(ratio[0]) + shape * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1))
            break
    else:
        w, h = width, height
        if width / height < ratio[0]:
            h = round(width / ratio[0])
        elif width / height > ratio[1]:
            w = round(height * ratio[1])
        top, left = (height - h) // 2, (width - w) // 2
    return image.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + w, top + h))


def jitter(image: Image.Image, draws: Sequence[float], strength: float) -> Image.Image:
    """Brightness, contrast and saturation from 4 numbers: their order, then each one's factor, in 256ths."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in list(permutations(range(3)))[int(draws[0] * 6)]:
        most = int(256 * strength)
        image = enhancers[which](image).enhance(1 + (int(draws[1 + which] * (2 * most + 1)) - most) / 256)
    return image


def weak_photo(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """The weak view of photographs from 25 numbers in [0, 1), two of which it does not use."""
    return resized_crop(image, draws, draws[5:25], (0.5, 1.0))


def strong_photo(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """The strong view of photographs from 37 numbers in [0, 1): the strong view's, the tries', the jitter's."""
    cut = resized_crop(image, draws, draws[13:33], (0.2, 1.0))
    return operate_and_cut(jitter(cut, draws[33:37], 0.4), draws)


VIEWS = {"weak": weak, "strong": strong, "weak_photo": weak_photo, "strong_photo": strong_photo}


def finish(image: Image.Image, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Image to normalized float32 (H, W, 3), as a transform pipeline does it; mean and std (3,) of pixels / 255."""
    return (np.asarray(image, np.float32) / np.float32(255) - mean) / std
