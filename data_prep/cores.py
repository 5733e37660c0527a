"""How many processor cores there are to use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, 1 or more: those it may run on, and no more than its control groups grant it.

    A container that is given two of sixty-four cores may run on all of them, but stands still once it has used up the
    time of two. Groups are those of Linux's version 2.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(granted_cores(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))))


def granted_cores(membership: Path, root: Path) -> float:
    """Cores that the process's group and those above it grant; those of the machine where none says.

    Args:
        membership: the file that names the group, in the line that begins with "0::".
        root: where the groups are.
    """
    granted = float(os.cpu_count() or 1)
    lines = membership.read_text().splitlines() if membership.exists() else []
    for name in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for folder in (root / name, *(root / name).parents):
            if folder.is_relative_to(root) and (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
                granted = min(granted, granted if quota == "max" else int(quota) / int(period))
    return granted
