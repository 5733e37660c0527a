"""A data folder of random pixels, for benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.folder.manifest import Manifest, Origin, file_entry, write_manifest
from data_prep.folder.writers import write_array

CLASSES, SIDE = 10, 32


def random_folder(
    folder: Path,
    *,
    side: int = SIDE,
    classes: int = CLASSES,
    rows: int = 11_158,
    labeled: int = 1_236,
    test: int = CLASSES,
) -> None:
    """A data folder of random pixels: speed does not see them. By default of the size of CIFAR-10-LT (N1=500, M1=4000).

    Args:
        rows: training images, all of them unlabeled; labeled: the first of them, which have labels. test: test images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "train": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
        "test": rng.integers(0, 256, (test, side, side, 3), dtype=np.uint8),
        "train_labels": rng.permutation(np.arange(rows) % classes),
        "test_labels": np.arange(test) % classes,
        "labeled_rows": np.arange(labeled),
        "unlabeled_rows": np.arange(rows),
    }
    for name, array in arrays.items():
        write_array(folder / f"{name}.npy", array)
    write_manifest(
        folder,
        Manifest(
            name="random",
            resolution=side,
            class_names=[f"class {k}" for k in range(classes)],
            labeled_counts=np.bincount(arrays["train_labels"][:labeled], minlength=classes).tolist(),
            unlabeled_counts=np.bincount(arrays["train_labels"], minlength=classes).tolist(),
            test_counts=np.bincount(arrays["test_labels"], minlength=classes).tolist(),
            mean=[0.5] * 3,
            std=[0.29] * 3,
            split={},
            source="random pixels",
            command="python -m benchmarks.step",
            origin=Origin(),
            files={f"{name}.npy": file_entry(folder / f"{name}.npy") for name in arrays},
        ),
    )
