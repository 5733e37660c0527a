"""What every benchmark shares: interleaved timing, and the JSON line with hardware, versions and commit."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data_prep.files import replacing

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"numba": "numba", "pillow": "pillow", "ffcv": "ffcv", "dali": "nvidia-dali-cuda130"}
RESULTS = Path(__file__).resolve().parent / "results"


def interleave(cases: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median wall seconds of one call of each case.

    The cases take turns, so that a machine that slows down for a while slows all of them and ratios stay fair.
    On a CUDA device each call is closed by a synchronize.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, object]:
    """CPU model, core count, GPU name (None without one) and versions of what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name, package in PACKAGES.items() if (found := installed(package))},
    }


def commit() -> str:
    """Short commit of the working tree, with `+` when it holds changes; `unknown` outside a checkout."""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def report(name: str, figures: dict[str, object], *, save: bool = False) -> None:
    """Print the one JSON line: the figures, then hardware and commit; with `save`, keep it in RESULTS too."""
    line = {"benchmark": name, **figures, "commit": commit(), "hardware": hardware()}
    print(json.dumps(line), flush=True)
    if save:
        with replacing(RESULTS / f"{name}.json") as file:
            file.write((json.dumps(line, indent=1) + "\n").encode())
