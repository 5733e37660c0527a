"""SVHN: house number digits, 73,257 training and 26,032 test images of 32x32, from the official .mat files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.downloads import Archive, check, fetch
from data_prep.sources.images import ArrayImages, Images, Source

SITE = "http://ufldl.stanford.edu/housenumbers/"
FILES = {
    "train": Archive("train_32x32.mat", SITE + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test": Archive("test_32x32.mat", SITE + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
}


class SvhnSource(Source):
    """Digits 0-9; the files' label 10 is digit 0.

    Args:
        root: the folder with both files, or one of them; None downloads into `cache`.

    Raises: UserError when a file is missing or has a wrong checksum.
    """

    class_names = tuple("0123456789")
    description = "official SVHN cropped digits"

    def __init__(self, root: Path | None, cache: Path) -> None:
        folder = root.parent if root is not None and root.is_file() else root
        self._paths = {split: _locate(archive, folder, cache) for split, archive in FILES.items()}

    def open_split(self, split: str) -> Images:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        path = self._paths[split]
        try:
            content = loadmat(path, variable_names=["X", "y"])
        except (MatReadError, ValueError, TypeError, NotImplementedError, OSError) as error:
            raise UserError(f"{path} is no readable .mat file ({error}). Download it again.") from None
        pixels, labels = content.get("X"), content.get("y")
        if pixels is None or labels is None or pixels.dtype != np.uint8 or pixels.shape[:-1] != (32, 32, 3):
            raise UserError(f"{path} lacks X (32, 32, 3, n) of bytes and y (n, 1). Take the official file.")
        labels = labels.reshape(-1)
        if len(labels) != pixels.shape[3]:
            raise UserError(f"{path} has {len(labels):,} labels of {pixels.shape[3]:,} images. Take the official file.")
        if not np.isin(labels, np.arange(1, 11)).all():
            raise UserError(f"{path} has labels {labels.min()}..{labels.max()}, not 1..10. Take the official file.")
        digits = labels.astype(np.int64) % 10
        return ArrayImages(np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), digits, f"SVHN {split} image")


def _locate(archive: Archive, folder: Path | None, cache: Path) -> Path:
    if folder is None:
        return fetch(archive, cache)
    path = folder / archive.file
    if not path.is_file():
        raise UserError(f"{folder} lacks {archive.file}. Download {archive.url}")
    check(path, [archive])
    return path
