"""CIFAR-10 and CIFAR-100: the official binary or python archive (packed or unpacked), or class folders."""

from __future__ import annotations

import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.class_folders import TrainTestFolders
from data_prep.sources.containers import Members, list_members
from data_prep.sources.downloads import Archive, check, fetch
from data_prep.sources.images import ArrayImages, Images, Source, partial_splits
from data_prep.sources.resize import UnreadableError
from data_prep.sources.unpickling import load_plain

PIXELS = 3 * 32 * 32
IMAGES = {"train": 50_000, "test": 10_000}
SITE = "https://www.cs.toronto.edu/~kriz/"


class Layout(NamedTuple):
    """How one of the two sets is published. `label_bytes`: bytes before the pixels of a binary record; the last of
    them is the (fine) label. `names_key`: class names in the python meta file. `class_names`: of class folders."""

    binary: Archive
    python: Archive
    binary_files: dict[str, tuple[str, ...]]
    python_files: dict[str, tuple[str, ...]]
    meta: tuple[str, str]
    label_bytes: int
    label_key: str
    names_key: str
    class_names: tuple[str, ...]


CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
_FIVE = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = {
    "cifar10": Layout(
        Archive(
            "cifar-10-binary.tar.gz",
            SITE + "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        Archive("cifar-10-python.tar.gz", SITE + "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
        {"train": tuple(f"{name}.bin" for name in _FIVE), "test": ("test_batch.bin",)},
        {"train": _FIVE, "test": ("test_batch",)},
        ("batches.meta.txt", "batches.meta"),
        1,
        "labels",
        "label_names",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Layout(
        Archive("cifar-100-binary.tar.gz", SITE + "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8"),
        Archive("cifar-100-python.tar.gz", SITE + "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"),
        {"train": ("train.bin",), "test": ("test.bin",)},
        {"train": ("train",), "test": ("test",)},
        ("fine_label_names.txt", "meta"),
        2,
        "fine_labels",
        "fine_label_names",
        CIFAR100_NAMES,
    ),
}


def open_cifar(which: str, root: Path | None, cache: Path) -> Source:
    """Open "cifar10" or "cifar100": from `root`, whatever of the known forms it is, or downloaded into `cache`.

    Raises: UserError when `root` is none of the forms, or is an archive with a wrong checksum.
    """
    layout = LAYOUTS[which]
    if root is None:
        return _official(layout, fetch(layout.binary, cache))
    if not root.exists():
        raise UserError(f"No such file or folder: {root}. --source takes {_forms(layout)}.")
    if root.is_file() and root.name.endswith((".tar.gz", ".tgz")):
        return _official(layout, root)
    for archive in (layout.binary, layout.python):
        if (root / archive.file).is_file():
            return _official(layout, root / archive.file)
    members = list_members(root)
    for binary, splits in ((True, layout.binary_files), (False, layout.python_files)):
        folders = [name.rpartition("/")[0] for name in members.names if PurePosixPath(name).name == splits["train"][0]]
        if folders and "/" not in (folder := min(folders, key=len)):
            files = _read_members(members, folder)
            return _Batches(layout, root, files, binary, f"{'binary' if binary else 'python'} batches of {root.name}")
    return TrainTestFolders(root, layout.class_names, _forms(layout), IMAGES)


def _forms(layout: Layout) -> str:
    archives = f"{layout.binary.file}, {layout.python.file}, either unpacked or packed anew as zip or tar"
    return f"{archives}, or a folder, zip or tar with train/ and test/ class folders"


def _official(layout: Layout, path: Path) -> _Batches:
    """The batches of an official archive, its checksum compared."""
    binary = check(path, [layout.binary, layout.python]) == layout.binary
    description = f"official {'binary' if binary else 'python'} archive {path.name}"
    return _Batches(layout, path, _read_archive(path), binary, description)


class _Batches(Source):
    """The official batch files, `files` by name, read from `path`."""

    def __init__(self, layout: Layout, path: Path, files: dict[str, bytes], binary: bool, description: str) -> None:
        self._layout, self._binary = layout, binary
        splits = layout.binary_files if binary else layout.python_files
        meta = layout.meta[0 if binary else 1]
        missing = [name for name in (*splits["train"], *splits["test"], meta) if name not in files]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}. Download it again.")
        self.class_names = self._names(files[meta], f"{path}: {meta}")
        self._splits = {
            split: [self._batch(files[name], f"{path}: {name}") for name in names] for split, names in splits.items()
        }
        labels = {split: np.concatenate([part[1] for part in parts]) for split, parts in self._splits.items()}
        self.notes = partial_splits(labels, IMAGES)
        self.description = "; ".join((description, *self.notes))

    def _names(self, meta: bytes, where: str) -> tuple[str, ...]:
        count, key = len(self._layout.class_names), self._layout.names_key
        names = meta.decode("ascii", "replace").split() if self._binary else load_plain(meta, where).get(key, [])
        if not isinstance(names, list) or len(names) != count:
            raise UserError(f"{where} does not name {count} classes. Take the official archive.")
        return tuple(str(name) for name in names)

    def _batch(self, data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Channel-planar pixels (n, 3, 32, 32) and labels (n,) of one batch file."""
        pixels, labels = self._binary_batch(data, where) if self._binary else self._python_batch(data, where)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise UserError(f"{where} has labels {labels.min()}..{labels.max()} for {len(self.class_names)} classes.")
        return pixels.reshape(-1, 3, 32, 32), labels

    def _binary_batch(self, data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        size = self._layout.label_bytes + PIXELS
        if not data or len(data) % size:
            raise UserError(f"{where} has {len(data):,} bytes, no multiple of {size:,}: truncated. Download it again.")
        records = np.frombuffer(data, np.uint8).reshape(-1, size)
        return records[:, -PIXELS:], records[:, self._layout.label_bytes - 1].astype(np.int64)

    def _python_batch(self, data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        batch = load_plain(data, where)
        pixels, labels = batch.get("data"), batch.get(self._layout.label_key)
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
            raise UserError(f"{where} has no 'data' of bytes (n, {PIXELS}). Take the official archive.")
        if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(k) is int for k in labels):
            raise UserError(f"{where} has no '{self._layout.label_key}', one an image. Take the official archive.")
        return pixels, np.array(labels, np.int64)

    def open_split(self, split: str) -> Images:
        pixels, labels = (np.concatenate(part) for part in zip(*self._splits[split], strict=True))
        return ArrayImages(np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels, f"{split} image")


def _read_archive(path: Path) -> dict[str, bytes]:
    """The files of a tar.gz by their names, wherever in it they lie."""
    contents = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None:
                    contents[member.name.rpartition("/")[2]] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is a damaged archive ({error}). Download it again.") from None
    return contents


def _read_members(members: Members, folder: str) -> dict[str, bytes]:
    """The files right inside a folder of a folder, zip or tar, by their names."""
    rows = [i for i, name in enumerate(members.names) if name.rpartition("/")[0] == folder]
    try:
        return {PurePosixPath(members.names[i]).name: members.read(i) for i in rows}
    except UnreadableError as error:
        raise UserError(f"{members.root} is damaged ({error}). Download it again.") from None
