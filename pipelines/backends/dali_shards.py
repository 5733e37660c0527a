"""Checking DALI's shards before DALI opens them: damaged ones would crash it, hang it, or give wrong images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.folder.dali import INDEX_VERSION
from pipelines.arrays import Arrays, verify

IDS_BYTES = 16  # row and label, two int64
_OTHERWISE = "or use the back end resident"


def check_shards(arrays: Arrays, subset: str, rows: NDArray[np.int64]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The tars of the training images and the indices of one subset ("labeled", "unlabeled") in them.

    Raises: UserError when a file is missing or its checksum wrong, when an index points outside of its tar or at
        members of another size, or when the indices do not name each of `rows` once.
    """
    folder = arrays.folder / "train-dali"
    prefix = f"train-dali/{subset}/"
    names = sorted(name for name in arrays.manifest.files if name.startswith(prefix) and name.endswith(".idx"))
    indices = tuple(arrays.folder / name for name in names)
    tars = tuple(folder / f"{index.stem}.tar" for index in indices)
    for path in (*indices, *tars):
        verify(arrays.folder, path.relative_to(arrays.folder).as_posix(), arrays.manifest)
    size = arrays.info.resolution**2 * 3
    by_index = [_rows_of(index, tar.stat().st_size, size) for index, tar in zip(indices, tars, strict=True)]
    named = np.sort(np.concatenate([*by_index, np.empty(0, np.int64)]))
    if not np.array_equal(named, np.sort(rows)):
        _refuse(folder / subset, f"they name {len(named):,} rows, not the {len(rows):,} of {subset}_rows.npy")
    return tars, indices


def _rows_of(index: Path, tar_bytes: int, image_bytes: int) -> NDArray[np.int64]:
    """Row ids that an index names, once it is sure that DALI can follow it."""
    head, *lines = index.read_text(encoding="ascii").splitlines() or [""]
    if head.split() != [INDEX_VERSION, str(len(lines))]:
        _refuse(index, f"it begins with {head[:40]!r} and has {len(lines):,} entries")
    fields = [line.split() for line in lines]
    if any(len(f) != 8 or f[0] != "bin" or f[4] != "ids" for f in fields):
        _refuse(index, "an entry is not a .bin and an .ids member")
    numbers = np.array([[f[1], f[2], f[5], f[6], f[3].removesuffix(".bin")] for f in fields], dtype=str)
    try:
        pixels, pixels_size, ids, ids_size, rows = numbers.astype(np.int64).T
    except (ValueError, OverflowError):
        _refuse(index, "an entry holds something else than numbers")
    if (pixels_size != image_bytes).any() or (ids_size != IDS_BYTES).any():
        _refuse(index, f"a member has another size than {image_bytes:,} and {IDS_BYTES} bytes")
    if min(pixels.min(), ids.min()) < 0 or max((pixels + image_bytes).max(), (ids + IDS_BYTES).max()) > tar_bytes:
        _refuse(index, "an entry lies outside of the tar")
    return rows


def _refuse(path: Path, problem: str) -> None:
    raise UserError(f"{path} is damaged ({problem}). Build the data set again, {_OTHERWISE}")
