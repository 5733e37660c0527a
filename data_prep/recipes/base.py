"""What to build: a source, and a rule that makes labeled and unlabeled rows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError, unknown
from data_prep.recipes.splits import SELECTIONS, Split, long_tail_counts, parse_gamma, select
from data_prep.sources.images import Images, JoinedImages, Source
from data_prep.sources.resize import Preparation

UNKNOWN = -1  # the label of an image without one
EXCLUDED = -2  # the label of an image that no split takes: unreadable, or of a class that the data set does not have
Opener = Callable[[Path | None, Path], Source]  # given --source and the folder of downloads


@dataclass(frozen=True)
class Plan:
    """What to write: which rows of which images, and which of them are labeled.

    `class_names`: K names; the images' labels are 0..K-1, or negative. `rows["train"]` and `rows["test"]` index into
    `images[...]`, ascending; `labeled`, `unlabeled` and `validation` (None: there is no such set) are positions in
    `rows["train"]`, ascending. `notes` are sentences on what may be a mistake, `facts` others that the user should
    know. `copies`: how many training images are left out as copies of held-out ones.
    """

    class_names: tuple[str, ...]
    images: dict[str, Images]
    rows: dict[str, NDArray[np.int64]]
    labeled: NDArray[np.int64]
    unlabeled: NDArray[np.int64]
    notes: list[str]
    facts: Sequence[str] = ()
    copies: int = 0
    validation: NDArray[np.int64] | None = None

    def labels(self, part: str) -> NDArray[np.int64]:
        """Class of every row of a part, -1 where unknown."""
        return self.images[part].labels[self.rows[part]]


class Recipe(ABC):
    """A data set to build. `options()` and the resolution say all that decides its content, besides the source."""

    dataset: str
    resolution: int
    filter_name: str
    fit: str = "squash"
    exif: str = "stored"
    test_fraction: float | None = None  # of the labeled images, where these give the test images too
    validation_fraction: float | None = None  # of the labeled images, where these give validation images
    chosen_test: ClassVar[bool] = False  # whether the test images are the user's choice, not a published set's

    @property
    def preparation(self) -> Preparation:
        """How its images are made those of the data set; the color of margins is not known before they are read."""
        return Preparation(self.resolution, self.filter_name, self.fit, self.exif)

    @property
    def holds_out(self) -> bool:
        """Whether the test images are drawn from the labeled ones."""
        return self.test_fraction is not None

    @property
    def draws(self) -> bool:
        """Whether test or validation images are drawn from the labeled ones."""
        return self.holds_out or self.validation_fraction is not None

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The choices that make the split, for the manifest; JSON values."""

    @abstractmethod
    def inputs(self) -> dict[str, Path]:
        """Files and folders that the recipe itself names, by option."""

    @abstractmethod
    def source_at_hand(self) -> bool:
        """Whether the source is on this machine without being named: not where it would be downloaded."""

    @abstractmethod
    def folder_name(self) -> str:
        """The default folder's name: the data set with its split."""

    @abstractmethod
    def open(self, source: Path | None, cache: Path) -> Source:
        """Open and check the source. Raises UserError."""

    @abstractmethod
    def images(self, source: Source) -> dict[str, Images]:
        """The collections "train" and "test" that rows index into."""

    @abstractmethod
    def plan(
        self,
        source: Source,
        images: dict[str, Images],
        skip: dict[str, set[int]],
        same: NDArray[np.int64] | None = None,
    ) -> Plan:
        """Rows to write.

        Args:
            skip: indices into each part's collection of the images to leave out.
            same: (n,) for every training image the number of those of its pixels, None while pixels are not known; what
                a recipe that `draws` goes by.

        Raises: UserError.
        """


def usable_labels(images: Images, skipped: set[int]) -> NDArray[np.int64]:
    """The images' labels (n,), those of skipped ones EXCLUDED."""
    labels = images.labels.copy()
    labels[sorted(skipped)] = EXCLUDED
    return labels


def plan_of(
    class_names: tuple[str, ...], images: dict[str, Images], split: Split, skipped: set[int], why: str = ""
) -> Plan:
    """The plan of a split of the training images, with all test images but those `skipped`.

    Args:
        why: the reason why a class may have no test image, for the note.

    Raises: UserError when the split has no unlabeled image.
    """
    if not len(split.unlabeled):
        raise UserError(
            "No unlabeled image is left: --disjoint keeps the labeled ones out, and there are no others. Add some, or "
            "leave out --disjoint."
        )
    labels = usable_labels(images["test"], skipped)
    test = np.flatnonzero(labels != EXCLUDED).astype(np.int64)
    notes = list(split.shortfalls)
    untested = [name for k, name in enumerate(class_names) if not np.any(labels == k)]
    if untested and len(test):
        more = f" and {len(untested) - 5} more" if len(untested) > 5 else ""
        notes.append(f"no test image of class {', '.join(untested[:5])}{more}{why}")
    return Plan(class_names, images, {"train": split.rows, "test": test}, split.labeled, split.unlabeled, notes)


@dataclass(frozen=True)
class LongTail(Recipe):
    """A long-tailed draw from a labeled collection: N_k labeled and M_k unlabeled images of class k.

    Where the collection has an unlabeled split of its own (STL-10), `m1` and `gamma_u` are None: all of that split is
    unlabeled, and, unless `disjoint`, the labeled images are too.

    Args:
        opener: opens the collection, given a --source (None: without one) and the folder of downloads.

    Raises: UserError when a number is out of range.
    """

    dataset: str
    n1: int
    m1: int | None
    gamma_l: str
    gamma_u: str | None
    selection: str = "first"
    seed: int = 0
    disjoint: bool = False
    resolution: int = 32
    filter_name: str = "box"
    suffix: str = ""
    name: str | None = None
    opener: Opener = field(kw_only=True, compare=False)

    def __post_init__(self) -> None:
        if self.n1 < 1:
            raise UserError(f"--n1, the labeled images of the largest class, must be 1 or more, got {self.n1}.")
        if self.m1 is not None and self.m1 < 0:
            raise UserError(f"--m1, the unlabeled images of the largest class, must be 0 or more, got {self.m1}.")
        check_draw(self.selection, self.seed)
        if parse_gamma(self.gamma_l, "--gamma-l").shape:
            raise UserError(
                f"--gamma-l must be a number, 1 or more, got '{self.gamma_l}'. Only --gamma-u may be less or a shape."
            )
        if self.gamma_u is not None:
            parse_gamma(self.gamma_u)
        check_resolution(self.resolution)

    def options(self) -> dict[str, Any]:
        gammas = {
            "gamma_l": str(parse_gamma(self.gamma_l)),
            "gamma_u": None if self.gamma_u is None else str(parse_gamma(self.gamma_u)),
        }
        keys = ("dataset", "n1", "m1", "gamma_l", "gamma_u", "selection", "seed", "disjoint")
        return {key: gammas[key] if key in gammas else getattr(self, key) for key in keys}

    def inputs(self) -> dict[str, Path]:
        return {}

    def source_at_hand(self) -> bool:
        return False

    def folder_name(self) -> str:
        if self.name is not None:
            return self.name
        tail = f"-random-s{self.seed}" if self.selection == "random" else ""
        parts = [f"n{self.n1}", "" if self.m1 is None else f"m{self.m1}", f"l{parse_gamma(self.gamma_l).slug}"]
        parts.append("" if self.gamma_u is None else f"u{parse_gamma(self.gamma_u).slug}")
        name = "-".join([self.dataset, *(part for part in parts if part)])
        return f"{name}{tail}{'-disjoint' if self.disjoint else ''}{self.suffix}"

    def open(self, source: Path | None, cache: Path) -> Source:
        return self.opener(source, cache)

    def images(self, source: Source) -> dict[str, Images]:
        train = source.open_split("train")
        if self.m1 is None:
            train = JoinedImages([train, source.open_split("unlabeled")])
        return {"train": train, "test": source.open_split("test")}

    def plan(
        self,
        source: Source,
        images: dict[str, Images],
        skip: dict[str, set[int]],
        same: NDArray[np.int64] | None = None,
    ) -> Plan:
        names, labels = source.class_names, usable_labels(images["train"], skip["train"])
        labeled = long_tail_counts(self.n1, parse_gamma(self.gamma_l), len(names))
        more = [0] * len(names)
        if self.m1 is not None and self.gamma_u is not None:
            more = long_tail_counts(self.m1, parse_gamma(self.gamma_u), len(names))
        split = select(labels, names, labeled, more, selection=self.selection, seed=self.seed, disjoint=self.disjoint)
        if self.m1 is None:
            split = with_unlabeled(split, np.flatnonzero(labels == UNKNOWN))
        return plan_of(names, images, split, skip["test"])


def with_unlabeled(split: Split, more: NDArray[np.int64]) -> Split:
    """The split with further unlabeled images, given by index, ascending, none of them in it yet."""
    rows = np.union1d(split.rows, more).astype(np.int64)
    labeled, unlabeled = (
        np.searchsorted(rows, part).astype(np.int64)
        for part in (split.rows[split.labeled], np.union1d(split.rows[split.unlabeled], more))
    )
    return Split(rows, labeled, unlabeled, split.shortfalls)


def check_resolution(resolution: int) -> None:
    """Raises UserError unless 4 <= resolution <= 1024."""
    if not 4 <= resolution <= 1024:
        raise UserError(f"--res, the side of the stored images in pixels, must be 4 to 1024, got {resolution}.")


def check_draw(selection: str, seed: int) -> None:
    """Raises UserError for an unknown selection, or a seed that is out of range or without effect."""
    if selection not in SELECTIONS:
        raise unknown("--selection", selection, SELECTIONS)
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed must be 0 or more and below 2^63, got {seed}.")
    if seed and selection == "first":
        raise UserError("--seed has no effect on --selection first, which draws nothing. Add --selection random.")
