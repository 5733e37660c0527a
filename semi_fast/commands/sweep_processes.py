"""Runs of a sweep in processes of their own, one a device at a time, stopped together."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from data_prep.errors import UserError
from semi_fast.training.stopping import SIGNALS

COMMAND = [sys.executable, "-m", "semi_fast.train"]
Job = tuple[str, list[str], Path]  # name, arguments of the training command, where its output is kept


class Outcome(NamedTuple):
    """How a process ended."""

    name: str
    code: int  # 0: finished; as the shell has it, 128 + n when signal n ended it
    last_words: str  # its last line


class Outcomes(NamedTuple):
    """How all of them ended; those that a signal kept from starting are not among them."""

    ended: list[Outcome]
    signum: int | None  # the signal that stopped the sweep


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


def run_all(jobs: Sequence[Job], devices: Sequence[str], after_each: Callable[[Outcome], None]) -> Outcomes:
    """Run the jobs, as many at a time as there are devices, and wait for them.

    SIGINT and SIGTERM are passed on to the runs, which save themselves and end; no further one is started.

    Args:
        jobs: in the order to start them. devices: see `choose_devices`; [] runs one at a time on the CPU.
        after_each: called in this thread whenever a run has ended.
    """
    waiting, ended = list(jobs), []
    idle, done = list(devices) or ["cpu"], queue.SimpleQueue[tuple[str, Outcome]]()
    share = max(1, len(os.sched_getaffinity(0)) // len(idle))
    with Children() as children:
        while children.running or (waiting and children.signum is None):
            while waiting and idle and children.signum is None:
                children.start(waiting.pop(0), idle.pop(0), share if len(devices) > 1 else None, done)
            try:
                device, outcome = done.get(timeout=1.0)
            except queue.Empty:
                continue
            idle.append(device)
            children.running.pop(outcome.name)
            ended.append(outcome)
            after_each(outcome)
        return Outcomes(ended, children.signum)


class Children:
    """The running processes. Within the `with` block signals are passed on to them."""

    def __init__(self) -> None:
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.signum: int | None = None

    def __enter__(self) -> Children:
        self._before = {name: signal.signal(name, self._pass_on) for name in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        for process in self.running.values():  # only after an error: nothing may outlive the sweep
            process.terminate()

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        for process in list(self.running.values()):
            process.send_signal(signum)

    def start(self, job: Job, device: str, threads: int | None, done: queue.SimpleQueue[tuple[str, Outcome]]) -> None:
        """Start one run; a thread shows its output and puts how it ended into `done`."""
        name, arguments, log = job
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device}
        more = [f"threads={threads}"] if threads and not any(text.startswith("threads=") for text in arguments) else []
        log.parent.mkdir(parents=True, exist_ok=True)
        where = "the CPU" if device == "cpu" else f"GPU {device}"
        print(f"[{name}] starts on {where}", flush=True)
        process = subprocess.Popen(
            [*COMMAND, *arguments, *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a Ctrl-C of the terminal reaches them through this process alone, once
            close_fds=False,  # they hold the sweep's lock
        )
        self.running[name] = process
        if self.signum is not None:  # it came between the decision and the start
            process.send_signal(self.signum)
        threading.Thread(target=_follow, args=(name, process, log, device, done), daemon=True).start()


def _follow(
    name: str,
    process: subprocess.Popen[str],
    log: Path,
    device: str,
    done: queue.SimpleQueue[tuple[str, Outcome]],
) -> None:
    """Show a run's output line by line, with its name, and keep it; then say how it ended."""
    start, last = time.perf_counter(), ""
    assert process.stdout is not None
    with log.open("a", encoding="utf-8") as kept, process.stdout:
        for line in process.stdout:
            last = line.strip() or last
            kept.write(line)
            kept.flush()
            print(f"[{name}] {line}", end="", flush=True)
    code = process.wait()
    code = code if code >= 0 else 128 - code
    how = "finished" if code == 0 else f"ended with exit code {code}"
    print(f"[{name}] {how} after {time.perf_counter() - start:.0f} s", flush=True)
    done.put((device, Outcome(name, code, last)))
