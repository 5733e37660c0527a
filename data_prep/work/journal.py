"""What an unfinished build has done: a file of lines, appended as chunks finish, and a lock against a second build."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from data_prep.errors import UserError
from data_prep.files import append_record, read_records
from data_prep.sources.images import BadImage, Mark


class Done(NamedTuple):
    """A finished chunk: CRC-32 of its bytes in the array, the images that could not be read, the digest of the images
    it was made of, and the marks of those that have any."""

    crc: int
    bad: list[BadImage]
    digest: str
    marks: list[Mark]


class Journal:
    """Finished chunks by array name. A record half written when the process died, or damaged since, is none."""

    def __init__(self, path: Path) -> None:
        self.chunks: dict[str, dict[int, Done]] = {}
        for array, chunk, crc, bad, digest, marks in read_records(path):
            # Earlier versions noted numbers here, of arrays under names that no order has any more.
            kept = [Mark(*mark) for mark in marks if isinstance(mark, list)]
            self.chunks.setdefault(array, {})[chunk] = Done(crc, [BadImage(*b) for b in bad], digest, kept)
        self._file: IO[bytes] = open(path, "ab")  # noqa: SIM115 - open as long as the build lasts

    def add(self, array: str, chunk: int, done: Done) -> None:
        """Note that a chunk's bytes are in the array. (Whether they reached the disk, its CRC tells a later reader.)"""
        self.chunks.setdefault(array, {})[chunk] = done
        append_record(self._file, [array, chunk, *done])

    def marked(self, array: str) -> tuple[int, int]:
        """How many images of an array EXIF asks to turn, and how many are smaller than what they are resized to."""
        marks = [mark for done in self.chunks[array].values() for mark in done.marks]
        return sum(mark.rotated for mark in marks), sum(mark.enlarged for mark in marks)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def build_lock(out: Path) -> Iterator[None]:
    """Hold the folder `out` for one build. The kernel frees the lock when its process ends, however it ends.

    Raises: UserError naming the process that holds it.
    """
    path = out.parent / f".{out.name}.lock"
    file = _acquire(path, out)
    try:
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _acquire(path: Path, out: Path) -> IO[str]:
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open, it is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"Another build of {out} is running (process {holder}). Wait for it to end, or stop it."
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # the holder before us removed this file: lock the new one
