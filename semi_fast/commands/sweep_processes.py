"""Runs of a sweep in processes of their own, one a device at a time, stopped together."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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


class Processes:
    """The processes under way; `signum` is the first signal that came."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()  # of the list: a process starts before a signal or not at all

    def run(self, command: Sequence[str], environment: dict[str, str], output: Path) -> int | None:
        """Run a command and wait for it; returns its exit code, None where a signal came before it was started."""
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("ab") as file:
            with self._lock:
                if self.signum is not None:
                    return None
                # A session of its own: Ctrl-C of the terminal reaches it through this process alone, once.
                # Open files are inherited: the lock of the sweep among them.
                process = subprocess.Popen(
                    command, env=environment, stdout=file, stderr=file, start_new_session=True, close_fds=False
                )
                self._running.append(process)
            code = process.wait()
        return code if code >= 0 else 128 - code

    def stop(self, signum: int) -> None:
        """Pass a signal on to all, and start no further one."""
        with self._lock:
            self.signum = self.signum or signum
            for process in self._running:
                process.send_signal(signum)  # does nothing to one that has ended

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Within: SIGINT and SIGTERM stop the processes; so does an error, as nothing may outlive the sweep."""
        before = {name: signal.signal(name, lambda signum, _: self.stop(signum)) for name in SIGNALS}
        try:
            yield
        except BaseException:
            self.stop(signal.SIGTERM)
            raise
        finally:
            for name, previous in before.items():
                signal.signal(name, previous)


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
    processes, idle = Processes(), queue.SimpleQueue[str]()
    for device in devices or ["cpu"]:
        idle.put(device)
    threads = [f"threads={max(1, len(os.sched_getaffinity(0)) // len(devices))}"] if len(devices) > 1 else []

    def run(job: Job) -> Outcome | None:
        if processes.signum is not None:
            return None
        device = idle.get()
        print(f"[{job.name}] starts on {'the CPU' if device == 'cpu' else f'GPU {device}'}: {job.output}", flush=True)
        more = [] if any(text.startswith("threads=") for text in job.arguments) else threads
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        try:
            code = processes.run([*COMMAND, *job.arguments, *more], environment, job.output)
        finally:
            idle.put(device)
        return None if code is None else Outcome(job.name, code, _last_line(job.output))

    ended = []
    with ThreadPoolExecutor(len(devices) or 1) as pool, processes.stopped_by_signals():
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            outcome = future.result()
            if outcome is not None:
                print(f"[{outcome.name}] exit code {outcome.code}: {outcome.last_line}", flush=True)
                ended.append(outcome)
                after_each(outcome)
    return ended, processes.signum


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


def _last_line(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
