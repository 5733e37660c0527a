"""Photographs drawn for tests and for the pictures of docs/own_images.md: shapes on backgrounds, of all sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ORIENTATION = 0x0112
TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
ANGLES = {"star": 10, "triangle": 3, "square": 4, "hexagon": 6, "disc": 60}
COLORS = {"star": (230, 200, 60), "triangle": (60, 170, 90), "square": (200, 70, 60), "hexagon": (150, 90, 200)}
LABELED = {"disc": 60, "star": 30, "square": 15, "hexagon": 9, "triangle": 6}
UNLABELED = {"disc": 160, "star": 90, "square": 50, "hexagon": 30, "triangle": 20}
NEW = dict.fromkeys(LABELED, 2)


def drawn(name: str, random: np.random.Generator, side: int = 48) -> Image.Image:
    """A shape at any place, angle, size and color on a background of others; one side is `side` or a little more."""
    width, height = (int(side * factor) for factor in random.permutation([1.0, random.uniform(1.05, 1.6)]))
    noise = Image.fromarray(random.integers(60, 180, (4, 5, 3), np.uint8))
    image = noise.resize((width, height), Image.Resampling.BICUBIC)
    middle = np.array([width, height]) / 2 + random.uniform(-0.08, 0.08, 2) * side
    count, radius, turned = ANGLES[name], random.uniform(0.26, 0.4) * side, random.uniform(0, 2 * np.pi)
    angles = turned + 2 * np.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
    points = middle + radius * radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    usual = np.array(COLORS.get(name, (70, 120, 220)))  # each class has one, and strays from it
    color = tuple((usual + random.uniform(-70, 70, 3)).clip(0, 255).astype(int).tolist())
    ImageDraw.Draw(image).polygon([tuple(point) for point in points.tolist()], fill=color)
    return image.filter(ImageFilter.GaussianBlur(side / 96))


def write_photos(folder: Path, labeled: dict[str, int], unlabeled: dict[str, int], new: dict[str, int]) -> None:
    """labeled/ by class, all/ and new/ without classes, as JPEGs: each fifth is grey, each fourth stored turned."""
    random, written = np.random.default_rng(0), 0
    for part, counts in (("labeled", labeled), ("all", unlabeled), ("new", new)):
        for name, count in counts.items():
            inside = folder / part / name if part == "labeled" else folder / part
            inside.mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                image, exif, written = drawn(name, random), Image.Exif(), written + 1
                if written % 5 == 0:
                    image = image.convert("L")
                if written % 4 == 0:
                    turn = list(TURNS)[written // 4 % 3]
                    image, exif[ORIENTATION] = image.transpose(TURNS[turn]), turn
                image.save(inside / f"{written:04d}.jpg", quality=92, exif=exif.tobytes())
