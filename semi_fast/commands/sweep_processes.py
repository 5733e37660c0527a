"""Runs of a sweep in processes of their own, one a device at a time, stopped together."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.errors import UserError
from semi_fast.training.stopping import SIGNALS

COMMAND = [sys.executable, "-m", "semi_fast.train"]


class Job(NamedTuple):
    """One run: its name, the arguments of the training command, and the file that keeps its output."""

    name: str
    arguments: list[str]
    output: Path


class Outcome(NamedTuple):
    """How a run ended."""

    name: str
    code: int  # 0: finished; as the shell has it, 128 + n when signal n ended it
    last_line: str  # of its output


def run_all(
    jobs: Sequence[Job], devices: Sequence[str], after_each: Callable[[Outcome], None]
) -> tuple[list[Outcome], int | None]:
    """Run the jobs, as many at a time as there are devices, and wait for them.

    SIGINT and SIGTERM are passed on to the runs, which save themselves and end; no further one is started.

    Args:
        jobs: in the order to start them. devices: see `choose_devices`; [] runs one at a time on the CPU.
        after_each: called in this thread whenever a run has ended.

    Returns: how those that were started ended, and the signal that stopped the sweep, if any did.
    """
    running: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []
    lock = threading.RLock()  # a process starts before a signal or not at all
    idle = queue.SimpleQueue[str]()
    for device in devices or ["cpu"]:
        idle.put(device)
    threads = [f"threads={max(1, len(os.sched_getaffinity(0)) // len(devices))}"] if len(devices) > 1 else []

    def stop(signum: int, _: Any = None) -> None:
        with lock:
            signals.append(signum)
            for process in running:
                process.send_signal(signum)  # does nothing to one that has ended

    def run(job: Job) -> Outcome | None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        more = [] if any(text.startswith("threads=") for text in job.arguments) else threads
        device = idle.get()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        try:
            with job.output.open("ab") as file:
                with lock:
                    if signals:
                        return None
                    name = "the CPU" if device == "cpu" else f"GPU {device}"
                    print(f"[{job.name}] starts on {name}: {job.output}", flush=True)
                    # A session of its own: Ctrl-C of the terminal reaches it through this process alone, once.
                    # Open files are inherited: the lock of the sweep among them.
                    own: Any = {"start_new_session": True, "close_fds": False}
                    command = [*COMMAND, *job.arguments, *more]
                    process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, **own)
                    running.append(process)
                code = process.wait()
        finally:
            idle.put(device)
        lines = filter(str.strip, reversed(job.output.read_text(encoding="utf-8", errors="replace").split("\n")))
        return Outcome(job.name, code if code >= 0 else 128 - code, next(lines, "").strip())

    before = {name: signal.signal(name, stop) for name in SIGNALS}
    ended = []
    try:
        with ThreadPoolExecutor(len(devices) or 1) as pool:
            try:
                for future in as_completed([pool.submit(run, job) for job in jobs]):
                    outcome = future.result()
                    if outcome is not None:
                        print(f"[{outcome.name}] exit code {outcome.code}: {outcome.last_line}", flush=True)
                        ended.append(outcome)
                        after_each(outcome)
            except BaseException:  # nothing may outlive the sweep
                stop(signal.SIGTERM)
                raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ended, signals[0] if signals else None


def choose_devices(asked: str) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES has them; [] for the CPU.

    Args:
        asked: "auto" for every GPU this process may use, "cpu", or GPUs separated by commas.

    Raises: UserError for a GPU that this machine does not have.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    present = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    if asked == "auto":
        return present
    if asked == "cpu":
        return []
    wanted = [name.strip() for name in asked.split(",")]
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(present):
        known = f"GPUs {', '.join(present)}" if present else "no GPU"
        raise UserError(f"--devices reads auto, cpu, or GPUs such as 0,1, got '{asked}'; this machine has {known}.")
    return wanted
