"""Collections of labeled images: what every source gives and the build reads."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.sources.containers import Members
from data_prep.sources.resize import Preparation, UnreadableError, decode, fitted, orientation, resized, upright


class BadImage(NamedTuple):
    """An unreadable image: position in the block read, name in the source, reason."""

    position: int
    name: str
    reason: str


class Images(ABC):
    """Images of one split, in the data set's own order.

    `labels` (n,) int64: class 0..K-1, or -1 where unknown. `worth_processes`: decoding costs enough to share it
    between processes; such collections pickle small once `take`n apart.
    """

    labels: NDArray[np.int64]
    worth_processes: bool

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Image `index` at its own size, mode RGB. Raises UnreadableError."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call image `index` in messages; unique within the split."""

    @abstractmethod
    def take(self, indices: NDArray[np.int64]) -> Images:
        """The images at `indices`, in that order."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 (hex) that tells this collection from another: names or pixels, and labels.

        Where it lies is no part of it: a collection that was moved is the same one.
        """

    @abstractmethod
    def folders(self) -> list[Path]:
        """Folders whose image files are all read: whatever is added there becomes an image of this collection."""


class Mark(NamedTuple):
    """What there is to say of an image that was read: its position in the block, whether EXIF asks to turn it, whether
    it is smaller than what it is resized to, and, inside margins, its width less its height."""

    position: int
    rotated: bool
    enlarged: bool
    margin: int


def read_images(images: Images, rule: Preparation) -> tuple[NDArray[np.uint8], list[BadImage], list[Mark]]:
    """All images as the rule prepares them, (n, R, R, 3); bad ones stay zero and are listed, and so are the marks of
    those that have any."""
    block = np.zeros((len(images), rule.resolution, rule.resolution, 3), np.uint8)
    bad, marks = [], []
    for index in range(len(images)):
        try:
            image = images.image(index)
            turned = upright(image, rule)
            block[index] = fitted(turned, rule)
        except UnreadableError as error:
            bad.append(BadImage(index, images.name(index), str(error)))
            continue
        width, height = resized(turned.size, rule)
        enlarged = width > turned.width or height > turned.height
        mark = Mark(index, orientation(image) > 1, enlarged, width - height if rule.fit == "pad" else 0)
        marks += [mark] if any(mark[1:]) else []
    return block, bad, marks


class ArrayImages(Images):
    """Images that are pixels already: (n, H, W, 3) uint8, in memory or memory-mapped."""

    worth_processes = False

    def __init__(self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], prefix: str) -> None:
        self.pixels, self.labels, self.prefix = pixels, labels, prefix
        self.numbers = np.arange(len(labels))

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels[index]))

    def name(self, index: int) -> str:
        return f"{self.prefix} {self.numbers[index]}"

    def take(self, indices: NDArray[np.int64]) -> ArrayImages:
        part = ArrayImages(self.pixels[indices], self.labels[indices], self.prefix)
        part.numbers = self.numbers[indices]
        return part

    def digest(self) -> str:
        return _digest(self.prefix, np.ascontiguousarray(self.pixels), self.labels)

    def folders(self) -> list[Path]:
        return []


class EncodedImages(Images):
    """Images as files of any of Pillow's common formats, in folders or inside archives."""

    worth_processes = True

    def __init__(self, members: Members, labels: NDArray[np.int64]) -> None:
        self.members, self.labels = members, labels

    def image(self, index: int) -> Image.Image:
        return decode(self.members.read(index))

    def name(self, index: int) -> str:
        return f"{self.members.root}/{self.members.names[index]}"

    def take(self, indices: NDArray[np.int64]) -> EncodedImages:
        return EncodedImages(self.members.take(indices), self.labels[indices])

    def folders(self) -> list[Path]:
        inside = self.members.inside
        return [] if inside is None or not self.members.root.is_dir() else [self.members.root / inside]

    def digest(self) -> str:
        names = "\0".join(self.members.names).encode("utf-8", "surrogateescape")
        return _digest("files", names, self.labels, self.members.stamps())


class JoinedImages(Images):
    """Several collections, one after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = list(parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.worth_processes = any(part.worth_processes for part in parts)

    def _find(self, index: int) -> tuple[Images, int]:
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[which], index - int(self.starts[which])

    def image(self, index: int) -> Image.Image:
        part, inner = self._find(index)
        return part.image(inner)

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        return part.name(inner)

    def take(self, indices: NDArray[np.int64]) -> Images:
        if np.any(np.diff(indices) < 0):
            raise ValueError("JoinedImages.take needs ascending indices")
        cuts = np.searchsorted(indices, self.starts)
        taken = [
            part.take(indices[low:high] - start)
            for part, start, low, high in zip(self.parts, self.starts[:-1], cuts[:-1], cuts[1:], strict=True)
            if high > low
        ]
        return taken[0] if len(taken) == 1 else JoinedImages(taken)

    def folders(self) -> list[Path]:
        return [folder for part in self.parts for folder in part.folders()]

    def digest(self) -> str:
        return _digest("joined", *(part.digest().encode() for part in self.parts))


class Source(ABC):
    """A raw collection on disk.

    `class_names`: K names in the data set's own class order. `description`: what it is, for the manifest.
    `notes`: what the user should know of it, in one sentence each. `unusable`: by split, images that cannot be used
    whatever they hold: index -> reason. `validation`: images of "train" that are not to be trained on, but to choose
    the best checkpoint by, (n,) int64.
    Opening it checks it: a source that is missing, incomplete or of the wrong checksum raises UserError, which says
    what is missing and where to get it.
    """

    class_names: tuple[str, ...]
    description: str
    notes: tuple[str, ...] = ()
    unusable: Mapping[str, Mapping[int, str]] = MappingProxyType({})
    validation: NDArray[np.int64] = np.zeros(0, np.int64)

    @abstractmethod
    def open_split(self, split: str) -> Images:
        """The images of "train", "test", or, where the collection has one, "unlabeled", in the data set's order."""


def partial(*counts: tuple[str, int, int]) -> tuple[str, ...]:
    """A sentence on what a source lacks, of (what, number there, number in the whole set) each; none when whole."""
    listed = ", ".join(f"{there:,} of {whole:,} {what}" for what, there, whole in counts)
    return (f"a partial source: {listed}",) if any(there < whole for _, there, whole in counts) else ()


def partial_splits(there: Mapping[str, Sized], whole: Mapping[str, int]) -> tuple[str, ...]:
    """`partial` of the images of each split, given those of the whole set."""
    words = {"train": "training"}
    return partial(*((f"{words.get(split, split)} images", len(there[split]), n) for split, n in whole.items()))


def relabeled(images: Images, labels: NDArray[np.int64]) -> Images:
    """The same images with other labels (n,)."""
    other = copy.copy(images)
    other.labels = labels
    return other


def _digest(tag: str, *parts: bytes | NDArray[np.generic]) -> str:
    total = hashlib.sha256(tag.encode("utf-8", "surrogateescape"))
    for part in parts:
        total.update(b"\0")
        total.update(part if isinstance(part, bytes) else part.tobytes())
    return total.hexdigest()
