"""ILSVRC2012 as people keep it: class folders, a flat val/ with ground truth, or the official tars read in place."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.class_folders import Listing, class_folders, image_classes, list_images, split_folders, unread
from data_prep.sources.containers import Members, from_tar, under
from data_prep.sources.downloads import Archive, check
from data_prep.sources.images import EncodedImages
from data_prep.sources.tars import NOWHERE, tar_files
from data_prep.sources.val_labels import find_val_labels

TRAIN_NAMES = ("train", "ILSVRC2012_img_train")
VAL_NAMES = ("val", "validation", "valid", "ILSVRC2012_img_val")
TRAIN_TAR = Archive("ILSVRC2012_img_train.tar", "https://image-net.org", "1d675b47d978889d74fa0da5fadfb00e")
VAL_TAR = Archive("ILSVRC2012_img_val.tar", "https://image-net.org", "29b22e2961454d5413ddabcf34fc5622")
DEVKIT = Archive("ILSVRC2012_devkit_t12.tar.gz", "https://image-net.org", "fa75699e90414af021442c21a62c3abf")
STRANGE = -1  # a class that is not of ILSVRC2012


class Opened(NamedTuple):
    """Images by split, labeled 0..999, STRANGE where the class is none of ILSVRC2012's; "test" is left out where there
    is no val. What to say of them: see `Source.notes`."""

    splits: dict[str, EncodedImages]
    notes: tuple[str, ...] = ()


def open_folders(root: Path, wnids: Mapping[str, int], val_labels: Path | None) -> Opened:
    """`train/<wnid>/*` and `val/`, of class folders or flat, in a folder or archive; the split folders lie up to four
    levels down (ILSVRC/Data/CLS-LOC/train). Tiny-ImageNet's val/images is read by its own annotations. Images are
    sorted by name."""
    listing = list_images(root)
    train, test = split_folders(listing.images, TRAIN_NAMES, VAL_NAMES)
    if train is None:
        raise UserError(
            f"{root} has no train/<wnid>/*.JPEG. --source takes a folder with train/ and val/, the official "
            f"{TRAIN_TAR.file} and {VAL_TAR.file}, or downsampled ImageNet's train_data_batch_1.npz ..."
        )
    labeled = {"train": _by_folder(listing, train, wnids)}
    notes = unread(*((listing, folder) for folder in (train, test) if folder is not None))
    if test is not None:
        if not any(class_folders(under(listing.images, test).names, test)):
            return Opened({**labeled, "test": _flat_val(listing, test, wnids, root, val_labels)}, notes)
        labeled["test"] = _by_folder(listing, test, wnids)
    if val_labels is not None:
        raise UserError(f"--val-labels is for a flat val/; {root} has {'class folders there' if test else 'no val'}.")
    return Opened(labeled, notes)


def _by_folder(listing: Listing, folder: str, wnids: Mapping[str, int]) -> EncodedImages:
    members, names = image_classes(listing, folder, f"{listing.images.root}/{folder}")
    return EncodedImages(members, np.array([wnids.get(name, STRANGE) for name in names], np.int64))


def _flat_val(listing: Listing, folder: str, wnids: Mapping[str, int], root: Path, given: Path | None) -> EncodedImages:
    """val images without class folders: each labeled by the ground truth's entry for its file name."""
    labels = find_val_labels(root, given, listing.others)
    members = under(listing.images, folder)
    stems = [PurePosixPath(name).stem for name in members.names]
    return EncodedImages(members, np.array([wnids.get(labels.get(stem, ""), STRANGE) for stem in stems], np.int64))


def open_tars(folder: Path, wnids: Mapping[str, int], val_labels: Path | None) -> Opened:
    """The official train tar (a tar of one tar a class) and val tar, read where they lie."""
    train = _list_train_tar(folder / TRAIN_TAR.file)
    classes = [wnids.get(name.partition("/")[0], STRANGE) for name in train.names]
    splits = {"train": EncodedImages(train, np.array(classes, np.int64))}
    if (folder / VAL_TAR.file).is_file():
        val = list_images(folder / VAL_TAR.file)
        splits["test"] = _flat_val(val, "", wnids, folder / VAL_TAR.file, val_labels)
    elif val_labels is not None:
        raise UserError(f"--val-labels is for val images; {folder} has no {VAL_TAR.file}.")
    return Opened(splits)


def verify_tars(folder: Path) -> None:
    """Compare the tars' MD5 with the official ones: minutes for 144 GB. Raises UserError at the first that differs."""
    for archive in (TRAIN_TAR, VAL_TAR, DEVKIT):
        if (folder / archive.file).is_file():
            check(folder / archive.file, [archive])


def _list_train_tar(path: Path) -> Members:
    """Images of all inner tars, named `<wnid>/<file>`, sorted, at their bytes in the outer tar."""
    files: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as outer, open(path, "rb") as file:
            for part, start, _ in tar_files(outer):
                match = re.fullmatch(r"(?:.*/)?(n\d{8})\.tar", part)
                if match is None or start == NOWHERE:
                    continue
                file.seek(start)
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    files += [(f"{match[1]}/{name}", offset, size) for name, offset, size in tar_files(inner)]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is a damaged or unfinished tar ({error}). Download it again.") from None
    if not files:
        raise UserError(f"{path} holds no n........tar of images: it is not the official training tar.")
    return from_tar(path, files)
