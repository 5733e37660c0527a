"""Small data folders in the project's layout, whose pixels say which row they are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from data_prep.manifest import FileEntry, Manifest, write_manifest

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
    array = np.load(path, allow_pickle=False) if path.suffix == ".npy" else None
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
    write_folder_manifest(folder, images, arrays)
    return folder


def write_folder_manifest(folder: Path, images: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    def counts(rows: np.ndarray) -> list[int]:
        return np.bincount(rows % CLASSES, minlength=CLASSES).tolist()

    files = sorted(folder.glob("*.npy")) + sorted(folder.glob("*.beton"))
    write_manifest(
        folder,
        Manifest(
            name="tiny",
            resolution=images.shape[1],
            class_names=[f"class {k}" for k in range(CLASSES)],
            labeled_counts=counts(arrays["labeled_rows"]),
            unlabeled_counts=counts(arrays["unlabeled_rows"]),
            test_counts=counts(np.arange(len(arrays["test"]))),
            mean=(images.mean((0, 1, 2)) / 255).tolist(),
            std=(images.std((0, 1, 2)) / 255).tolist(),
            split={},
            source="made for a test",
            command="python data_prep/build.py tiny",
            files={path.name: entry_of(path) for path in files},
        ),
    )
