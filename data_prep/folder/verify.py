"""`build.py verify`: every file of a data folder against the manifest's checksums."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.folder.manifest import (
    MANIFEST_NAME,
    VALIDATION_ROWS,
    Manifest,
    check_counts,
    parse_manifest,
    problem_with,
)
from data_prep.progress import Bar


def verify_folder(folder: Path) -> None:
    """Read every listed file again. Prints a line when all is well.

    Raises: UserError that names each damaged file and what is wrong with it, or that there is no data set.
    """
    manifest = parse_manifest(folder)
    check_files(folder, manifest)
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST_NAME}
    extra = sorted(present - set(manifest.files))
    note = f"; not part of it: {', '.join(extra[:5])}" if extra else ""
    total = sum(entry.bytes for entry in manifest.files.values())
    print(f"{folder}: all {len(manifest.files)} files are as they were written ({total / 1e6:,.1f} MB){note}")


def check_files(folder: Path, manifest: Manifest, progress: bool = True) -> None:
    """Read every listed file again, and count the labels. Raises UserError that names each damaged file."""
    damage = []
    with Bar("verify", "bytes", sum(entry.bytes for entry in manifest.files.values()), shown=progress) as bar:
        for name, entry in manifest.files.items():
            problem = problem_with(folder / name, entry)
            if problem:
                damage.append(f"{name} {problem}")
            bar.update(entry.bytes)
    if damage:
        raise UserError(f"{folder} is damaged: {'; '.join(damage)}. Build it again: {manifest.remedy(folder)}")
    names = ["train_labels", "test_labels", "labeled_rows", "unlabeled_rows"]
    names += ["validation_rows"] if VALIDATION_ROWS in manifest.files else []
    check_counts(folder, manifest, {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names})
