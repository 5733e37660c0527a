"""What every benchmark shares: cases that take turns, and the JSON line with hardware, versions and commit.

A machine that does other work as well is slow for minutes and quick for moments. So every case has many short turns,
ratios are those of the fastest ones, and the quartiles say how restless the machine was.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from semi_fast.run.summary import code_commit

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"numba": "numba", "pillow": "pillow", "ffcv": "ffcv", "dali": "nvidia-dali-cuda130"}
INSTRUCTIONS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 BF16": "avx512_bf16", "AMX": "amx_bf16"}
RESULTS = Path(__file__).resolve().parent / "results"

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}  # allocations and views


def is_launched(operation: torch._ops.OpOverload) -> bool:
    """Whether a GPU would be given this operation: no view, allocation, profiler's mark or question about a tensor."""
    space, _, name = operation._schema.name.partition("::")
    return not (operation.is_view or space in ("prim", "profiler") or name in FREE)


class Launches(TorchDispatchMode):
    """Counts the operations in its block that a GPU would be given; a fused one over a list of tensors counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_launched(func)
        return func(*args, **(kwargs or {}))


# The clock of what one thread does: on a CPU the time that it computed, whatever else the machine did meanwhile.
ONE_THREAD = time.perf_counter if torch.cuda.is_available() else time.thread_time
Turn = Callable[[], float]  # runs once and returns its seconds


def timed(
    call: Callable[[], object],
    *,
    least: float = 0.0,
    of: float = 1.0,
    before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turn:
    """A turn of a case: the mean seconds of calls until `least` have passed, over `of`, what a call makes.

    With `least` the turn begins with a call that is not counted, which leaves caches and queues as the next one finds
    them, whichever case ran before. `before` is called ahead of each call, unclocked. On a CUDA device a call ends when
    the device has done it.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def once() -> float:
        if before is not None:
            before()
        wait()
        start = clock()
        call()
        wait()
        return clock() - start

    def turn() -> float:
        if least:
            once()
        seconds, calls = once(), 1
        while seconds < least:
            seconds, calls = seconds + once(), calls + 1
        return seconds / calls / of

    return turn


def in_turns(
    cases: Mapping[str, Turn | Sequence[Turn]], rounds: int, seconds: float = math.inf, *, warmup: int = 1
) -> dict[str, NDArray[np.float64]]:
    """What each case took in each round, (rounds, parts): most have one part.

    In each round the cases take their turns in an order drawn anew, so that what slows the machine down for a while
    meets all of them; `warmup` rounds are not counted. Ends after `rounds`, or, once there are three, after `seconds`.
    """
    order, begin = random.Random(0), 0.0
    times: dict[str, list[list[float]]] = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        if number == 0:
            begin = time.monotonic()
        if number >= 3 and time.monotonic() - begin > seconds:
            break
        for name in order.sample(list(cases), len(cases)):
            case = cases[name]
            took = [turn() for turn in ([case] if callable(case) else case)]
            times[name] += [took] if number >= 0 else []
    return {name: np.array(values) for name, values in times.items()}


def fastest(times: NDArray[np.float64]) -> float:
    """Of (rounds, parts): each part's fastest round, added up. What else the machine does only makes rounds slower."""
    return float(times.min(0).sum())


def spread(times: NDArray[np.float64]) -> dict[str, float]:
    """Of (rounds, parts) in seconds: the fastest and the quartiles of the rounds in microseconds, and their number."""
    values = (fastest(times), *np.quantile(times.sum(1), (0.25, 0.5, 0.75)))
    named = zip(("min", "q1", "median", "q3"), values, strict=True)
    return {**{name: float(f"{1e6 * value:.4g}") for name, value in named}, "rounds": len(times)}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, object]:
    """The processor with those of INSTRUCTIONS that it has, threads, GPU (None without one), and versions of what the
    figures depend on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    cpuinfo = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = cpuinfo.get("flags", "").split()
    return {
        "cpu": cpuinfo.get("model name") or platform.processor() or platform.machine(),
        "instructions": [name for name, flag in INSTRUCTIONS.items() if flag in flags],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: found for name, package in PACKAGES.items() if (found := installed(package))},
    }


def report(
    name: str,
    ratios: Mapping[str, float] | None = None,
    times: Mapping[str, NDArray[np.float64]] | None = None,
    of: str = "call",
    **figures: object,
) -> None:
    """Print the one JSON line: ratios, the spread of each case in microseconds of what it is `of`, other figures,
    hardware and commit."""
    rounded = {case: float(f"{ratio:.3g}") for case, ratio in (ratios or {}).items()}
    cases = {case: spread(values) for case, values in (times or {}).items()}
    line = {"benchmark": name, "ratios": rounded, "microseconds_of": of, "cases": cases, **figures}
    print(json.dumps({**line, "commit": code_commit(), "hardware": hardware()}), flush=True)


def options(text: str | None, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """A benchmark's command line: how many rounds at most, and for how long."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds at most (default {rounds})")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"no round begins after, but for the first three ({seconds:g})"
    )
    return parser
