"""Reading outside of training: the facts about a data folder, and images as a trained network takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.folder.manifest import Manifest, read_manifest
from data_prep.folder.writers import names_file
from data_prep.recipes.catalog import CATALOG
from data_prep.sources.containers import FIELDS, Members, is_image_name, list_members, split_archive_path, under
from data_prep.sources.resize import Preparation, UnreadableError, decode, fitted, strict_decoding, upright
from pipelines.arrays import read_info, verify
from pipelines.batch import Info

__all__ = [
    "DataFacts",
    "ImageFile",
    "UnreadableError",
    "batches",
    "find_images",
    "normalized",
    "read_facts",
    "row_names",
]


class DataFacts(NamedTuple):
    """What is known of a data set without its arrays; for reports, never for methods.

    split, source and command are the manifest's; resize_filter, fit, exif and pad_color are those of `preparation`;
    unlabeled_counts are images of each class, None where their classes are unknown.
    """

    info: Info
    split: dict[str, Any]
    source: str
    command: str
    resize_filter: str
    unlabeled_counts: tuple[int, ...] | None
    fit: str = "squash"
    exif: str = "stored"
    pad_color: tuple[int, int, int] | None = None

    @property
    def preparation(self) -> Preparation:
        """How an image is made one of the data set."""
        return Preparation(self.info.resolution, self.resize_filter, self.fit, self.exif, self.pad_color)


def read_facts(folder: str | Path) -> DataFacts:
    """The facts about the data set in a folder. Raises UserError when there is none, or it is damaged."""
    manifest = read_manifest(folder)
    hidden, color = manifest.unlabeled_counts, manifest.split.get("pad_color")
    return DataFacts(
        info=read_info(folder),
        split=manifest.split,
        source=manifest.source,
        command=manifest.command,
        resize_filter=_resize_filter(manifest),
        unlabeled_counts=None if hidden is None else tuple(hidden),
        fit=manifest.split.get("fit", "squash"),
        exif=manifest.split.get("exif", "stored"),
        pad_color=None if color is None else tuple(color),
    )


def _resize_filter(manifest: Manifest) -> str:
    """The filter that the data set's images were resized by: the manifest's, or the usual one of its recipe."""
    entry = CATALOG.get(str(manifest.split.get("dataset")))
    defaults = entry.defaults if entry is not None and entry.defaults is not None else {}
    return str(manifest.split.get("filter", defaults.get("filter_name", "box")))


def row_names(folder: str | Path) -> list[str] | None:
    """The images' own paths, as they were when the folder was built, for every row of train.npy; None where it does not
    keep them, as published data sets and older folders do not. Raises UserError when their file is damaged."""
    folder, name, manifest = Path(folder), names_file("train"), read_manifest(folder)
    if name not in manifest.files:
        return None
    verify(folder, name, manifest)
    names: list[str] = json.loads((folder / name).read_bytes())
    return names


class ImageFile(NamedTuple):
    """An image in a file of its own or in an archive."""

    members: Members
    row: int  # among the members

    @property
    def name(self) -> str:
        """Its path; of one in an archive, the archive's path and the name inside."""
        return str(self.members.root / self.members.names[self.row])

    def pixels(self, rule: Preparation) -> NDArray[np.uint8]:
        """The image as data_prep/build.py would have stored it, (H, W, 3) uint8.

        Raises: UnreadableError, which says why, for what cannot be read whole.
        """
        with strict_decoding():
            return fitted(upright(decode(self.members.read(self.row)), rule), rule)


def find_images(paths: Sequence[Path]) -> list[ImageFile]:
    """The images at some paths: files as they are, folders, zip and tar archives searched.

    Raises: UserError for a path that does not exist, or where no image is.
    """
    files: list[ImageFile] = []
    for path in paths:
        if path.is_file() and is_image_name(path.name):
            files.append(ImageFile(Members(path.parent, [path.name], np.zeros(1, FIELDS)), 0))
            continue
        root, inner = split_archive_path(path)
        members = under(list_members(root), inner)
        inside = [ImageFile(members, i) for i, name in enumerate(members.names) if is_image_name(name)]
        if not inside:
            raise UserError(f"{path} has no images (.jpg, .png, .webp, ...).")
        files += inside
    return files


def normalized(images: NDArray[np.uint8] | Tensor, info: Info, device: torch.device | str = "cpu") -> Tensor:
    """Images (n, H, W, 3) uint8 -> (n, 3, H, W) float32, channels_last: pixels / 255, less the mean, over the std."""
    x = torch.as_tensor(images).to(device).float().div_(255)
    mean, std = (torch.tensor(values, dtype=torch.float32, device=x.device) for values in (info.mean, info.std))
    return x.sub_(mean).div_(std).permute(0, 3, 1, 2)


def batches(
    images: NDArray[np.uint8], rows: NDArray[np.int64], info: Info, device: torch.device | str, size: int = 256
) -> Iterator[Tensor]:
    """These rows of an array of images (N, H, W, 3) uint8, normalized, `size` at a time."""
    for start in range(0, len(rows), size):
        yield normalized(images[rows[start : start + size]], info, device)
