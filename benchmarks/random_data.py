"""A data folder of random pixels, for benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.folder.manifest import Manifest, Origin, file_entry, write_manifest
from data_prep.folder.writers import write_array

CLASSES, SIDE = 10, 32


def random_folder(folder: Path, rows: int = 11_158) -> None:
    """A data folder of the size of CIFAR-10-LT (N1=500, M1=4000), with random pixels: speed does not see them.

    Args:
        rows: training images, all of them unlabeled.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "train": rng.integers(0, 256, (rows, SIDE, SIDE, 3), dtype=np.uint8),
        "test": rng.integers(0, 256, (CLASSES, SIDE, SIDE, 3), dtype=np.uint8),
        "train_labels": rng.integers(0, CLASSES, rows),
        "test_labels": np.arange(CLASSES),
        "labeled_rows": np.arange(1_236),
        "unlabeled_rows": np.arange(rows),
    }
    for name, array in arrays.items():
        write_array(folder / f"{name}.npy", array)
    write_manifest(
        folder,
        Manifest(
            name="random",
            resolution=SIDE,
            class_names=[f"class {k}" for k in range(CLASSES)],
            labeled_counts=np.bincount(arrays["train_labels"][:1_236], minlength=CLASSES).tolist(),
            unlabeled_counts=np.bincount(arrays["train_labels"], minlength=CLASSES).tolist(),
            test_counts=[1] * CLASSES,
            mean=[0.5] * 3,
            std=[0.29] * 3,
            split={},
            source="random pixels",
            command="python -m benchmarks.step",
            origin=Origin(),
            files={f"{name}.npy": file_entry(folder / f"{name}.npy") for name in arrays},
        ),
    )
