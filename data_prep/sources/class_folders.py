"""Class folders: `train/<class>/*.jpg` in a folder, a zip or a tar; the form most image collections come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import UserError, unknown
from data_prep.files import is_text
from data_prep.sources.containers import Members, is_image_name, list_members, split_archive_path, under
from data_prep.sources.images import EncodedImages, Images, Source


def list_images(path: Path) -> tuple[Members, str]:
    """The image files under `path`, a folder, an archive, or a folder inside an archive (`photos.zip/train`).

    Returns: (members, inner folder whose names lead every member's name, "" when none).
    """
    root, inner = split_archive_path(path)
    members = under(list_members(root), inner)
    images = members.take([i for i, name in enumerate(members.names) if is_image_name(name[len(inner) :].lstrip("/"))])
    if not len(images):
        others = f"{len(members):,} other files" if len(members) else "nothing"
        raise UserError(f"No images in {path} (found {others}). Expected .jpg, .png or the like, by folder of class.")
    return images, inner


def split_folders(members: Members, train: Sequence[str], test: Sequence[str]) -> tuple[str | None, str | None]:
    """The folders of the training and the test split inside `members`, None where there is none.

    Of the folders so named at the top or up to three levels below it, the two of one parent that lie highest are taken;
    without such a pair, the highest of each. So a class that is called "train", as one of CIFAR-100 is, is none. Among
    equals the earlier of the names decides.
    """
    folders = sorted(_folders_named({*train, *test}, members), key=lambda folder: (folder.count("/"), folder))
    candidates = [[f for name in names for f in folders if f.rpartition("/")[2] == name] for names in (train, test)]
    pairs = [(a, b) for a in candidates[0] for b in candidates[1] if a.rpartition("/")[0] == b.rpartition("/")[0]]
    if pairs:
        return min(pairs, key=lambda pair: pair[0].count("/"))
    first, second = (min(named, key=lambda folder: folder.count("/"), default=None) for named in candidates)
    return first, second


def _folders_named(names: set[str], members: Members) -> set[str]:
    """Folders of these names that hold files, at most three folders deep."""
    folders: set[str] = set()
    for member in members.names:
        parts = member.split("/")
        folders.update("/".join(parts[: depth + 1]) for depth, part in enumerate(parts[:-1][:4]) if part in names)
    return folders


def labeled_images(
    members: Members, folder: str, class_names: Sequence[str] | None, where: str
) -> tuple[EncodedImages, tuple[str, ...]]:
    """The images of `folder` with the class given by the next folder's name, sorted by class, then by name.

    Args:
        members: image files.
        class_names: the classes in order; None takes the folders' own names, sorted.
        where: what to call the folder in messages.

    Returns: (images, class names in order).

    Raises: UserError when an image lies outside of a class folder, or in one of a class that is not known.
    """
    inside = under(members, folder)
    folder_names = class_folders(inside, folder)
    loose = next((name for name, label in zip(inside.names, folder_names, strict=True) if not label), None)
    if loose is not None:
        raise UserError(f"{where} has images outside of class folders ({loose}). Put each into a folder of its class.")
    known = tuple(class_names) if class_names is not None else tuple(sorted(set(folder_names)))
    unnamed = [name for name in known if not is_text(name)]
    if unnamed:
        raise UserError(f"{where}: a class folder's name must be valid UTF-8, got {unnamed[0]!a}. Rename it.")
    ids = {name: k for k, name in enumerate(known)}
    strange = sorted(set(folder_names) - set(known))
    if strange:
        raise UserError(f"{where}: {unknown('class folder', strange[0], known)}")
    labels = np.array([ids[name] for name in folder_names], np.int64)
    order = np.argsort(labels, kind="stable")  # members are sorted by name already
    return EncodedImages(inside.take(order), labels[order]), known


def class_folders(members: Members, folder: str) -> list[str]:
    """For each member, the name of the folder right below `folder` in which it lies, "" when in none."""
    depth = folder.count("/") + 1 if folder else 0
    return [parts[depth] if len(parts := name.split("/")) > depth + 1 else "" for name in members.names]


class TrainTestFolders(Source):
    """`train/<class>/*` and `test/<class>/*` (or val/) in a folder or archive.

    Sorted names are taken as the data set's own order within a class.

    Args:
        root: the folder or archive; the two folders lie at its top or up to three levels down.
        class_names: the classes in order.
        forms: what the data set may be given as, for messages.
    """

    def __init__(self, root: Path, class_names: Sequence[str], forms: str) -> None:
        members, _ = list_images(root)
        train, test = split_folders(members, ("train",), ("test", "val"))
        if train is None or test is None:
            missing = [f"{split}/" for split, folder in (("train", train), ("test", test)) if folder is None]
            raise UserError(f"{root} has no {' and no '.join(missing)} of class folders. --source takes {forms}.")
        self._train, self.class_names = labeled_images(members, train, class_names, f"{root}/{train}")
        self._test, _ = labeled_images(members, test, self.class_names, f"{root}/{test}")
        self.description = f"class folders of {root.name}"

    def open_split(self, split: str) -> Images:
        return self._train if split == "train" else self._test
