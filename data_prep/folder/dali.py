"""DALI's form: tar shards for its webdataset reader, raw pixels that need no decoding.

A part's folder `<part>-dali` holds, for each shard, `<number>.tar` (uncompressed, two members a row: `<row>.bin`, the
H*W*3 pixel bytes, and `<row>.ids`, two little-endian int64: row and label) and `<number>.idx`, DALI's index of it. Rows
lie in a shuffled order, so that a small shuffle buffer is enough: that of `order.npy`, (N,) int64. For train there are
also `labeled/<number>.idx` and `unlabeled/<number>.idx`, indices of just those rows of the same tars; a shard without
such rows has none.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.files import allocate, fsync_path, replacing
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


def write_dali(
    folder: Path,
    part: str,
    shard_images: int = SHARD_IMAGES,
    kept: Container[str] = (),
    finish: Callable[[Sequence[Path]], object] = lambda paths: None,
) -> None:
    """Write `<part>-dali` from `<part>.npy` and `<part>_labels.npy` in `folder`, in place of what is there.

    Args:
        shard_images: rows in a tar, at most, >= 1.
        kept: files by relative name that are there, whole, from an earlier call with the same arguments.
        finish: called with the files of each shard when they are on the disk.

    Raises: OSError when the disk is full.
    """
    target = folder / f"{part}-dali"
    for path in target.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in kept:
            path.unlink()
    labels = np.load(folder / f"{part}_labels.npy")
    order = shuffled(len(labels))
    subsets = _subsets(folder, len(labels)) if part == "train" else {}
    for path in (target, *(target / name for name in subsets)):
        path.mkdir(exist_ok=True)
        fsync_path(path.parent)
    with ImageRows(folder / f"{part}.npy") as images:
        for shard, start in enumerate(range(0, len(order), shard_images)):
            rows, name = order[start : start + shard_images], f"{shard:05d}"
            if f"{part}-dali/{name}.tar" in kept:
                continue
            samples = _write_tar(target / f"{name}.tar", images, labels, rows)
            indices = {target / f"{name}.idx": samples}
            for subset, chosen in subsets.items():
                indices[target / subset / f"{name}.idx"] = [s for s in samples if chosen[s.row]]
            finish([target / f"{name}.tar", *(path for path, some in indices.items() if _write_index(path, some))])
    write_array(target / "order.npy", order)
    finish([target / "order.npy"])


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
    samples, member = [], 2 * BLOCK + BLOCK + -(-images[0].nbytes // BLOCK) * BLOCK
    with replacing(path) as file:
        allocate(file.fileno(), len(rows) * member + 2 * BLOCK)  # without room better said before it is written
        for row in rows.tolist():
            pixels = images[row].tobytes()
            start = _write_member(file, f"{row:09d}.bin", pixels)
            ids = _write_member(file, f"{row:09d}.ids", np.array([row, labels[row]], "<i8").tobytes())
            samples.append(Sample(row, start, len(pixels), ids))
        file.write(bytes(2 * BLOCK))  # the end of a tar
    return samples


def _write_member(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a member, without owner or time, so that a tar is the same each time. Returns where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    start = file.tell() + len(header)
    file.write(header + data + bytes(-len(data) % BLOCK))
    return start


def _write_index(path: Path, samples: Iterable[Sample]) -> bool:
    """DALI's index: a line a sample, of extension, offset, size and name for each of its members. Returns whether there
    is one: not of no samples."""
    lines = [f"bin {s.pixels} {s.pixels_size} {s.row:09d}.bin ids {s.ids} 16 {s.row:09d}.ids" for s in samples]
    if lines:
        with replacing(path) as file:
            file.write("\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]).encode("ascii"))
    return bool(lines)
