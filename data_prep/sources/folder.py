"""The user's own images: class folders for labeled and test, any tree for unlabeled."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.class_folders import class_folders, labeled_images, list_images
from data_prep.sources.containers import PLAIN, Members
from data_prep.sources.images import EncodedImages, Images, Source


class FolderSource(Source):
    """Labeled and test images in class folders, unlabeled ones anywhere below a folder.

    Classes are the labeled folder's own, sorted by name. Where every unlabeled image lies in a folder with the name of
    a class, that class is kept as its hidden label, for analysis. An unlabeled file that is one of the labeled files is
    taken once, as labeled. Each of the three may be a folder, a zip, a tar, or a folder inside one (`a.zip/train`).
    """

    def __init__(self, labeled: Path, unlabeled: Path, test: Path) -> None:
        members, inner = list_images(labeled)
        self._labeled, self.class_names = labeled_images(members, inner, None, str(labeled))
        if len(self.class_names) < 2:
            raise UserError(f"{labeled} has one class folder only ('{self.class_names[0]}'); at least 2 are needed.")
        members, inner = list_images(test)
        self._test, _ = labeled_images(members, inner, self.class_names, str(test))
        self._unlabeled = _open_unlabeled(unlabeled, self.class_names, self._labeled.members)
        self.description = f"folders: labeled {labeled}, unlabeled {unlabeled}, test {test}"

    def open_split(self, split: str) -> Images:
        if split == "test":
            return self._test
        return self._labeled if split == "train" else self._unlabeled


def _open_unlabeled(path: Path, class_names: tuple[str, ...], labeled: Members) -> EncodedImages:
    members, inner = list_images(path)
    known = {_identity(labeled, i) for i in range(len(labeled))}
    members = members.take([i for i in range(len(members)) if _identity(members, i) not in known])
    ids = {name: k for k, name in enumerate(class_names)}
    hidden = [ids.get(name, -1) for name in class_folders(members, inner)]
    if -1 in hidden:
        hidden = [-1] * len(hidden)
    return EncodedImages(members, np.array(hidden, np.int64))


def _identity(members: Members, index: int) -> str:
    """The same for two names of one file."""
    path = os.path.join(members.root, members.names[index])
    return os.path.realpath(path) if members.where[index]["kind"] == PLAIN else path
