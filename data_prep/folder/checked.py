"""Whether files are as they were written: all of a small one is read at every start, of a large one once a machine.

A large file that was read, and had its checksum, is remembered in the user's cache folder by device, inode, size and
times of change. While all of these stay, SAMPLED blocks of it are read, others each time, and compared with their
digests as they were then. So whatever was written, moved or copied in its place is noticed, even if its time of change
was set back, but for what is written through a mapping of a file on tmpfs, which keeps no time of that; what the disk
changed by itself is noticed where it lies in one of these blocks, and by `build.py verify`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import append_record, read_records, replacing

LARGE = 1 << 26  # bytes of a file: what is smaller takes no time
BLOCK = 1 << 22
SAMPLED = 16  # blocks, the first and the last among them
SETTLED_SECONDS = 2.0  # since a change: one that follows sooner may leave coarse clocks as they are


def is_as_written(path: Path, sha256: str) -> bool:
    """Whether a file has this checksum (SHA-256, hex), as far as this machine has to read it to know.

    Processes that ask at the same time wait for the one that reads all of it. Raises: OSError.
    """
    with contextlib.ExitStack() as locked:
        if path.stat().st_size > LARGE:
            with contextlib.suppress(OSError, RuntimeError):  # without a cache folder every process reads all
                locked.enter_context(_locked(_record(path)))
            if _is_remembered(path, sha256):
                return True
        return has_checksum(path, sha256)


def has_checksum(path: Path, sha256: str) -> bool:
    """Whether a file has this checksum; all of it is read. A large one that has it is remembered. Raises: OSError."""
    whole, digests = hashlib.sha256(), []
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > LARGE:
            # Through a mapping a page is changed without a new time of change while it waits to be written to the disk.
            os.fsync(file.fileno())
        state, began = os.fstat(file.fileno()), time.time()
        while block := file.read(BLOCK):
            whole.update(block)
            digests.append(zlib.crc32(block))
    if whole.hexdigest() != sha256:
        with contextlib.suppress(OSError, RuntimeError):  # or sampling elsewhere would call it whole again
            _record(path).unlink(missing_ok=True)
        return False
    before = _facts(state, sha256)
    settled = state.st_ctime < began - SETTLED_SECONDS and _facts(path.stat(), sha256) == before
    if settled and state.st_size > LARGE:
        with contextlib.suppress(OSError, RuntimeError):
            _record(path).parent.mkdir(parents=True, exist_ok=True)
            with replacing(_record(path)) as record:
                append_record(record, [before, digests])
    return True


def _is_remembered(path: Path, sha256: str) -> bool:
    """Whether all of the file was read as it stands, and the sampled blocks are what they were."""
    try:
        facts = _facts(path.stat(), sha256)
        known = [digests for before, digests in read_records(_record(path)) if before == facts]
    except (OSError, RuntimeError, ValueError, TypeError):  # the last two: another version's record
        return False
    return bool(known) and _samples_agree(path, known[-1])


def _samples_agree(path: Path, digests: list[int]) -> bool:
    last = len(digests) - 1
    # Not from the generators of a run, which all its ranks seed alike.
    chosen = {0, last, *random.SystemRandom().sample(range(last + 1), max(0, min(last + 1, SAMPLED) - 2))}
    with open(path, "rb") as file:
        return all(zlib.crc32(os.pread(file.fileno(), BLOCK, BLOCK * i)) == digests[i] for i in sorted(chosen))


def _facts(state: os.stat_result, sha256: str) -> list[Any]:
    """What must stay for a reading to count."""
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, sha256]


def _record(path: Path) -> Path:
    """Where the reading of a file is remembered. Raises: OSError; RuntimeError where there is no home."""
    state, cache = path.stat(), os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    return folder / "semi-fast" / "checked" / f"{state.st_dev:x}-{state.st_ino:x}"


@contextlib.contextmanager
def _locked(record: Path) -> Iterator[None]:
    record.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{record}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
