"""Files, whatever they hold: replaced whole, made durable, reserved, hashed, linked."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    Raises: OSError when there is no room.
    """
    with open(path, "wb") as file:
        allocate(file.fileno(), size)
        file.truncate(0)


def allocate(handle: int, size: int) -> None:
    """Give a file all its room. Raises OSError when the disk has none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


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
