"""STL-10: 5,000 labeled, 100,000 unlabeled and 8,000 test images of 96x96: the official binary archive, or class
folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.class_folders import TrainTestFolders, refuse_packed
from data_prep.sources.downloads import Archive, check, fetch, unpack
from data_prep.sources.images import Images, Source, partial_splits
from data_prep.sources.records import RecordImages

ARCHIVE = Archive(
    "stl10_binary.tar.gz",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
)
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin", "class_names.txt")
SIDE = 96
CLASS_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
IMAGES = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
FORMS = (
    f"{ARCHIVE.file}, packed or unpacked, or a folder, zip or tar with train/ and test/ class folders and unlabeled/"
)


def open_stl10(root: Path | None, cache: Path) -> Source:
    """Open STL-10: the archive, the unpacked folder, a folder that holds either, or class folders; None downloads into
    `cache`.

    The archive is unpacked once, into `cache`: its 3 GB of pixels are then read where they lie.

    Raises: UserError when `root` is none of these, is incomplete, or has a wrong checksum.
    """
    if root is not None and not root.exists():
        raise UserError(f"No such file or folder: {root}. --source takes {FORMS}.")
    if root is not None and not root.name.endswith((".tar.gz", ".tgz")):
        for folder in (root, root / "stl10_binary"):
            if (folder / FILES[0]).is_file():
                return Stl10Source(folder)
        if not (root / ARCHIVE.file).is_file():
            refuse_packed(root, [ARCHIVE.file, *(name for name in FILES if name.endswith(".bin"))])
            return TrainTestFolders(root, CLASS_NAMES, FORMS, IMAGES)
        root = root / ARCHIVE.file
    path = fetch(ARCHIVE, cache) if root is None else root
    check(path, [ARCHIVE])
    return Stl10Source(unpack(path, FILES, cache / f"stl10-{ARCHIVE.md5[:8]}"))


class Stl10Source(Source):
    """The unpacked files: X holds three 96x96 planes an image, each column by column; y holds labels 1..10."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}. Unpack {ARCHIVE.file} again.")
        self._folder = folder
        self.class_names = tuple((folder / "class_names.txt").read_text(encoding="utf-8").split())
        if len(self.class_names) != len(CLASS_NAMES):
            raise UserError(f"{folder}/class_names.txt names {len(self.class_names)} classes, not {len(CLASS_NAMES)}.")
        self._splits = {split: self._read(split) for split in IMAGES}
        self.notes = partial_splits(self._splits, IMAGES)
        self.description = "; ".join(("official STL-10 binary archive", *self.notes))

    def open_split(self, split: str) -> Images:
        return self._splits[split]

    def _read(self, split: str) -> Images:
        path = self._folder / f"{split}_X.bin"
        count, rest = divmod(path.stat().st_size, 3 * SIDE * SIDE)
        if rest or not count:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, no multiple of {3 * SIDE * SIDE:,}: truncated.")
        labels = np.full(count, -1, np.int64)
        if split != "unlabeled":
            labels = np.fromfile(self._folder / f"{split}_y.bin", np.uint8).astype(np.int64) - 1
            if len(labels) != count or labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
                raise UserError(
                    f"{self._folder}/{split}_y.bin does not give a label 1..{len(CLASS_NAMES)} to each image."
                )
        return RecordImages(path, labels, SIDE, f"STL-10 {split} image", columns_first=True)
