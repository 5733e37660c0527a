"""What to build: a source, and a rule that makes labeled and unlabeled rows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError, unknown
from data_prep.images import Images, JoinedImages
from data_prep.sources import Source
from data_prep.splits import SELECTIONS, Split, long_tail_counts, parse_gamma, select

EXCLUDED = -2  # stands in for the label of an image that could not be read: no split takes it


@dataclass(frozen=True)
class Plan:
    """What to write: which rows of which images, and which of them are labeled.

    `rows["train"]` and `rows["test"]` index into `images[...]`, ascending; `labeled` and `unlabeled` are positions in
    `rows["train"]`, ascending.
    """

    images: dict[str, Images]
    rows: dict[str, NDArray[np.int64]]
    labeled: NDArray[np.int64]
    unlabeled: NDArray[np.int64]
    notes: list[str]

    def labels(self, part: str) -> NDArray[np.int64]:
        """Class of every row of a part, -1 where unknown."""
        return self.images[part].labels[self.rows[part]]


class Recipe(ABC):
    """A data set to build. `options()` says all that decides its content, besides the source."""

    dataset: str
    resolution: int
    filter_name: str = "box"

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The choices that make the split, for the manifest; JSON values."""

    @abstractmethod
    def folder_name(self) -> str:
        """The default folder's name: the data set with its split."""

    @abstractmethod
    def open(self, source: Path | None, cache: Path) -> Source:
        """Open and check the source. Raises UserError."""

    @abstractmethod
    def split(self, source: Source, train: Images, labels: NDArray[np.int64]) -> Split:
        """Choose rows; `labels` are the train images' with unreadable ones marked EXCLUDED."""

    def images(self, source: Source) -> dict[str, Images]:
        """The collections that rows index into."""
        return {"train": source.open_split("train"), "test": source.open_split("test")}

    def plan(self, source: Source, images: dict[str, Images], skip: dict[str, set[int]]) -> Plan:
        """Rows to write, without the images `skip`ped (indices into each part's collection)."""
        labels = images["train"].labels.copy()
        labels[sorted(skip["train"])] = EXCLUDED
        split = self.split(source, images["train"], labels)
        test = np.setdiff1d(np.arange(len(images["test"])), sorted(skip["test"])).astype(np.int64)
        return Plan(images, {"train": split.rows, "test": test}, split.labeled, split.unlabeled, split.shortfalls)


@dataclass(frozen=True)
class LongTail(Recipe):
    """A long-tailed draw from a labeled collection: N_k labeled and M_k unlabeled images of class k.

    Raises: UserError when a number is out of range.
    """

    dataset: str
    n1: int
    m1: int
    gamma_l: str
    gamma_u: str
    selection: str = "first"
    seed: int = 0
    disjoint: bool = False
    resolution: int = 32
    name: str | None = None

    def __post_init__(self) -> None:
        if self.n1 < 1:
            raise UserError(f"--n1, the labeled images of the largest class, must be 1 or more, got {self.n1}.")
        if self.m1 < 0:
            raise UserError(f"--m1, the unlabeled images of the largest class, must be 0 or more, got {self.m1}.")
        if self.selection not in SELECTIONS:
            raise unknown("--selection", self.selection, SELECTIONS)
        if self.seed < 0:
            raise UserError(f"--seed must be 0 or more, got {self.seed}.")
        if self.seed and self.selection == "first":
            raise UserError("--seed has no effect on --selection first, which draws nothing. Add --selection random.")
        if parse_gamma(self.gamma_l, "--gamma-l").reverse:
            raise UserError(f"--gamma-l must be 1 or more, got '{self.gamma_l}'. Only --gamma-u may be reversed.")
        parse_gamma(self.gamma_u)

    def options(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "n1": self.n1,
            "m1": self.m1,
            "gamma_l": str(parse_gamma(self.gamma_l)),
            "gamma_u": str(parse_gamma(self.gamma_u)),
            "selection": self.selection,
            "seed": self.seed,
            "disjoint": self.disjoint,
        }

    def folder_name(self) -> str:
        if self.name is not None:
            return self.name
        tail = f"-random-s{self.seed}" if self.selection == "random" else ""
        gammas = f"l{parse_gamma(self.gamma_l).slug}-u{parse_gamma(self.gamma_u).slug}"
        return f"{self.dataset}-n{self.n1}-m{self.m1}-{gammas}{tail}{'-disjoint' if self.disjoint else ''}"

    def open(self, source: Path | None, cache: Path) -> Source:
        from data_prep.catalog import open_source

        return open_source(self.dataset, source, cache)

    def split(self, source: Source, train: Images, labels: NDArray[np.int64]) -> Split:
        classes = len(source.class_names)
        counts = [
            long_tail_counts(first, parse_gamma(gamma), classes)
            for first, gamma in ((self.n1, self.gamma_l), (self.m1, self.gamma_u))
        ]
        return select(
            labels, source.class_names, *counts, selection=self.selection, seed=self.seed, disjoint=self.disjoint
        )


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


def check_resolution(resolution: int) -> None:
    """Raises UserError unless 4 <= resolution <= 1024."""
    if not 4 <= resolution <= 1024:
        raise UserError(f"--res, the side of the stored images in pixels, must be 4 to 1024, got {resolution}.")
