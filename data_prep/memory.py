"""What becomes of memory that a process frees."""

from __future__ import annotations

import ctypes

MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD = -4, -3, -1  # of glibc's mallopt
LARGEST_PIECE = 32 * 2**20  # bytes: glibc on 64 bits takes no higher threshold


def keep_memory(most: int | None = None) -> None:
    """Let memory that this process frees stay its own, for what it needs next.

    glibc's malloc gives large pieces back to the operating system at once, and gets them back page by page and zeroed.
    Other C libraries have no such setting and keep their ways.

    Args:
        most: bytes to keep, of pieces of up to 32 MB; None: all of it, of pieces of any size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    if most is None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
    else:
        mallopt(MMAP_THRESHOLD, min(most, LARGEST_PIECE))
        mallopt(TRIM_THRESHOLD, most)
