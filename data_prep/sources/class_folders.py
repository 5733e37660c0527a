"""Class folders: `train/<class>/*.jpg` in a folder, a zip or a tar; the form most image collections come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.containers import Members, is_image_name, list_members, split_archive_path, under
from data_prep.errors import UserError, unknown
from data_prep.images import EncodedImages, Images
from data_prep.sources import Source


def list_images(path: Path) -> tuple[Members, str]:
    """The image files under `path`, a folder, an archive, or a folder inside an archive (`photos.zip/train`).

    Returns: (members, inner folder whose names lead every member's name, "" when none).
    """
    root, inner = split_archive_path(path)
    members = under(list_members(root), inner)
    images = members.take([i for i, name in enumerate(members.names) if is_image_name(name[len(inner) :].lstrip("/"))])
    if not len(images):
        found = f"{len(members):,} other files" if len(members) else "nothing"
        raise UserError(f"No images in {path} (found {found}). Expected .jpg, .png or the like, by folder of class.")
    return images, inner


def split_folder(members: Members, names: Sequence[str]) -> str | None:
    """The folder of a split inside `members`: the first of `names` found at the top or up to three levels below it."""
    for name in names:
        for member in members.names:
            parts = member.split("/")
            if name in parts[:4] and len(parts) > parts.index(name) + 1:
                return "/".join(parts[: parts.index(name) + 1])
    return None


def labeled_images(
    members: Members, folder: str, class_names: Sequence[str] | None, where: str
) -> tuple[EncodedImages, tuple[str, ...]]:
    """The images of `folder` with the class given by the next folder's name, sorted by class, then by name.

    Args:
        members: image files.
        class_names: the classes in order; None takes the folders' own names, sorted.
        where: what to call the place in messages.

    Returns: (images, class names in order).

    Raises: UserError when an image lies outside of a class folder, or in one of a class that is not known.
    """
    inside = under(members, folder)
    own = class_folders(inside, folder)
    loose = next((name for name, label in zip(inside.names, own, strict=True) if not label), None)
    if loose is not None:
        raise UserError(f"{where} has images outside of class folders ({loose}). Put each into a folder of its class.")
    known = tuple(class_names) if class_names is not None else tuple(sorted(set(own)))
    ids = {name: k for k, name in enumerate(known)}
    strange = sorted(set(own) - set(known))
    if strange:
        raise UserError(f"{where}: {unknown('class folder', strange[0], known)}")
    labels = np.array([ids[name] for name in own], np.int64)
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
        root: the folder or archive; the two folders lie at its top or one level down.
        class_names: the classes in order; None takes the folders' own names, sorted.
        forms: what the data set may be given as, for messages.
    """

    SPLITS: ClassVar = {"train": ("train",), "test": ("test", "val")}

    def __init__(self, root: Path, class_names: Sequence[str] | None, forms: str) -> None:
        members, _ = list_images(root)
        folders = {split: split_folder(members, names) for split, names in self.SPLITS.items()}
        missing = [f"{split}/" for split, folder in folders.items() if folder is None]
        if missing:
            raise UserError(f"{root} has no {' and no '.join(missing)} of class folders. --source takes {forms}.")
        train, test = (str(folders[split]) for split in ("train", "test"))
        self._train, self.class_names = labeled_images(members, train, class_names, f"{root}/{train}")
        self._test, _ = labeled_images(members, test, self.class_names, f"{root}/{test}")
        self.description = f"class folders of {root.name}"

    def open_split(self, split: str) -> Images:
        return self._train if split == "train" else self._test
