"""Handwritten digits: the 1,797 real 8x8 images that scikit-learn ships. No network, no file to fetch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.errors import UserError
from data_prep.sources.images import ArrayImages, Images, Source
from data_prep.sources.resize import Preparation, fitted

SIDE = 16
TEST_SHARE = 5  # one image in five


def open_digits(root: Path | None, cache: Path) -> Source:
    """Open the digits. Raises: UserError when a `root` is given: there is nothing to fetch."""
    if root is not None:
        raise UserError("digits-lt comes with scikit-learn and takes no --source.")
    return DigitsSource()


class DigitsSource(Source):
    """Digits 0-9, white on black, scaled from 8x8 to 16x16 RGB by Pillow's bilinear filter.

    The test split is every fifth image of each class, in scikit-learn's order: fixed and stratified.
    """

    class_names = tuple("0123456789")
    description = "scikit-learn's bundled handwritten digits (1,797 images, 8x8)"

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._labels = digits.target.astype(np.int64)
        grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0..16
        rule = Preparation(SIDE, "bilinear")
        self._pixels = np.stack([fitted(Image.fromarray(g).convert("RGB"), rule) for g in grey])
        self._is_test = _every_fifth_of_each_class(self._labels)

    def open_split(self, split: str) -> Images:
        rows = np.flatnonzero(self._is_test if split == "test" else ~self._is_test)
        return ArrayImages(self._pixels[rows], self._labels[rows], f"digits {split} image")


def _every_fifth_of_each_class(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    chosen = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        chosen[np.flatnonzero(labels == k)[TEST_SHARE - 1 :: TEST_SHARE]] = True
    return chosen
