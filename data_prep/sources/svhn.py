"""SVHN: house number digits, 73,257 training and 26,032 test images of 32x32: the .mat files, or class folders."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.class_folders import TrainTestFolders, refuse_packed
from data_prep.sources.downloads import Archive, fetch, file_digests
from data_prep.sources.images import ArrayImages, Images, Source, partial_splits

SITE = "http://ufldl.stanford.edu/housenumbers/"
FILES = {
    "train": Archive("train_32x32.mat", SITE + "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test": Archive("test_32x32.mat", SITE + "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
}
IMAGES = {"train": 73_257, "test": 26_032}
CLASS_NAMES = tuple("0123456789")
FORMS = (
    "the folder with train_32x32.mat and test_32x32.mat, or a folder, zip or tar with train/ and test/ folders 0 to 9"
)


def open_svhn(root: Path | None, cache: Path) -> Source:
    """Open SVHN: the folder with both .mat files, or one of them, or class folders; None downloads into `cache`.

    Raises: UserError when `root` is none of these, or a file is missing or damaged.
    """
    if root is None:
        return SvhnSource({split: fetch(archive, cache) for split, archive in FILES.items()})
    if not root.exists():
        raise UserError(f"No such file or folder: {root}. --source takes {FORMS}.")
    folder = root.parent if root.suffix == ".mat" else root
    paths = {split: folder / archive.file for split, archive in FILES.items()}
    if not any(path.is_file() for path in paths.values()):
        refuse_packed(root, [archive.file for archive in FILES.values()])
        return TrainTestFolders(root, CLASS_NAMES, FORMS, IMAGES)
    for split, path in paths.items():
        if not path.is_file():
            raise UserError(f"{folder} lacks {path.name}. Download {FILES[split].url}")
    return SvhnSource(paths)


class SvhnSource(Source):
    """Digits 0-9 of the two .mat files; their label 10 is digit 0. Files packed anew are read too, and told of."""

    class_names = CLASS_NAMES

    def __init__(self, paths: dict[str, Path]) -> None:
        changed = [path.name for split, path in paths.items() if file_digests(path)["md5"] != FILES[split].md5]
        self._splits = {split: _read(path, split) for split, path in paths.items()}
        self.notes = partial_splits(self._splits, IMAGES)
        if changed:
            self.notes += (f"{', '.join(changed)} of another MD5 than the official: packed anew, or changed",)
        self.description = "; ".join(
            ("SVHN cropped digits" if changed else "official SVHN cropped digits", *self.notes)
        )

    def open_split(self, split: str) -> Images:
        return self._splits[split]


def _read(path: Path, split: str) -> Images:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, variable_names=["X", "y"])
    except (MatReadError, ValueError, TypeError, NotImplementedError, OSError, zlib.error) as error:
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
