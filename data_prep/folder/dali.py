"""DALI's form: tar shards for its webdataset reader, raw pixels that need no decoding.

A part's folder `<part>-dali` holds, for each shard, `<number>.tar` (uncompressed, two members a row: `<row>.bin`, the
H*W*3 pixel bytes, and `<row>.ids`, two little-endian int64: row and label) and `<number>.idx`, DALI's index of it. Rows
lie in a shuffled order, so that a small shuffle buffer is enough: that of `order.npy`, (N,) int64. For train there are
also `labeled/<number>.idx` and `unlabeled/<number>.idx`, indices of just those rows of the same tars; a shard without
such rows has none.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import fsync_path
from data_prep.folder.writers import ImageRows, write_array

SHARD_IMAGES = 10_000
SEED = 0
INDEX_VERSION = "v1.2"
BLOCK = tarfile.BLOCKSIZE


class Sample(NamedTuple):
    """A row's two members in a shard: bytes from its start."""

    row: int
    pixels: int
    pixels_size: int
    ids: int


def write_dali(folder: Path, part: str, shard_images: int = SHARD_IMAGES) -> None:
    """Write `<part>-dali` from `<part>.npy` and `<part>_labels.npy` in `folder`, whole or not at all.

    Args:
        shard_images: rows in a tar, at most, >= 1.

    Raises: OSError when the disk is full.
    """
    target, temporary = folder / f"{part}-dali", folder / f".{part}-dali.tmp"
    for leftover in (target, temporary):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    labels = np.load(folder / f"{part}_labels.npy")
    order = shuffled(len(labels))
    subsets = _subsets(folder, len(labels)) if part == "train" else {}
    for name in subsets:
        (temporary / name).mkdir()
    try:
        with ImageRows(folder / f"{part}.npy") as images:
            for shard, start in enumerate(range(0, len(order), shard_images)):
                rows, name = order[start : start + shard_images], f"{shard:05d}"
                samples = _write_tar(temporary / f"{name}.tar", images, labels, rows)
                _write_index(temporary / f"{name}.idx", samples)
                for subset, chosen in subsets.items():
                    _write_index(temporary / subset / f"{name}.idx", [s for s in samples if chosen[s.row]])
        write_array(temporary / "order.npy", order)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_path(folder)


def shuffled(count: int) -> NDArray[np.int64]:
    """The order of rows in the shards: fixed for a number of rows (Philox's raw output never changes)."""
    keys = np.random.Philox(key=[SEED, count]).random_raw(count)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _subsets(folder: Path, count: int) -> dict[str, NDArray[np.bool_]]:
    chosen = {}
    for name in ("labeled", "unlabeled"):
        chosen[name] = np.zeros(count, bool)
        chosen[name][np.load(folder / f"{name}_rows.npy")] = True
    return chosen


def _write_tar(path: Path, images: ImageRows, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> list[Sample]:
    samples = []
    with open(path, "wb") as file:
        for row in rows.tolist():
            pixels = images[row].tobytes()
            start = _write_member(file, f"{row:09d}.bin", pixels)
            ids = _write_member(file, f"{row:09d}.ids", np.array([row, labels[row]], "<i8").tobytes())
            samples.append(Sample(row, start, len(pixels), ids))
        file.write(bytes(2 * BLOCK))  # the end of a tar
        file.flush()
        os.fsync(file.fileno())
    return samples


def _write_member(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a member, without owner or time, so that a tar is the same each time. Returns where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    start = file.tell() + len(header)
    file.write(header + data + bytes(-len(data) % BLOCK))
    return start


def _write_index(path: Path, samples: Iterable[Sample]) -> None:
    """DALI's index: a line a sample, of extension, offset, size and name for each of its members."""
    lines = [f"bin {s.pixels} {s.pixels_size} {s.row:09d}.bin ids {s.ids} 16 {s.row:09d}.ids" for s in samples]
    if lines:
        path.write_text("\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]), encoding="ascii")
