"""ImageNet-127: the 1,000 classes of ILSVRC2012 in 127 superclasses, from any form in which people have ImageNet."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.sources.downsampled import find_batches, open_batches
from data_prep.sources.ilsvrc import STRANGE, TRAIN_TAR, open_folders, open_tars, verify_tars
from data_prep.sources.images import Images, Source, partial, relabeled

TABLE = Path(__file__).with_name("imagenet127_classes.csv")
TRAIN_IMAGES, VAL_IMAGES, CLASSES, SUPERCLASSES = 1_281_167, 50_000, 1000, 127
FOLDERS = ("data/imagenet", "data/ILSVRC2012", "data/raw/imagenet", "~/data/imagenet", "~/imagenet", "/data/imagenet")
VARIABLES = ("IMAGENET_DIR", "IMAGENET_ROOT", "IMAGENET")


class ClassTable(NamedTuple):
    """`wnids`: wnid -> class 0..999, by sorted wnid. `superclass` (1000,): index into `names`, 127 superclasses.
    `downsampled`: the class of each of downsampled ImageNet's own labels 1..1000."""

    wnids: dict[str, int]
    superclass: NDArray[np.int64]
    names: list[str]
    downsampled: list[int]


def read_table() -> ClassTable:
    """The facts in imagenet127_classes.csv. Superclasses are numbered by their wnids, sorted."""
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["wnid"])
    supers = sorted({(row["superclass_wnid"], row["superclass"]) for row in rows})
    ids = {wnid: k for k, (wnid, _) in enumerate(supers)}
    downsampled = sorted(range(len(rows)), key=lambda k: int(rows[k]["downsampled_label"]))
    superclass = np.array([ids[row["superclass_wnid"]] for row in rows], np.int64)
    wnids = {row["wnid"]: k for k, row in enumerate(rows)}
    return ClassTable(wnids, superclass, [name for _, name in supers], downsampled)


class Imagenet127Source(Source):
    """All 127 superclasses, by their wnids; an image of none of ILSVRC2012's classes is labeled STRANGE, and unusable.

    `side`: of downsampled images, in pixels; None where they have sizes of their own.

    Args:
        root: where ImageNet lies; None looks into the usual folders.
        val_labels: labels of a flat val/, None to look for them.
        test_from_train: where there is no val at all, take the training images as the test set.
        verify: compare the official tars' checksums first.
    """

    def __init__(
        self, root: Path | None, cache: Path, val_labels: Path | None, *, test_from_train: bool, verify: bool
    ) -> None:
        root = locate(root)
        table = read_table()
        fine, self.side, description, notes = _open(root, table, cache, val_labels, verify=verify)
        if np.all(fine["train"].labels == STRANGE):
            raise UserError(
                f"None of the {len(fine['train']):,} training images of {root} is of a class of ILSVRC2012. Their "
                "folders are named by wnids, such as n01440764; other images are what `build.py folder` is for."
            )
        lacks = _partial(fine)
        if "test" not in fine:
            if not test_from_train:
                raise UserError(
                    f"{root} has no val images, so there is nothing to test on. Add val/, or, to try things out, take "
                    "the training images as the test set too with --test-from-train."
                )
            fine["test"] = fine["train"]
        elif test_from_train:
            raise UserError(f"{root} has val images to test on; --test-from-train is for sources without.")
        self._fine = fine
        self._coarse = np.append(table.superclass, STRANGE)  # where STRANGE, -1, points to
        self.class_names = tuple(table.names)
        self.unusable = {split: _strange(images.labels) for split, images in fine.items()}
        self.notes = (*lacks, *_missing(table, fine["train"].labels, fine["test"].labels), *notes)
        self.description = "; ".join((description, *lacks))

    def open_split(self, split: str) -> Images:
        return relabeled(self._fine[split], self._coarse[self._fine[split].labels])


def _strange(labels: NDArray[np.int64]) -> dict[int, str]:
    """The images of classes that are none of ILSVRC2012's: index -> reason."""
    return {int(i): "its class is none of ILSVRC2012's 1,000" for i in np.flatnonzero(labels == STRANGE)}


def _open(
    root: Path, table: ClassTable, cache: Path, val_labels: Path | None, *, verify: bool
) -> tuple[dict[str, Images], int | None, str, tuple[str, ...]]:
    """The images by split with labels 0..999 (STRANGE where unknown), their side if downsampled, what the source is,
    and what to say of it."""
    tars = root.parent if root.name == TRAIN_TAR.file else root
    if (tars / TRAIN_TAR.file).is_file():
        if verify:
            verify_tars(tars)
        opened = open_tars(tars, table.wnids, val_labels)
        return dict(opened.splits), None, "official ILSVRC2012 tars", opened.notes
    if verify:
        raise UserError(f"--verify checks the official tars; {root} has no {TRAIN_TAR.file}.")
    batches = find_batches(root)
    if batches is not None:
        if val_labels is not None:
            raise UserError("--val-labels has no effect on downsampled ImageNet, whose batches hold their labels.")
        fine, side = open_batches(batches, table.downsampled, cache)
        return fine, side, f"downsampled ImageNet, {len(batches.train)} training batches", ()
    opened = open_folders(root, table.wnids, val_labels)
    return dict(opened.splits), None, f"ILSVRC2012 class folders of {root.name}", opened.notes


def locate(root: Path | None) -> Path:
    """The given folder or archive if it exists, else the first usual folder. Raises UserError that names them all."""
    if root is not None:
        if not root.exists():
            raise UserError(f"No such file or folder: {root} (--source).")
        return root
    for folder in usual_folders():
        if folder.exists():
            return folder
        variable = next((name for name in VARIABLES if Path(os.environ.get(name, "")) == folder), None)
        if variable:
            raise UserError(f"No such file or folder: {folder} (${variable}). Mend the variable, or give --source.")
    names = [f"${name}" for name in VARIABLES] + list(FOLDERS)
    raise UserError(
        f"ImageNet cannot be downloaded freely, and is in none of {', '.join(names)}. Get ILSVRC2012 or downsampled "
        "ImageNet from https://image-net.org and say where it is with --source."
    )


def usual_folders() -> Iterator[Path]:
    """Where ImageNet is looked for, in this order."""
    yield from (Path(os.environ[name]) for name in VARIABLES if os.environ.get(name))
    yield from (Path(folder).expanduser() for folder in FOLDERS)


def _partial(fine: dict[str, Images]) -> tuple[str, ...]:
    """A sentence on the images and classes that a partial source lacks; of val images only where there are any."""
    classes = len(np.unique(fine["train"].labels[fine["train"].labels != STRANGE]))
    counts = [("training images", len(fine["train"]), TRAIN_IMAGES)]
    counts += [("val images", len(fine["test"]), VAL_IMAGES)] if "test" in fine else []
    return partial(*counts, ("classes", classes, CLASSES))


def _missing(table: ClassTable, fine: NDArray[np.int64], test: NDArray[np.int64]) -> Iterator[str]:
    """What superclasses of a partial source lack, in one sentence each."""
    present = set(table.superclass[fine[fine != STRANGE]].tolist())
    absent = [name for k, name in enumerate(table.names) if k not in present]
    if absent:
        yield f"{len(absent)} of {SUPERCLASSES} superclasses have no training image and are left out: {_first(absent)}"
    tested = set(table.superclass[test[test != STRANGE]].tolist())
    untested = [table.names[k] for k in sorted(present - tested)]
    if untested:
        yield f"{len(untested)} of the {len(present)} superclasses have no val image to test on: {_first(untested)}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
