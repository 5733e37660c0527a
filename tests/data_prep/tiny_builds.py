"""Small builds for tests that interrupt them, in modules that a fresh process can import."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.images import ArrayImages
from data_prep.work import filling
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import pixels, write_class_folders


def make_images(root: Path, unlabeled: int) -> None:
    """Class folders under root/labeled and root/test, and so many unlabeled images."""
    images = iter(pixels(unlabeled + 40, 12))
    for split in ("labeled", "test"):
        write_class_folders(root / split, {name: [next(images) for _ in range(8)] for name in ("cat", "dog")})
    write_class_folders(root, {"unlabeled": [next(images) for _ in range(unlabeled)]})


def build(
    root: Path, out: Path, on_bad_image: str = "error", formats: tuple[str, ...] = ("dali",), workers: int = 1
) -> None:
    """Build the folder in small chunks, in this process."""
    filling.CHUNK = 16
    places = {key: root / key for key in ("labeled", "unlabeled", "test")}
    build_dataset(
        "folder",
        out,
        **places,
        resolution=8,
        workers=workers,
        formats=formats,
        shard_images=100 if "dali" in formats else None,
        on_bad_image=on_bad_image,
        progress=False,
        say=lambda line: None,
        command="python data_prep/build.py folder",  # the same whatever --out is: folders are compared to the byte
    )


class Deadly(ArrayImages):
    """Images of which number 300 ends the process that reads it, as the kernel does when memory is short."""

    worth_processes = True

    def take(self, indices: np.ndarray) -> Deadly:
        part = Deadly(self.pixels[indices], self.labels[indices], self.prefix)
        part.numbers = self.numbers[indices]
        return part

    def image(self, index: int) -> Image.Image:
        if self.numbers[index] == 300:
            os._exit(9)
        return super().image(index)


class Decoded(ArrayImages):
    """Images that are worth processes."""

    worth_processes = True

    def take(self, indices: np.ndarray) -> Decoded:
        part = Decoded(self.pixels[indices], self.labels[indices], self.prefix)
        part.numbers = self.numbers[indices]
        return part
