"""Recipes that keep a whole collection: the user's own folders, and ImageNet-127."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError, unknown
from data_prep.recipes.base import EXCLUDED, Plan, Recipe, check_draw, check_resolution, plan_of, usable_labels
from data_prep.recipes.splits import Split, class_order, fraction_counts, select
from data_prep.sources.csv_file import CsvSource
from data_prep.sources.folder import FolderSource
from data_prep.sources.imagenet127 import Imagenet127Source, usual_folders
from data_prep.sources.images import Images, JoinedImages, Source, relabeled
from data_prep.sources.resize import EXIF, FILTERS, FITS

SHOWN = 10  # classes of which a sentence says how many images are held out


@dataclass(frozen=True)
class Folder(Recipe):
    """The user's own images: class folders, or those that a CSV file lists. The labeled rows are all labeled images but
    those that `test_fraction` and `validation_fraction` hold out; the unlabeled rows are the unlabeled images and,
    unless `disjoint`, these too.
    """

    resolution: int
    labeled: Path | None = None
    unlabeled: Path | None = None
    test: Path | None = None
    csv: Path | None = None
    test_fraction: float | None = None
    validation_fraction: float | None = None
    seed: int = 0
    disjoint: bool = False
    fit: str = "squash"
    filter_name: str = "box"
    exif: str = "apply"

    dataset: ClassVar[str] = "folder"  # type: ignore[misc]
    chosen_test: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        for option, value, known in (
            ("--fit", self.fit, FITS),
            ("--filter", self.filter_name, FILTERS),
            ("--exif", self.exif, EXIF),
        ):
            if value not in known:
                raise unknown(option, value, known)
        if self.csv is None and (self.labeled is None or self.unlabeled is None):
            raise UserError("A folder data set takes --labeled and --unlabeled, or --csv.")
        if self.csv is not None and (self.labeled or self.test):
            raise UserError("--csv says which images are labeled and which test: leave out --labeled and --test.")
        if self.csv is None and (self.test is None) == (self.test_fraction is None):
            raise UserError(
                "A folder data set takes either --test, folders of test images, or --test-fraction, the share of the "
                "labeled ones to hold out for testing."
            )
        for part, fraction in self.shares.items():
            if not 0 < fraction < 1:
                raise UserError(f"--{part}-fraction must be above 0 and below 1, got {fraction}.")
        if not self.draws and self.seed:
            raise UserError("--seed has no effect without --test-fraction or --validation-fraction, which draw by it.")
        check_draw("random", self.seed)

    @property
    def shares(self) -> dict[str, float]:
        """The share of the labeled images that is held out, by what for."""
        shares = {"test": self.test_fraction, "validation": self.validation_fraction}
        return {part: fraction for part, fraction in shares.items() if fraction is not None}

    def options(self) -> dict[str, Any]:
        given = {"dataset": "folder", "disjoint": self.disjoint}
        given |= {key: getattr(self, key) for key in ("test_fraction", "validation_fraction")}
        draw = {"seed": self.seed} if self.draws else {}
        return {**given, **draw, "fit": self.fit, "filter": self.filter_name, "exif": self.exif}

    def inputs(self) -> dict[str, Path]:
        places = {"csv": self.csv, "labeled": self.labeled, "unlabeled": self.unlabeled, "test": self.test}
        return {option: path for option, path in places.items() if path is not None}

    def source_at_hand(self) -> bool:
        return True

    def folder_name(self) -> str:
        return f"{next(iter(self.inputs().values())).absolute().parent.name or 'folder'}-{self.resolution}"

    def open(self, source: Path | None, cache: Path) -> Source:
        if source is not None:
            raise UserError("A folder data set takes --labeled, --unlabeled and --test, or --csv, not --source.")
        if self.csv is None:
            assert self.labeled is not None
            assert self.unlabeled is not None
            return FolderSource(self.labeled, self.unlabeled, self.test)
        listed = CsvSource(self.csv, self.unlabeled)
        tests = len(listed.open_split("test"))
        if bool(tests) == self.holds_out:
            how = "leave out --test-fraction" if tests else "add --test-fraction 0.2, or give some rows the split test"
            raise UserError(f"{self.csv} lists {tests:,} test images: {how}.")
        if len(listed.validation) and self.validation_fraction is not None:
            raise UserError(
                f"{self.csv} lists {len(listed.validation):,} validation images: leave out --validation-fraction."
            )
        return listed

    def images(self, source: Source) -> dict[str, Images]:
        labeled, unlabeled = source.open_split("train"), source.open_split("unlabeled")
        train = JoinedImages([labeled, unlabeled] if len(unlabeled) else [labeled])
        return {"train": train, "test": labeled if self.holds_out else source.open_split("test")}

    def plan(
        self,
        source: Source,
        images: dict[str, Images],
        skip: dict[str, set[int]],
        same: NDArray[np.int64] | None = None,
    ) -> Plan:
        count, given, names = len(source.open_split("train")), source.open_split("unlabeled"), source.class_names
        labels = usable_labels(images["train"], skip["train"] | (skip["test"] if self.holds_out else set()))
        where = self.labeled or self.csv
        validation = source.validation[labels[source.validation] != EXCLUDED]
        usable = set(np.delete(labels[:count], validation).tolist())
        empty = [name for k, name in enumerate(names) if k not in usable]
        if empty:
            raise UserError(f"Class '{empty[0]}' has no readable labeled image in {where}.")
        why, train = "", labels.copy()
        same = np.arange(len(labels)) if same is None else same
        train[np.isin(same, same[validation])] = EXCLUDED
        distinct = _one_of_each(train[:count], same[:count])
        held = hold_out(images["train"].labels[:count], distinct, names, self.shares, self.seed)
        for chosen in held.values():
            train[np.isin(same, same[chosen])] = EXCLUDED
        validation = held.get("validation", validation)
        left_out = len(held.get("test", ())) + len(validation)
        copies = int(np.sum((train == EXCLUDED) & (labels != EXCLUDED))) - left_out
        if "test" in held:
            tested = np.full(count, EXCLUDED, np.int64)
            tested[held["test"]] = labels[held["test"]]
            images = {**images, "test": relabeled(images["test"], tested)}
            why = ": a class of one labeled image, copies not counted, is trained and not tested"
        train[validation] = labels[validation]
        rows = np.flatnonzero(train != EXCLUDED).astype(np.int64)
        validated = np.isin(rows, validation)
        is_labeled = (rows < count) & ~validated
        if len(given) and (rows < count).all():
            readable = int(np.sum(labels[count:] != EXCLUDED))
            reason = (
                f"{readable:,} can be read, and are copies of held-out images. Add others, or give another --seed."
                if readable
                else "none can be read, and --on-bad-image skip leaves them out. Mend them, or give others."
            )
            raise UserError(
                f"No unlabeled image is left: of the {len(given):,} images in --unlabeled {self.unlabeled or self.csv} "
                f"that are not labeled ones {reason}"
            )
        labeled = np.flatnonzero(is_labeled).astype(np.int64)
        gone = sorted(set(range(len(names))) - set(labels[rows[labeled]].tolist()))
        if gone:
            raise UserError(
                f"Class '{names[gone[0]]}' has no labeled image to train on: all are copies of validation images. "
                "Label others."
            )
        unlabeled = np.flatnonzero(~validated & ~is_labeled if self.disjoint else ~validated).astype(np.int64)
        lacking = [_unvalidated(labels[validation], names)] if len(validation) else []
        plan = plan_of(
            names, images, Split(rows, labeled, unlabeled, [note for note in lacking if note]), skip["test"], why
        )
        return replace(
            plan,
            facts=[
                _held_out_in_words(part, labels[chosen], count - len(source.validation), names)
                for part, chosen in held.items()
            ],
            copies=copies,
            validation=np.flatnonzero(validated).astype(np.int64) if len(validation) else None,
        )


def _one_of_each(labels: NDArray[np.int64], same: NDArray[np.int64]) -> NDArray[np.int64]:
    """The labels (n,), of the usable images with the same number in `same` (n,) all but the first one's EXCLUDED."""
    usable = np.flatnonzero(labels != EXCLUDED)
    first = usable[np.unique(same[usable], return_index=True)[1]]
    distinct = np.full_like(labels, EXCLUDED)
    distinct[first] = labels[first]
    return distinct


def hold_out(
    listed: NDArray[np.int64],
    usable: NDArray[np.int64],
    names: tuple[str, ...],
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    """The labeled images to hold out: a share of each class, rounded half up, at least one where one is left to train
    on; none of a class of one. Test images are drawn alike whether or not there are validation images besides.

    Args:
        listed: (n,) class of every labeled image; the order of a class is drawn from `seed` over all of these, so that
            an image that is left out changes as little as can be of what is drawn.
        usable: (n,) the same with other numbers for the images that are left out, and for copies of others: an image is
            held out, and its share counted, once, and trained with all its copies.
        shares: "test" and "validation", as far as there are such; the first is drawn first.

    Returns: indices, ascending, by the names of `shares`; of no image in common.

    Raises: UserError when a class would keep no label, or no class has an image to spare.
    """
    sizes = np.bincount(usable[usable >= 0], minlength=len(names)).tolist()
    orders = [class_order(listed, k, "random", seed) for k in range(len(names))]
    orders = [order[usable[order] >= 0] for order in orders]
    held, taken = {}, [0] * len(names)
    for part, fraction in shares.items():
        counts = _held_counts(part, fraction, sizes, taken, names)
        spans = zip(orders, taken, counts, strict=True)
        held[part] = np.sort(np.concatenate([order[first : first + n] for order, first, n in spans]))
        taken = [first + n for first, n in zip(taken, counts, strict=True)]
    return held


def _held_counts(
    part: str, fraction: float, sizes: Sequence[int], taken: Sequence[int], names: Sequence[str]
) -> list[int]:
    """How many images of each class to hold out, given how many it has and how many are held out already."""
    counts = []
    for name, wanted, size, others in zip(names, fraction_counts(list(sizes), fraction), sizes, taken, strict=True):
        spare = max(0, size - others - 1)
        if wanted > spare and wanted > 1:
            also = f", and {others:,} are held out already" if others else ""
            raise UserError(
                f"--{part}-fraction {fraction:g} leaves class '{name}' without labels: it would hold out {wanted:,} of "
                f"its {size:,} labeled images, copies not counted{also}. Give a smaller one, or label more."
            )
        counts.append(min(wanted, spare))
    if not any(counts):
        raise UserError(
            f"--{part}-fraction has nothing to hold out: no class has a labeled image to spare, copies not counted. "
            "Label more."
        )
    return counts


PURPOSE = {"test": "testing", "validation": "validation"}


def _held_out_in_words(part: str, labels: NDArray[np.int64], count: int, names: tuple[str, ...]) -> str:
    counts = np.bincount(labels, minlength=len(names)).tolist()
    each = ", ".join(f"{name} {n:,}" for name, n in zip(names[:SHOWN], counts, strict=False))
    more = f", and of {len(names) - SHOWN:,} more classes" if len(names) > SHOWN else ""
    return f"{sum(counts):,} of {count:,} labeled images are held out for {PURPOSE[part]} ({each}{more})"


def _unvalidated(labels: NDArray[np.int64], names: tuple[str, ...]) -> str:
    """A sentence on the classes without validation image, "" where there are none."""
    lacking = [name for k, name in enumerate(names) if not np.any(labels == k)]
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return f"no validation image of class {', '.join(lacking[:5])}{more}" if lacking else ""


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

    def plan(
        self,
        source: Source,
        images: dict[str, Images],
        skip: dict[str, set[int]],
        same: NDArray[np.int64] | None = None,
    ) -> Plan:
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
