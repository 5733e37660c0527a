"""Recipes that keep a whole collection: the user's own folders, and ImageNet-127."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.recipes.base import EXCLUDED, Plan, Recipe, check_draw, check_resolution, plan_of, usable_labels
from data_prep.recipes.splits import Split, fraction_counts, select
from data_prep.sources.folder import FolderSource
from data_prep.sources.imagenet127 import Imagenet127Source, usual_folders
from data_prep.sources.images import Images, JoinedImages, Source, relabeled


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
    chosen_test: ClassVar[bool] = True
    filter_name: ClassVar[str] = "box"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_resolution(self.resolution)

    def options(self) -> dict[str, Any]:
        return {"dataset": "folder", "disjoint": self.disjoint}

    def inputs(self) -> dict[str, Path]:
        return {"labeled": self.labeled, "unlabeled": self.unlabeled, "test": self.test}

    def source_at_hand(self) -> bool:
        return True

    def folder_name(self) -> str:
        return f"{self.labeled.absolute().parent.name or 'folder'}-{self.resolution}"

    def open(self, source: Path | None, cache: Path) -> Source:
        if source is not None:
            raise UserError("A folder data set takes --labeled, --unlabeled and --test, not --source.")
        return FolderSource(self.labeled, self.unlabeled, self.test)

    def images(self, source: Source) -> dict[str, Images]:
        parts = [part for part in (source.open_split("train"), source.open_split("unlabeled")) if len(part)]
        return {"train": JoinedImages(parts), "test": source.open_split("test")}

    def plan(self, source: Source, images: dict[str, Images], skip: dict[str, set[int]]) -> Plan:
        labels = usable_labels(images["train"], skip["train"])
        rows = np.flatnonzero(labels != EXCLUDED).astype(np.int64)
        given, is_labeled = source.open_split("unlabeled"), rows < len(source.open_split("train"))
        if len(given) and is_labeled.all():
            raise UserError(
                f"No unlabeled image is left: none of the {len(given):,} images in --unlabeled {self.unlabeled} that "
                "are not labeled ones can be read, and --on-bad-image skip leaves them out. Mend them, or give another "
                "--unlabeled."
            )
        labeled = np.flatnonzero(is_labeled).astype(np.int64)
        unlabeled = np.flatnonzero(~is_labeled if self.disjoint else np.ones_like(is_labeled)).astype(np.int64)
        empty = [name for k, name in enumerate(source.class_names) if not np.any(labels[rows[labeled]] == k)]
        if empty:
            raise UserError(f"Class '{empty[0]}' has no readable labeled image in {self.labeled}.")
        return plan_of(source.class_names, images, Split(rows, labeled, unlabeled, []), skip["test"])


@dataclass(frozen=True)
class Imagenet127(Recipe):
    """A share of each superclass labeled (rounded, at least one image), all training images unlabeled.

    Classes are the superclasses with training images, ordered by their number of usable ones, largest first (then by
    wnid).

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
    filter_name: ClassVar[str] = "box"  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        if not 0 < self.labeled_fraction <= 1:
            raise UserError(f"--labeled-fraction must be above 0 and at most 1, got {self.labeled_fraction}.")
        check_draw(self.selection, self.seed)

    def options(self) -> dict[str, Any]:
        keys = ("dataset", "labeled_fraction", "selection", "seed", "disjoint", "test_from_train")
        return {key: getattr(self, key) for key in keys}

    def inputs(self) -> dict[str, Path]:
        return {} if self.val_labels is None else {"val_labels": self.val_labels}

    def folder_name(self) -> str:
        share = (
            "" if self.labeled_fraction == 0.1 else f"-f{np.format_float_positional(self.labeled_fraction, trim='-')}"
        )
        draw = "-first" if self.selection == "first" else f"-s{self.seed}" if self.seed else ""
        return f"imagenet127-{self.resolution}{share}{draw}{'-disjoint' if self.disjoint else ''}"

    def source_at_hand(self) -> bool:
        return any(folder.exists() for folder in usual_folders())

    def open(self, source: Path | None, cache: Path) -> Source:
        opened = Imagenet127Source(
            source, cache, self.val_labels, test_from_train=self.test_from_train, verify=self.verify
        )
        if opened.side is not None and opened.side < self.resolution:
            raise UserError(f"This downsampled ImageNet is {opened.side} px, --res {self.resolution} asks for more.")
        return opened

    def images(self, source: Source) -> dict[str, Images]:
        return {part: source.open_split(part) for part in ("train", "test")}

    def plan(self, source: Source, images: dict[str, Images], skip: dict[str, set[int]]) -> Plan:
        order = _classes_by_size(source.class_names, images["train"], skip["train"])
        ranks = np.full(len(source.class_names) + 1, EXCLUDED, np.int64)  # the last entry: of images of no class
        ranks[order] = np.arange(len(order))
        names = tuple(source.class_names[k] for k in order)
        images = {part: relabeled(listed, ranks[np.maximum(listed.labels, -1)]) for part, listed in images.items()}
        labels = usable_labels(images["train"], skip["train"])
        sizes = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
        labeled = fraction_counts(sizes, self.labeled_fraction)
        rest = [size - n for size, n in zip(sizes, labeled, strict=True)]
        split = select(labels, names, labeled, rest, selection=self.selection, seed=self.seed, disjoint=self.disjoint)
        return plan_of(names, images, split, skip["test"])


def _classes_by_size(names: tuple[str, ...], images: Images, skipped: set[int]) -> list[int]:
    """The classes with images, those with the most usable ones first.

    Raises: UserError for a class of which no image is usable, or fewer than 2 classes.
    """
    listed, usable = (
        np.bincount(labels[labels >= 0], minlength=len(names))
        for labels in (images.labels, usable_labels(images, skipped))
    )
    emptied = np.flatnonzero((listed > 0) & (usable == 0))
    if len(emptied):
        raise UserError(
            f"Superclass '{names[emptied[0]]}' has no usable training image: all {listed[emptied[0]]:,} of it are "
            "unreadable. Mend some, or take its folders out of the source."
        )
    order = [int(k) for k in np.argsort(-usable, kind="stable") if usable[k]]
    if len(order) < 2:
        raise UserError(f"The source has training images of {len(order)} superclass; at least 2 are needed.")
    return order
