"""A build order: what to build and how, checked before any work, and its command as text."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError, unknown
from data_prep.files import is_text, sha256_of
from data_prep.folder.beton import JPEG, require_ffcv
from data_prep.folder.dali import SHARD_IMAGES
from data_prep.folder.manifest import MANIFEST_NAME, PROGRAM, Origin, with_option
from data_prep.recipes.base import Recipe
from data_prep.sources.containers import split_archive_path
from data_prep.sources.images import Images

FORMATS = ("array", "ffcv", "dali")
AS_JPEG = f"ffcv:{JPEG}"
ON_BAD = ("error", "skip")
OPTIONS = {"resolution": "res", "filter_name": "filter"}  # keys whose option has another name


@dataclass(frozen=True)
class Order:
    """What the user wants: a recipe, and how to carry it out. `say` receives one-line remarks.

    `beton`: how train.beton keeps images. `shard_images` None: as in the folder, if it has shards, else SHARD_IMAGES.
    """

    recipe: Recipe
    out: Path
    cache: Path
    command: str
    source: Path | None = None
    workers: int | None = None
    formats: Sequence[str] = ()
    beton: Literal["raw", "jpeg90"] = "raw"
    shard_images: int | None = None
    force: bool = False
    on_bad_image: str = "error"
    allow_overlap: bool = False
    say: Callable[[str], None] = print
    progress: bool = True

    @property
    def inputs(self) -> dict[str, Path]:
        """The files and folders to read, by option."""
        given = {} if self.source is None else {"source": self.source}
        return {**given, **self.recipe.inputs()}

    @property
    def absolute_inputs(self) -> dict[str, str]:
        """The inputs by absolute name, as manifests keep them."""
        return {option: str(path.absolute()) for option, path in self.inputs.items()}

    def origin(self, images: Mapping[str, Images]) -> Origin:
        """What the manifest keeps of the order and of its source, given by the `images` of both parts."""
        return Origin(
            places=self.absolute_inputs,
            source=source_digest(images),
            val_labels=self.val_labels_digest(),
            on_bad_image="skip" if self.on_bad_image == "skip" else "error",
            shard_images=(self.shard_images or SHARD_IMAGES) if "dali" in self.formats else None,
            beton=self.beton,
        )

    def val_labels_digest(self) -> str | None:
        """SHA-256 (hex) of the file of validation labels, None where none is given."""
        path = self.inputs.get("val_labels")
        return None if path is None else sha256_of(path)


def source_digest(images: Mapping[str, Images]) -> str:
    """SHA-256 (hex) over the digests of all parts."""
    return hashlib.sha256("".join(f"{part} {images[part].digest()} " for part in sorted(images)).encode()).hexdigest()


def check_order(order: Order) -> None:
    """Raises: UserError for an unknown word, a number out of range, or an --out in which the build would harm."""
    for name in order.formats:
        if name not in FORMATS:
            raise unknown("--format", name, (*FORMATS, AS_JPEG))
    if order.on_bad_image not in ON_BAD:
        raise unknown("--on-bad-image", order.on_bad_image, ON_BAD)
    if order.workers is not None and order.workers < 1:
        raise UserError(f"--workers must be 1 or more, got {order.workers}.")
    if order.shard_images is not None and order.shard_images < 1:
        raise UserError(f"--shard-images must be 1 or more, got {order.shard_images}.")
    if order.shard_images is not None and "dali" not in order.formats:
        raise UserError("--shard-images has no effect without --format dali.")
    if "ffcv" in order.formats:
        require_ffcv()
    if not order.out.name or order.out.name == "..":
        raise UserError(f"--out must name the folder to make, got '{order.out}'.")
    for option, path in {**order.absolute_inputs, "cache": str(order.cache), "out": str(order.out)}.items():
        if not is_text(path):
            raise UserError(
                f"--{option.replace('_', '-')} must be valid UTF-8, which the manifest keeps, got {path!a}. "
                "Give another."
            )
    _check_apart(order)


def _check_apart(order: Order) -> None:
    """What the build reads must not lie in the folder that it replaces. Raises UserError."""
    out = order.out.resolve()
    for option, path in {**order.inputs, "cache": order.cache}.items():
        read = split_archive_path(path)[0].resolve()
        if out == read or out in read.parents:
            raise UserError(
                f"--{option.replace('_', '-')} {path} lies inside --out {order.out}, the folder that the build makes "
                "or replaces. Give another --out."
            )
    for folder in out.parents:
        if (folder / MANIFEST_NAME).is_file() and (folder / "train.npy").is_file():
            raise UserError(f"--out {order.out} lies inside the data set {folder}. Give an --out beside it.")


def check_unread(order: Order, images: Mapping[str, Images]) -> None:
    """The folder to make must not lie among the images, where its own pictures would be read as some. Raises UserError.

    Its neighbor, the folder of the unfinished build, is then apart too.
    """
    out = order.out.resolve()
    for folder in (folder for part in images.values() for folder in part.folders()):
        if folder.resolve() in out.parents:
            raise UserError(
                f"--out {order.out} lies inside {folder}, all of whose images the build reads. Give an --out elsewhere."
            )


def as_command(name: str, options: Mapping[str, Any]) -> str:
    """`python data_prep/build.py NAME --option value ...` of the options that are given: neither None nor False."""
    words = [name]
    for key, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{OPTIONS.get(key, key).replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return f"{PROGRAM} {shlex.join(words)}"


def command_to_keep(command: str, formats: Sequence[str], shard_images: int | None) -> str:
    """The command as a manifest keeps it: it makes the folder with all the formats that it has, and forces nothing.

    Args:
        shard_images: replaces that of the command where given.
    """
    kept = shlex.join(word for word in shlex.split(command) if word != "--force")
    if shard_images is not None:
        kept = with_option(kept, "--shard-images", str(shard_images))
    return with_option(kept, "--format", ",".join(formats) or None)
