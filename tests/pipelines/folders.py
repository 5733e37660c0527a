"""Small data folders in the project's layout, whose pixels say which row they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data_prep.folder.manifest import FileEntry, Manifest, parse_manifest, write_manifest

CLASSES = 3


def row_of(images: np.ndarray) -> np.ndarray:
    """The row id written into the first pixel of each stored image: (N, H, W, 3) uint8 -> (N,)."""
    first = images[:, 0, 0].astype(np.int64)
    return first[:, 0] + 256 * first[:, 1]


def make_images(n: int, side: int, seed: int) -> np.ndarray:
    """Random images with large flat areas (so that histograms have gaps and ties), the row id in the first pixel."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    images[:, side // 3 :, side // 4 :] //= 3
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return images


def entry_of(path: Path) -> FileEntry:
    data = path.read_bytes()
    array = np.load(path, allow_pickle=True) if path.suffix == ".npy" else None
    return FileEntry(
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        shape=None if array is None else list(array.shape),
        dtype=None if array is None else str(array.dtype),
    )


def write_folder(folder: Path, *, train: int = 50, labeled: int = 12, test: int = 11, side: int = 16) -> Path:
    """Labels are row id % CLASSES; the labeled rows are the first ones in reverse; all rows are unlabeled ones."""
    folder.mkdir(parents=True)
    images = make_images(train, side, 0)
    arrays = {
        "train": images,
        "test": make_images(test, side, 1),
        "train_labels": np.arange(train, dtype=np.int64) % CLASSES,
        "test_labels": np.arange(test, dtype=np.int64) % CLASSES,
        "labeled_rows": np.arange(labeled, dtype=np.int64)[::-1].copy(),
        "unlabeled_rows": np.arange(train, dtype=np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    refresh_manifest(folder)
    return folder


def accept(folder: Path, name: str) -> None:
    """Make the manifest agree with one changed file, and with nothing else."""
    manifest = parse_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"files": {**manifest.files, name: entry_of(folder / name)}}))


def refresh_manifest(folder: Path, **changes: object) -> None:
    """Write the manifest for the files as they are now."""

    def counts(labels: np.ndarray) -> list[int]:
        return np.bincount(labels, minlength=CLASSES).tolist()

    images, labels = np.load(folder / "train.npy"), np.load(folder / "train_labels.npy")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    facts: dict = {
        "name": "tiny",
        "resolution": images.shape[1],
        "class_names": [f"class {k}" for k in range(CLASSES)],
        "labeled_counts": counts(labels[np.load(folder / "labeled_rows.npy")]),
        "unlabeled_counts": counts(labels[np.load(folder / "unlabeled_rows.npy")]),
        "test_counts": counts(np.load(folder / "test_labels.npy")),
        "mean": (images.mean((0, 1, 2)) / 255).tolist(),
        "std": (images.std((0, 1, 2)) / 255).tolist(),
        "split": {},
        "source": "made for a test",
        "command": "python data_prep/build.py tiny",
        "origin": {},
        "files": {path.relative_to(folder).as_posix(): entry_of(path) for path in files},
    }
    write_manifest(folder, Manifest(**(facts | changes)))
