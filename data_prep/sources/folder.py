"""The user's own images: class folders for labeled and test, any tree for unlabeled."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.class_folders import Listing, class_folders, labeled_images, list_images, unread
from data_prep.sources.containers import LEAVING, LINK, PLAIN, Members
from data_prep.sources.images import EncodedImages, Images, Source


class FolderSource(Source):
    """Labeled and test images in class folders, unlabeled ones anywhere below a folder. Without `test` no test images.

    Classes are the labeled folder's own, sorted by name. Where every unlabeled image lies in a folder with the name of
    a class, that class is kept as its hidden label, for analysis. A labeled or unlabeled file that is there twice, by
    links of either kind, is taken once, and an unlabeled one not at all when it is a labeled one. Each of the three may
    be a folder, a zip, a tar, or a folder inside one (`a.zip/train`).
    """

    def __init__(self, labeled: Path, unlabeled: Path, test: Path | None) -> None:
        listings = {path: list_images(path) for path in (labeled, unlabeled, test) if path is not None}
        classes = (listings[labeled], listings[labeled].inner)
        named, self.class_names = labeled_images(*classes, None, str(labeled))
        if len(self.class_names) < 2:
            raise UserError(f"{labeled} has one class folder only ('{self.class_names[0]}'); at least 2 are needed.")
        self._labeled, notes = _each_once(named)
        self._test = self._labeled.take(np.zeros(0, np.int64))
        if test is not None:
            self._test, _ = labeled_images(listings[test], listings[test].inner, self.class_names, str(test))
        known = {identity(self._labeled.members, i) for i in range(len(self._labeled))}
        self._unlabeled = open_unlabeled(listings[unlabeled], self.class_names, known)
        self.notes = (*notes, *unread(*((listing, "") for listing in listings.values())))
        held_out = "" if test is None else f", test {test}"
        self.description = f"folders: labeled {labeled}, unlabeled {unlabeled}{held_out}"

    def open_split(self, split: str) -> Images:
        if split == "test":
            return self._test
        return self._labeled if split == "train" else self._unlabeled


def _each_once(images: EncodedImages) -> tuple[EncodedImages, tuple[str, ...]]:
    """The labeled images without further names of the same files, and a sentence on these names where there are some.

    Raises: UserError when one file lies in two classes.
    """
    first: dict[tuple[object, ...], int] = {}
    links = []
    for i in range(len(images)):
        known = first.setdefault(identity(images.members, i), i)
        if images.labels[known] != images.labels[i]:
            raise UserError(
                f"{images.name(known)} and {images.name(i)} are links to one file, which cannot be of two classes. "
                "Remove one of them."
            )
        if known != i:
            links.append(f"{images.name(i)} is {images.name(known)}")
    if not links:
        return images, ()
    note = f"{len(links):,} labeled images are links to other labeled ones and count once ({links[0]}"
    return images.take(np.array(list(first.values()))), (f"{note}{', ...' if len(links) > 1 else ''})",)


def open_unlabeled(
    listing: Listing, class_names: tuple[str, ...], known: Collection[tuple[object, ...]]
) -> EncodedImages:
    """The images of a tree, each file once, without those of a `known` identity; with hidden labels where all of them
    lie in a folder with the name of a class."""
    first = {identity(listing.images, i): i for i in reversed(range(len(listing.images)))}
    members = listing.images.take(sorted(row for file, row in first.items() if file not in known))
    ids = {name: k for k, name in enumerate(class_names)}
    hidden = [ids.get(name, -1) for name in class_folders(members.names, listing.inner)]
    if -1 in hidden:
        hidden = [-1] * len(hidden)
    return EncodedImages(members, np.array(hidden, np.int64))


def identity(members: Members, index: int) -> tuple[object, ...]:
    """The same for two names of one file."""
    path = os.path.join(members.root, members.names[index])
    kind = members.where[index]["kind"]
    try:
        status = os.stat(path if kind == PLAIN else members.root)
    except OSError:  # a link to nowhere, to be named when it is read
        return (path,)
    return (path,) if kind in (LEAVING, LINK) else (status.st_dev, status.st_ino, members.where[index].item())
