"""Class folders: `train/<class>/*.jpg` in a folder, a zip or a tar; the form most image collections come in."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError, unknown
from data_prep.files import is_text
from data_prep.sources.containers import (
    Members,
    is_hidden,
    is_image_name,
    leaves,
    list_members,
    split_archive_path,
    suffix_of,
    under,
)
from data_prep.sources.images import EncodedImages, Images, Source, partial_splits
from data_prep.sources.resize import HEIF_SUFFIXES, SUFFIXES

ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's classes of val/images: lines of image, wnid and a box


class Listing(NamedTuple):
    """What lies under a path: its image files, its other files that are not hidden, and `inner`, the folder ("" for
    none) whose name leads all their names. `others.folders` are all folders there, empty ones too."""

    images: Members
    others: Members
    inner: str


def list_images(path: Path) -> Listing:
    """The files under `path`, a folder, an archive, or a folder inside an archive (`photos.zip/train`). Of an archive
    that packs its folders in one, `inner` is that one.

    Raises: UserError when no image is among them.
    """
    root, inner = split_archive_path(path)
    members = under(list_members(root), inner)
    kinds: dict[bool, list[int]] = {True: [], False: []}
    for i, name in enumerate(members.names):
        below = name[len(inner) :].lstrip("/")
        if not is_hidden(below):
            kinds[is_image_name(below)].append(i)
    images, others = members.take(kinds[True]), members.take(kinds[False])
    others.folders = members.folders
    if not len(images):
        found = f"{len(others):,} other files: {_by_ending(_endings(others.names))}" if len(others) else "nothing"
        raise UserError(f"No images in {path} (found {found}). Expected .jpg, .png or the like, by folder of class.")
    return Listing(images, others, inner or (_common_folder(images.names) if root.is_file() else ""))


def _common_folder(names: Sequence[str]) -> str:
    """The folder in which all folders of these files lie."""
    parents = {name.rpartition("/")[0] for name in names}
    return os.path.commonpath(parents) if len(parents) > 1 and not any(map(leaves, names)) else ""


def _endings(names: Iterable[str]) -> Counter[str]:
    return Counter(suffix_of(name) or "without ending" for name in names)


def _by_ending(endings: Counter[str]) -> str:
    """Numbers of files in words, the most first, with the remedy where there is one."""
    listed = ", ".join(f"{n:,} {ending}" for ending, n in endings.most_common(10))
    wanted = [suffix for suffix in HEIF_SUFFIXES if suffix in endings and suffix not in SUFFIXES]
    return listed + (f" (pip install -e '.[heif]' makes {wanted[0]} readable)" if wanted else "")


def unread(*places: tuple[Listing, str]) -> tuple[str, ...]:
    """A sentence on the files in folders of listings that are not read, with their numbers by ending; none without."""
    names = [name for listing, folder in places for name in under(listing.others, folder).names]
    endings = _endings(name for name in names if not name.endswith(ANNOTATIONS))
    return (f"{endings.total():,} files of other kinds are not read: {_by_ending(endings)}",) if endings else ()


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
    listing: Listing, folder: str, class_names: Sequence[str] | None, where: str
) -> tuple[EncodedImages, tuple[str, ...]]:
    """The images of `folder` with their classes, as `image_classes` tells them, sorted by class, then by name.

    Args:
        class_names: the classes in order; None takes the folders' own names, sorted.
        where: what to call the folder in messages.

    Returns: (images, class names in order).

    Raises: UserError when an image lies outside of a class folder, or in one of a class that is not known, and for a
        class folder without images.
    """
    inside, folder_names = image_classes(listing, folder, where)
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


def image_classes(listing: Listing, folder: str, where: str) -> tuple[Members, list[str]]:
    """The images inside `folder`, and for each the name of its class, "" when it has none: that of the folder right
    below in which it lies, or, for Tiny-ImageNet's `images/`, what `val_annotations.txt` says.

    Raises: UserError for a class folder that holds no image.
    """
    inside = under(listing.images, folder)
    names = class_folders(inside.names, folder)
    others = under(listing.others, folder)
    annotations = next((i for i, name in enumerate(others.names) if name == f"{folder}/{ANNOTATIONS}".lstrip("/")), -1)
    if annotations >= 0 and set(names) == {"images"}:
        lines = others.read(annotations).decode("utf-8", "replace").splitlines()
        classes = {parts[0]: parts[1] for line in lines if len(parts := line.split()) > 1}
        return inside, [classes.get(name.rpartition("/")[2], "") for name in inside.names]
    listed = class_folders([*others.names, *(f"{name}/" for name in others.folders if not is_hidden(name))], folder)
    empty = sorted(set(listed) - set(names) - {""})
    if empty:
        held = under(others, f"{folder}/{empty[0]}".lstrip("/"))
        more = f", and {len(empty) - 1:,} more like it" if len(empty) > 1 else ""
        found = _by_ending(_endings(held.names)) or "nothing"
        raise UserError(
            f"{where}/{empty[0]} holds no image that is read (found {found}){more}. Put images there, or remove it."
        )
    return inside, names


def class_folders(names: Sequence[str], folder: str) -> list[str]:
    """For each file, the name of the folder right below `folder` in which it lies, "" when in none. Names that look
    alike are: Unicode's composed form is taken."""
    depth = folder.count("/") + 1 if folder else 0
    found = [parts[depth] if len(parts := name.split("/")) > depth + 1 else "" for name in names]
    return [unicodedata.normalize("NFC", name) for name in found]


def refuse_packed(root: Path, names: Sequence[str]) -> None:
    """Raises UserError when `root` is an archive without images that packs one of these files, each of which is read
    only where it lies in a folder."""
    found = [] if root.is_dir() else list_members(root).names
    packed = next((name for name in found if PurePosixPath(name).name in names), None)
    if packed is not None and not any(map(is_image_name, found)):
        name = PurePosixPath(packed).name
        raise UserError(f"{name} is read from a folder, and {root} packs it: unpack it, and give --source that folder.")


class TrainTestFolders(Source):
    """`train/<class>/*` and `test/<class>/*` (or val/) in a folder or archive, and `unlabeled/` where asked for.

    Sorted names are taken as the data set's own order within a class.

    Args:
        root: the folder or archive; the folders lie at its top or up to three levels down.
        class_names: the classes in order.
        forms: what the data set may be given as, for messages.
        whole: images of the official set by split; with "unlabeled", images in `unlabeled/`, beside train/, at any
            depth, are needed too.
    """

    def __init__(self, root: Path, class_names: Sequence[str], forms: str, whole: Mapping[str, int]) -> None:
        unlabeled = "unlabeled" in whole
        listing = list_images(root)
        train, test = split_folders(listing.images, ("train",), ("test", "val"))
        beside = f"{(train or '').rpartition('/')[0]}/unlabeled".lstrip("/")
        more = under(listing.images, beside)
        missing = [f"{split}/" for split, folder in (("train", train), ("test", test)) if folder is None]
        missing += ["unlabeled/"] if unlabeled and not len(more) else []
        if train is None or test is None or missing:
            raise UserError(f"{root} has no {' and no '.join(missing)} of class folders. --source takes {forms}.")
        self._splits = {"unlabeled": EncodedImages(more, np.full(len(more), -1, np.int64))}
        self._splits["train"], self.class_names = labeled_images(listing, train, class_names, f"{root}/{train}")
        self._splits["test"], _ = labeled_images(listing, test, self.class_names, f"{root}/{test}")
        lacks = partial_splits(self._splits, whole)
        others = unread(*((listing, folder) for folder in (train, test, *([beside] if unlabeled else []))))
        self.notes = (*lacks, *others)
        self.description = "; ".join((f"class folders of {root.name}", *lacks))

    def open_split(self, split: str) -> Images:
        return self._splits[split]
