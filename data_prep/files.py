"""Files, whatever they hold: replaced whole, made durable, reserved, hashed, linked, and records appended to one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(OSError):
    """No room for a file of `needed` bytes."""

    def __init__(self, number: int, needed: int) -> None:
        super().__init__(number, os.strerror(number))
        self.needed = needed


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room: disk, quota, or file size limit."""
    return error.errno in FULL


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary neighbor of `path` for writing; on success fsync it and rename it over `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder: under its name it is whole or gone. What a removal that was killed left goes with the next."""
    removed = path.with_name(f".{path.name}.old")
    shutil.rmtree(removed, ignore_errors=True)
    if path.exists():
        os.rename(path, removed)
        shutil.rmtree(removed)


def fsync_path(path: Path) -> None:
    """Make a folder's renames, or a file's contents, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(path: Path, size: int) -> None:
    """Make sure that a file of `size` bytes can be written at `path`, which is left empty.

    Raises: NoRoomError.
    """
    with open(path, "wb") as file:
        allocate(file.fileno(), size)
        file.truncate(0)


def allocate(handle: int, size: int) -> None:
    """Give a file all its room. Raises NoRoomError when the disk has none."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:
            os.truncate(handle, size)
    except OSError as error:
        raise (NoRoomError(error.errno or errno.ENOSPC, size) if is_full(error) else error) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def is_text(name: str) -> bool:
    """Whether a file name is valid UTF-8, as all that a manifest keeps must be."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; a copy where the file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def append_record(file: IO[bytes], value: Any) -> None:
    """Append a JSON value, on a line of its own with its CRC-32, whatever a killed process left of the one before."""
    body = json.dumps(value).encode()
    file.write(b"\n%08x %s\n" % (zlib.crc32(body), body))
    file.flush()


def read_records(path: Path) -> Iterator[Any]:
    """The values appended to a file, if it exists, without those cut short or damaged."""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        crc, _, body = line.partition(b" ")
        if crc == b"%08x" % zlib.crc32(body):
            yield json.loads(body)
