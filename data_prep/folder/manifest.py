"""manifest.json: what a data folder holds. It is written last, so its presence means the folder is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_prep.errors import UserError
from data_prep.files import replacing, sha256_of
from data_prep.folder.checked import has_checksum

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
PROGRAM = "python data_prep/build.py"
VALIDATION_ROWS = "validation_rows.npy"  # of folders that have validation images
ARRAYS = ("train.npy", "test.npy", "train_labels.npy", "test_labels.npy", "labeled_rows.npy", "unlabeled_rows.npy")


class FileEntry(BaseModel):
    """One file of the folder: size in bytes, SHA-256 in hex, and shape and dtype where it is an array."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    shape: list[int] | None = None
    dtype: str | None = None


class Origin(BaseModel):
    """What a folder was made of, and how, as far as its split and resolution do not say it.

    `places`: the files and folders given (absolute), by option. `source`: SHA-256 over the digests of its images, None
    where no images were read; `val_labels`: that of the file of validation labels, None where none was given.
    `shard_images`: images in a DALI shard at most, None without shards. `beton`: how train.beton, where there is one,
    keeps the images: "raw" is the pixels of train.npy, "jpeg90" what JPEG of quality 90 leaves of them.
    """

    model_config = ConfigDict(extra="forbid")

    places: dict[str, str] = {}
    source: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    val_labels: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    on_bad_image: Literal["error", "skip"] = "error"
    shard_images: int | None = Field(default=None, ge=1)
    beton: Literal["raw", "jpeg90"] = "raw"


class Manifest(BaseModel):
    """The facts about a data folder.

    `labeled_counts`, `unlabeled_counts` and `test_counts` are images per class in the order of `class_names`;
    `unlabeled_counts` is None where the classes of the unlabeled images are unknown, and includes the labeled images
    where the split does. `validation_counts` is None where there are no validation images: rows of train.npy that are
    neither labeled nor unlabeled ones, in validation_rows.npy. `mean` and `std` are per channel (R, G, B) of pixels /
    255 over all rows of train.npy.
    `files` maps a path relative to the folder to its entry.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    name: str
    resolution: int = Field(ge=1)
    class_names: list[str] = Field(min_length=2)
    labeled_counts: list[int]
    unlabeled_counts: list[int] | None
    test_counts: list[int]
    validation_counts: list[int] | None = None
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    split: dict[str, Any]
    source: str
    command: str
    origin: Origin
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _one_count_per_class(self) -> Manifest:
        for key in ("labeled_counts", "unlabeled_counts", "test_counts", "validation_counts"):
            counts = getattr(self, key)
            if counts is not None and len(counts) != len(self.class_names):
                raise ValueError(f"{key} has {len(counts)} entries for {len(self.class_names)} classes")
        return self

    @model_validator(mode="after")
    def _every_array(self) -> Manifest:
        for name in ARRAYS:
            if name not in self.files or not self.files[name].shape:
                raise ValueError(f"files must list {name} with its shape")
        if (self.validation_counts is None) == (VALIDATION_ROWS in self.files):
            raise ValueError(f"files must list {VALIDATION_ROWS} where there are validation_counts, and only there")
        return self

    @property
    def formats(self) -> list[str]:
        """The formats that the folder has besides the arrays."""
        files = {"ffcv": "train.beton", "dali": "train-dali/order.npy"}
        return [name for name, file in files.items() if file in self.files]

    def remedy(self, folder: Path) -> str:
        """The command that replaces the folder, where it lies now, when it is damaged."""
        return f"{with_option(self.command, '--out', str(folder))} --force"

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what the data is: the arrays' checksums (pixels, labels, split rows) and class names.

        Neither the command, the time, the preview nor a further format of the same rows changes it.
        """
        arrays = {
            name: entry.sha256
            for name, entry in sorted(self.files.items())
            if "/" not in name and name.endswith(".npy")
        }
        facts = {"class_names": self.class_names, "resolution": self.resolution, "arrays": arrays}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def with_option(command: str, option: str, value: str | None) -> str:
    """A command line with this value of an option at its end; without the option for None."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word == option:
            next(words, None)
        elif not word.startswith(f"{option}="):
            kept.append(word)
    return shlex.join([*kept, *([] if value is None else [option, value])])


def class_counts(arrays: Mapping[str, NDArray[np.int64]], classes: int) -> dict[str, list[int] | None]:
    """The counts of a manifest by name, from train_labels, test_labels, labeled_rows, unlabeled_rows and, where there
    are such, validation_rows."""
    labels = arrays["train_labels"]
    parts = {
        "labeled_counts": labels[arrays["labeled_rows"]],
        "unlabeled_counts": labels[arrays["unlabeled_rows"]],
        "test_counts": arrays["test_labels"],
    }
    if "validation_rows" in arrays:
        parts["validation_counts"] = labels[arrays["validation_rows"]]
    return {
        name: None if np.any(part < 0) else np.bincount(part, minlength=classes).tolist()
        for name, part in parts.items()
    }


def check_counts(folder: Path, manifest: Manifest, arrays: Mapping[str, NDArray[np.int64]]) -> None:
    """Compare a manifest's counts with the label arrays. Raises UserError where they differ."""
    for name, counts in class_counts(arrays, len(manifest.class_names)).items():
        if counts != getattr(manifest, name):
            raise UserError(
                f"Data folder {folder} is damaged: {name} of {MANIFEST_NAME} are not those of the label arrays. "
                f"Rebuild it: {manifest.remedy(folder)}"
            )


def read_manifest(folder: str | os.PathLike[str], build: str | None = None) -> Manifest:
    """Read and check `folder/manifest.json`, and that every listed file is there with the listed size.

    Args:
        build: the arguments of build.py that make the folder ("imagenet127 --res 64"), for messages; None where they
            are not known.

    Raises: UserError when the folder or manifest is missing, is not valid, has another schema version, or lists a file
        that is missing or of another size. Contents are not hashed here: `build.py verify` does that.
    """
    folder = Path(folder)
    manifest = parse_manifest(folder, build)
    for name, entry in manifest.files.items():
        problem = size_problem(folder / name, entry)
        if problem:
            raise UserError(f"Data folder {folder} is damaged: {name} {problem}. Rebuild it: {manifest.remedy(folder)}")
    return manifest


def size_problem(path: Path, entry: FileEntry) -> str:
    """What is wrong with a file as far as a look at its size can tell, "" when nothing."""
    try:
        size = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if size == entry.bytes else f"has {size:,} bytes, the manifest says {entry.bytes:,}"


def problem_with(path: Path, entry: FileEntry) -> str:
    """What is wrong with a file, all of which is read, "" when nothing."""
    try:
        return size_problem(path, entry) or ("" if has_checksum(path, entry.sha256) else "has another checksum")
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def parse_manifest(folder: Path, build: str | None = None) -> Manifest:
    """`read_manifest` without a look at the files that the manifest lists. Raises UserError as that does."""
    path, rebuild = folder / MANIFEST_NAME, _remedy(build, folder)
    try:
        data = path.read_bytes()
        raw = json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"No data set at {folder} ({MANIFEST_NAME} is missing). Build it{_remedy(build)}") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Mend that, or rebuild it{rebuild}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). Rebuild it{rebuild}") from None
    raw = raw if isinstance(raw, dict) else {}
    rebuild = _kept_remedy(raw, folder) or rebuild
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version!r}, this program reads version {SCHEMA_VERSION}, which has a checksum "
            f"of its own. Rebuild it{rebuild}"
        )
    checksum = str(raw.pop("checksum", None))
    if hashlib.sha256(data.replace(checksum.encode(), b"", 1)).hexdigest() != checksum:
        raise UserError(f"{path} is damaged: its checksum is not that of its content. Rebuild it{rebuild}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{path} is not a valid manifest: {where}: {first['msg']}. Rebuild it{rebuild}") from None


def _remedy(build: str | None, replaced: Path | None = None) -> str:
    """How a message that says "Build it" goes on. `replaced`: the folder that stands there, damaged."""
    more = "" if replaced is None else f" {shlex.join(['--out', str(replaced), '--force'])}"
    if build is not None:
        return f": {PROGRAM} {build}{more}"
    return f" with {PROGRAM} NAME{more} ({PROGRAM} --help lists the names)"


def _kept_remedy(raw: Mapping[str, Any], folder: Path) -> str:
    """The same for a manifest that could not be checked: by the command that it keeps, "" without a build's."""
    try:
        command = with_option(str(raw.get("command")), "--out", str(folder))
    except ValueError:  # a quotation mark was lost
        return ""
    return f": {command} --force" if command.startswith(f"{PROGRAM} ") else ""


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `folder/manifest.json` so that a crash leaves either the old file or the whole new one.

    Its "checksum" is the SHA-256 of all its bytes but those of the checksum.
    """
    text = json.dumps({"checksum": "", **manifest.model_dump()}, indent=2, ensure_ascii=False) + "\n"
    data = text.encode("utf-8")
    checksum = hashlib.sha256(data).hexdigest()
    with replacing(Path(folder) / MANIFEST_NAME) as file:
        file.write(data.replace(b'"checksum": ""', f'"checksum": "{checksum}"'.encode(), 1))


def file_entry(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, with shape and dtype where it is an .npy."""
    shape, dtype = None, None
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        shape, dtype = list(array.shape), str(array.dtype)
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path), shape=shape, dtype=dtype)
