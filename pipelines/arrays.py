"""Opening the arrays of a data folder, with every check that keeps a damaged file from becoming wrong images."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.folder.checked import is_as_written
from data_prep.folder.manifest import VALIDATION_ROWS, Manifest, check_counts, read_manifest
from pipelines.batch import Info


class Arrays(NamedTuple):
    """What a data folder holds. Images are memory-mapped, (N, H, W, 3) uint8; the others are int64."""

    folder: Path
    manifest: Manifest
    info: Info
    train: NDArray[np.uint8]
    test: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    labeled_rows: NDArray[np.int64]
    unlabeled_rows: NDArray[np.int64]
    validation_rows: NDArray[np.int64] = np.zeros(0, np.int64)


def read_info(folder: str | Path, build: str | None = None) -> Info:
    """The facts about the data set in `folder`.

    Args:
        build: the arguments of data_prep/build.py that make the folder, for the error text where it is missing.

    Raises: UserError when there is no data set, or it is damaged.
    """
    return _info(folder, read_manifest(folder, build))


def _info(folder: str | Path, manifest: Manifest) -> Info:
    names = ("train.npy", "labeled_rows.npy", "unlabeled_rows.npy", "test.npy")
    train, labeled, unlabeled, test = ((manifest.files[name].shape or [0])[0] for name in names)
    if min(manifest.std) <= 0:
        raise UserError(
            f"{folder}: std must be above 0 in every channel, the manifest says {manifest.std}. Rebuild it."
        )
    return Info(
        name=manifest.name,
        num_classes=len(manifest.class_names),
        class_names=tuple(manifest.class_names),
        resolution=manifest.resolution,
        labeled_counts=tuple(manifest.labeled_counts),
        mean=(manifest.mean[0], manifest.mean[1], manifest.mean[2]),
        std=(manifest.std[0], manifest.std[1], manifest.std[2]),
        num_train=train,
        num_labeled=labeled,
        num_unlabeled=unlabeled,
        num_test=test,
        fingerprint=manifest.fingerprint,
        num_validation=sum(manifest.validation_counts or []),
    )


def open_arrays(folder: str | Path) -> Arrays:
    """Open and check the arrays of `folder`. Raises UserError for anything missing, damaged or inconsistent."""
    folder, manifest = Path(folder), read_manifest(folder)
    info = _info(folder, manifest)
    side = info.resolution
    loaded: dict[str, NDArray] = {}
    for name in ("train", "test"):
        loaded[name] = _load(folder, manifest, f"{name}.npy", "uint8", (None, side, side, 3))
        count = len(loaded[name])
        loaded[f"{name}_labels"] = _load(folder, manifest, f"{name}_labels.npy", "int64", (count,))
    validated = ["validation_rows"] if VALIDATION_ROWS in manifest.files else []
    for name in ["labeled_rows", "unlabeled_rows", *validated]:
        loaded[name] = _load(folder, manifest, f"{name}.npy", "int64", (None,))
    validation = loaded.get("validation_rows", np.zeros(0, np.int64))
    train_labels, labeled, unlabeled = loaded["train_labels"], loaded["labeled_rows"], loaded["unlabeled_rows"]
    for name, values, low, high in (
        ("labeled_rows.npy", labeled, 0, len(loaded["train"])),
        ("unlabeled_rows.npy", unlabeled, 0, len(loaded["train"])),
        (VALIDATION_ROWS, validation, 0, len(loaded["train"])),
        ("test_labels.npy", loaded["test_labels"], 0, info.num_classes),
        ("train_labels.npy", train_labels, -1, info.num_classes),
    ):
        if len(values) and (values.min() < low or values.max() >= high):
            got = f"{values.min()}..{values.max()}"
            raise UserError(f"{folder / name}: values must be within {low}..{high - 1}, got {got}. Rebuild the folder.")
    if len(labeled) and train_labels[labeled].min() < 0:
        raise UserError(f"{folder}: a labeled row must have a label, train_labels.npy has -1. Rebuild the folder.")
    if np.isin(validation, np.union1d(labeled, unlabeled)).any():
        raise UserError(f"{folder}: a validation row must be neither labeled nor unlabeled. Rebuild the folder.")
    check_counts(folder, manifest, loaded)
    return Arrays(folder, manifest, info, **loaded)


def as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """The images of a mapped file as a tensor in the same memory, which must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same
        return torch.from_numpy(images)


def copied(images: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
    """Copies of some of the images (N, H, W, 3), for a device that cannot read the others; and where each is, 0, 1, ...

    `images[rows]` takes 18 times as long.
    """
    return images.index_select(0, torch.from_numpy(rows)), np.arange(len(rows), dtype=np.int64)


def verify(folder: Path, name: str, manifest: Manifest) -> None:
    """Compare a file with the checksum that the manifest gives for it, as `is_as_written` does: once a process for each
    state of the file.

    Args:
        name: of the file in the manifest.

    Raises: UserError when they differ, or the manifest does not list the file, or it cannot be read.
    """
    path, entry = folder / name, manifest.files.get(name)
    if entry is None:
        raise UserError(f"{path} is not listed in the manifest. Rebuild it: {manifest.remedy(folder)}")
    try:
        state = path.stat()
        whole = state.st_size == entry.bytes and _whole(path, entry.sha256, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(
            f"Cannot read {path} ({error.strerror}). Mend that, or rebuild it: {manifest.remedy(folder)}"
        ) from None
    if not whole:
        raise UserError(f"{path} is damaged: its checksum is not the manifest's. Rebuild it: {manifest.remedy(folder)}")


@lru_cache(maxsize=64)
def _whole(path: Path, sha256: str, size: int, modified_ns: int) -> bool:
    """Size and time are part of the key only: a file that changed is read anew."""
    return is_as_written(path, sha256)


def _load(folder: Path, manifest: Manifest, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray:
    path = folder / name
    verify(folder, name, manifest)
    try:
        # "r": to be written to, as with "c", a file larger than the memory could not be mapped.
        array = np.load(path, mmap_mode="r" if dtype == "uint8" else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a readable array ({error}). Rebuild it: {manifest.remedy(folder)}") from None
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits or not array.flags.c_contiguous:
        wanted = tuple("any" if want is None else want for want in shape)
        raise UserError(f"{path} must be {dtype} {wanted}, got {array.dtype} {array.shape}. Rebuild the folder.")
    return array
