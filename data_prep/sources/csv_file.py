"""A CSV file that lists the images, as labeling tools export one: columns path, label and, where wanted, split."""

from __future__ import annotations

import csv
import io
import itertools
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError, unknown
from data_prep.sources.class_folders import list_images, unread
from data_prep.sources.containers import FIELDS, PLAIN, Members, list_members, split_archive_path
from data_prep.sources.folder import identity, open_unlabeled
from data_prep.sources.images import EncodedImages, Images, JoinedImages, Source

COLUMNS, NEEDED = ("path", "label", "split"), {"path", "label"}
SPLITS = ("train", "validation", "test")
ALIASES = {"val": "validation", "valid": "validation"}
PLAIN_FILE = (0, 0, 0, PLAIN)  # what `Members.where` says of a file that is in no archive


class Row(NamedTuple):
    """An image that the file lists, by its path from the file's folder, or from `root`, the archive in which it lies at
    `where`. label "": without one."""

    line: int
    path: str
    label: str
    split: str
    root: Path
    where: tuple[int, ...] = PLAIN_FILE


class CsvSource(Source):
    """The images that a CSV file lists, by paths from its folder or absolute ones, and more unlabeled ones in a tree.

    An image without a label is unlabeled; one of split "test" is a test image, of "validation" one by which the best
    checkpoint is chosen, of "train" or none a training image.
    Classes are the labels of training images, sorted. Columns of other names are not read. An image listed again, by
    links too, counts once. Images are sorted by label, then by path, in whatever order the file has them; after those
    in folders come those in archives (`photos.zip/a.png`), one after the other.
    """

    def __init__(self, file: Path, unlabeled: Path | None) -> None:
        lines = _located(file, list(_read(file)))
        rows = _each_once(file, lines)
        parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": [], "unlabeled": []}
        for row in sorted(rows.values(), key=lambda row: (row.where != PLAIN_FILE, row.root, row.label, row.path)):
            parts[row.split if row.label else "unlabeled"].append(row)
        self.class_names = tuple(sorted({row.label for row in parts["train"]}))
        if len(self.class_names) < 2:
            raise UserError(f"{file} has training images of {len(self.class_names)} labels; at least 2 are needed.")
        for row in (*parts["validation"], *parts["test"]):
            if row.label not in self.class_names:
                wrong = unknown("label", row.label, self.class_names)
                what = f"no training image has the label of this {row.split} image"
                raise UserError(f"{file}, line {row.line}: {what}. {wrong}")
        self._splits: dict[str, Images] = {part: self._images(listed) for part, listed in parts.items()}
        validation = self._splits.pop("validation")
        if len(validation):
            self.validation = len(parts["train"]) + np.arange(len(validation))
            self._splits["train"] = JoinedImages([self._splits["train"], validation])
        again, tree = len(lines) - len(rows), ""
        self.notes = (f"{again:,} lines of {file} list an image again, which counts once",) if again else ()
        if unlabeled is not None:
            listing = list_images(unlabeled)
            more = open_unlabeled(listing, self.class_names, rows.keys())
            self._splits["unlabeled"] = JoinedImages([self._splits["unlabeled"], more])
            self.notes += unread((listing, ""))
            tree = f", unlabeled {unlabeled}"
        self.description = f"images listed in {file}{tree}"

    def _images(self, rows: Sequence[Row]) -> Images:
        ids = {name: k for k, name in enumerate(self.class_names)}
        parts = [
            EncodedImages(_members(listed), np.array([ids.get(row.label, -1) for row in listed], np.int64))
            for listed in ([list(listed) for _, listed in itertools.groupby(rows, lambda row: row.root)] or [[]])
        ]
        return parts[0] if len(parts) == 1 else JoinedImages(parts)

    def open_split(self, split: str) -> Images:
        return self._splits[split]


def _members(rows: Sequence[Row]) -> Members:
    """The files of rows of one root."""
    root = rows[0].root if rows else Path()
    return Members(root, [row.path for row in rows], np.array([row.where for row in rows], FIELDS), inside=None)


def _located(file: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows, of images in archives with their places there. Raises: UserError for one that is not there."""
    archives: dict[Path, dict[str, tuple[int, ...]]] = {}
    located = []
    for row in rows:
        archive, inner = split_archive_path(row.root / row.path)
        if inner and archive not in archives:
            members = list_members(archive)
            archives[archive] = dict(zip(members.names, members.where.tolist(), strict=True))
        if inner and inner not in archives[archive]:
            raise UserError(f"{file}, line {row.line}: {archive} has no file {inner}. Mend the path.")
        located.append(row._replace(root=archive, path=inner, where=archives[archive][inner]) if inner else row)
    return located


def _read(file: Path) -> Iterator[Row]:
    """The rows of a file with commas, semicolons or tabs. Raises UserError."""
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{file} (--csv) must be UTF-8 text. Export or save it as such.") from None
    except OSError as error:
        raise UserError(f"Cannot read --csv {file} ({error.strerror}).") from None
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=header.count), restval="", strict=True)
    try:
        names = [name.strip().lower() for name in reader.fieldnames or []]
        if not set(names) >= NEEDED:
            raise UserError(
                f"{file} must have columns path and label, and may have split; got: {', '.join(names) or 'nothing'}."
            )
        reader.fieldnames = names
        for values in reader:
            yield _row(file, reader.line_num, values)
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: no CSV ({error}).") from None


def _row(file: Path, line: int, values: dict[str | None, str]) -> Row:
    if None in values:
        raise UserError(f"{file}, line {line} has more values than columns. Put a path with commas into quotes.")
    path, label, split = (values.get(column, "").strip() for column in COLUMNS)
    if not path:
        raise UserError(
            f"{file}, line {line}: label '{label}' has no image, path is empty. Fill it, or remove the line."
        )
    if "\0" in path:
        raise UserError(f"{file}, line {line}: the path {path!r} has a NUL byte, which no file name can. Remove it.")
    split = ALIASES.get(split.lower(), split.lower()) or "train"
    if split not in SPLITS:
        raise UserError(f"{file}, line {line}: {unknown('split', split, SPLITS)}")
    if split != "train" and not label:
        raise UserError(f"{file}, line {line}: {split} image {path} has no label. Give it one, or another split.")
    root = file.parent.resolve()  # of a folder behind a link: '..' leads to the same place, however it is read
    if os.path.isabs(path):
        path = os.path.relpath(path, root)
    return Row(line, path, unicodedata.normalize("NFC", label), split, root)


def _each_once(file: Path, rows: Sequence[Row]) -> dict[tuple[object, ...], Row]:
    """The rows by the identity of their files, of several the first with a label.

    Raises: UserError when one image has different labels, or is of two splits.
    """
    first: dict[tuple[object, ...], Row] = {}
    for row in rows:
        known = first.setdefault(which := identity(_members([row]), 0), row)
        for what in ("label", "split") if known.label and row.label else ():
            if getattr(known, what) != getattr(row, what):
                raise UserError(
                    f"{file}: the {what} of {row.path} is '{getattr(known, what)}' in line {known.line} and "
                    f"'{getattr(row, what)}' in line {row.line}. Keep one."
                )
        if row.label and not known.label:
            first[which] = row
    return first
