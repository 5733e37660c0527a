"""Recipes that keep a whole collection: the user's own folders, and ImageNet-127."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.images import Images, JoinedImages
from data_prep.recipes import EXCLUDED, Recipe, check_draw, check_resolution
from data_prep.sources import Source
from data_prep.splits import Split, fraction_counts, select


@dataclass(frozen=True)
class Folder(Recipe):
    """The user's own images. All of the labeled folder is labeled; the unlabeled rows are those of the unlabeled
    folder and, unless `disjoint`, the labeled ones too."""

    labeled: Path
    unlabeled: Path
    test: Path
    resolution: int
    disjoint: bool = False

    dataset: ClassVar[str] = "folder"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_resolution(self.resolution)

    def options(self) -> dict[str, Any]:
        places = {key: str(getattr(self, key).absolute()) for key in ("labeled", "unlabeled", "test")}
        return {"dataset": "folder", **places, "disjoint": self.disjoint}

    def folder_name(self) -> str:
        return f"{self.labeled.absolute().parent.name or 'folder'}-{self.resolution}"

    def open(self, source: Path | None, cache: Path) -> Source:
        from data_prep.sources.folder import FolderSource

        if source is not None:
            raise UserError("A folder data set takes --labeled, --unlabeled and --test, not --source.")
        return FolderSource(self.labeled, self.unlabeled, self.test)

    def images(self, source: Source) -> dict[str, Images]:
        parts = [part for part in (source.open_split("train"), source.open_split("unlabeled")) if len(part)]
        return {"train": JoinedImages(parts), "test": source.open_split("test")}

    def split(self, source: Source, train: Images, labels: NDArray[np.int64]) -> Split:
        rows = np.flatnonzero(labels != EXCLUDED).astype(np.int64)
        is_labeled = rows < len(source.open_split("train"))
        labeled = np.flatnonzero(is_labeled).astype(np.int64)
        unlabeled = np.flatnonzero(~is_labeled if self.disjoint else np.ones_like(is_labeled)).astype(np.int64)
        empty = [name for k, name in enumerate(source.class_names) if not np.any(labels[rows[labeled]] == k)]
        if empty:
            raise UserError(f"Class '{empty[0]}' has no readable labeled image in {self.labeled}.")
        return Split(rows, labeled, unlabeled, [])


@dataclass(frozen=True)
class Imagenet127(Recipe):
    """A share of each superclass labeled (rounded, at least one image), all training images unlabeled.

    The labeled ones are drawn from `seed` unless `selection` is "first": in file order the first tenth of a superclass
    would be that of its first few ImageNet classes only.
    """

    resolution: int = 64
    labeled_fraction: float = 0.1
    selection: str = "random"
    seed: int = 0
    disjoint: bool = False
    val_labels: Path | None = None
    test_from_train: bool = False
    verify: bool = False

    dataset: ClassVar[str] = "imagenet127"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if not 0 < self.labeled_fraction <= 1:
            raise UserError(f"--labeled-fraction must be above 0 and at most 1, got {self.labeled_fraction}.")
        check_draw(self.selection, self.seed)

    def options(self) -> dict[str, Any]:
        keys = ("dataset", "labeled_fraction", "selection", "seed", "disjoint", "test_from_train")
        return {key: getattr(self, key) for key in keys}

    def folder_name(self) -> str:
        share = "" if self.labeled_fraction == 0.1 else f"-f{self.labeled_fraction:g}"
        draw = "-first" if self.selection == "first" else f"-s{self.seed}" if self.seed else ""
        return f"imagenet127-{self.resolution}{share}{draw}{'-disjoint' if self.disjoint else ''}"

    def open(self, source: Path | None, cache: Path) -> Source:
        from data_prep.sources.imagenet127 import Imagenet127Source

        opened = Imagenet127Source(
            source, cache, self.val_labels, test_from_train=self.test_from_train, verify=self.verify
        )
        if opened.side is not None and opened.side < self.resolution:
            raise UserError(f"This downsampled ImageNet is {opened.side} px, --res {self.resolution} asks for more.")
        return opened

    def split(self, source: Source, train: Images, labels: NDArray[np.int64]) -> Split:
        sizes = [int(np.sum(labels == k)) for k in range(len(source.class_names))]
        labeled = fraction_counts(sizes, self.labeled_fraction)
        rest = [size - n for size, n in zip(sizes, labeled, strict=True)]
        draw = {"selection": self.selection, "seed": self.seed}
        return select(labels, source.class_names, labeled, rest, disjoint=self.disjoint, **draw)  # type: ignore[arg-type]
