"""Arrays on disk: created whole, filled in place, read back memory-mapped."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import allocate, replacing


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a small array as .npy, C order, atomically."""
    with replacing(path) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def names_file(part: str) -> str:
    """The file of the names of a part's images, of folders that keep them."""
    return f"{part}_names.json"


def write_names(folder: Path, part: str, names: Sequence[str]) -> None:
    """Write the names of a part's images, row by row, as absolute paths; one in an archive is a path behind that of the
    archive. A JSON list, all ASCII: a file name may be no valid Unicode."""
    with replacing(folder / names_file(part)) as file:
        file.write(json.dumps([os.path.abspath(name) for name in names], indent=0).encode("ascii"))


def create_images(path: Path, count: int, resolution: int) -> None:
    """Make `path` an .npy of `count` zero images, (count, resolution, resolution, 3) uint8, with all its room reserved.

    Raises: NoRoomError when the disk has none: now, rather than hours later.
    """
    temporary = path.with_suffix(".new")
    try:
        with open(temporary, "wb") as file:
            header, size = _header(count, resolution)
            file.write(header)
            file.flush()
            allocate(file.fileno(), size)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_images(path: Path, count: int, resolution: int) -> bool:
    """Whether `path` is what `create_images` makes of these numbers, whatever its pixels."""
    header, size = _header(count, resolution)
    with open(path, "rb") as file:
        return file.read(len(header)) == header and os.fstat(file.fileno()).st_size == size


def _header(count: int, resolution: int) -> tuple[bytes, int]:
    """The first bytes of an .npy of images, and its size."""
    shape, file = (count, resolution, resolution, 3), io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)
    return file.getvalue(), file.tell() + count * resolution * resolution * 3


class ImageRows:
    """The images of an .npy, (N, H, W, 3) uint8, by row, through plain reads.

    Not through a mapping: that would count every page once read as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        np.lib.format.read_magic(self._file)
        self.shape = np.lib.format.read_array_header_1_0(self._file)[0]
        self._start, self._size = self._file.tell(), int(np.prod(self.shape[1:]))

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        return self.block(row, row + 1)[0]

    def block(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Images start..stop-1, (n, H, W, 3)."""
        stop = min(stop, len(self))
        data = os.pread(self._file.fileno(), (stop - start) * self._size, self._start + start * self._size)
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape[1:])

    def blocks(self) -> Iterator[NDArray[np.uint8]]:
        """All images, some megabytes at a time."""
        rows = max(1, (1 << 23) // self._size)
        for start in range(0, len(self), rows):
            yield self.block(start, start + rows)

    def __enter__(self) -> ImageRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_rows(path: Path, start: int, block: NDArray[np.uint8]) -> None:
    """Write images `block` (n, H, W, 3) at rows start.. of the .npy at `path`.

    By plain writes, not through a mapping: a full disk is then an error rather than a signal that ends the process,
    and pages written do not count as this process's memory.
    """
    with open(path, "r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        offset = file.tell() + start * block[0].nbytes
        data = np.ascontiguousarray(block).reshape(-1).data
        while data:
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written


def pixel_statistics(images: ImageRows) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels / 255 over all images, from exact integer sums."""
    counts = np.zeros((3, 256), np.int64)
    for block in images.blocks():
        for channel in range(3):
            counts[channel] += np.bincount(block[..., channel].reshape(-1), minlength=256)
    levels, pixels = np.arange(256), int(counts[0].sum())
    mean, std = [], []
    for row in counts:
        first, second = int(row @ levels), int(row @ levels**2)
        mean.append(first / pixels / 255)
        std.append(float(pixels * second - first * first) ** 0.5 / pixels / 255)
    return mean, std
