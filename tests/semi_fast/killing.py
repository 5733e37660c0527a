"""A training session in a process of its own that is killed (-9) at a moment chosen beforehand.

The sessions are forked from a process that has everything imported, so that each starts in well under a second.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from random import Random
from typing import NamedTuple

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401 - here and below: what a run imports on its way, imported once for all sessions
import torch._dynamo
import torch.distributed.fsdp  # noqa: F401

from data_prep import files as disk
from semi_fast.run import checkpoint
from semi_fast.run.run import Run
from semi_fast.train import cli

FILE_OPERATIONS = 24  # about those of one save: three tensor files, state, renames, deletions
SECONDS = 0.1  # longer than a step, about as long as a step with a save


class Moment(NamedTuple):
    """When to die: `delay` seconds after the session's `step`th step, or just before its `operation`th file operation.

    With `torn`, the file that is being written at that operation is left half there. With `pause` the session stands
    still for so many seconds after that step, before anything is logged, and dies.
    """

    step: int | None = None
    delay: float = 0.0
    operation: int | None = None
    torn: bool = False
    pause: float = 0.0


def random_moment(random: Random) -> Moment:
    """Half of them anywhere, half within a save."""
    if random.random() < 0.5:
        return Moment(step=random.randint(1, 8), delay=random.uniform(0, SECONDS))
    return Moment(operation=random.randint(1, 2 * FILE_OPERATIONS), torn=random.random() < 0.5)


def run_session(argv: list[str], moment: Moment | None = None) -> int:
    """Train in a fresh process; returns its exit code, -9 when it died at its moment."""
    _own_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_session, args=(argv, moment))
    process.start()
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the session hangs")
    return process.exitcode


@cache
def _own_server() -> None:
    """Sessions are forked from a server that has all of this imported, and not from one that a build has started."""
    forkserver._forkserver._stop()
    multiprocessing.set_forkserver_preload([__name__])


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _session(argv: list[str], moment: Moment | None) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    os.environ.pop("WANDB_SERVICE", None)  # that of the tests' own process, which outlives this one
    if moment is not None and moment.step is not None:
        _die_after_step(moment.step, moment.delay, moment.pause)
    if moment is not None and moment.operation is not None:
        _die_before_operation(moment.operation, moment.torn)
    sys.exit(cli(argv))


def _die_after_step(step: int, delay: float, pause: float) -> None:
    tick, done = Run.tick, [0]

    def counted(self: Run, *args: object) -> None:
        done[0] += 1
        if done[0] == step:
            threading.Timer(pause or delay, _die).start()
            time.sleep(2 * pause)
        tick(self, *args)

    Run.tick = counted


def _die_before_operation(operation: int, torn: bool) -> None:
    done = [0]

    def counted(function):
        def call(*args, **kwargs):
            done[0] += 1
            if done[0] == operation:
                if torn and function is checkpoint.save_file:
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                _die()
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (checkpoint, "save_file"),
        (disk, "fsync_path"),
        (shutil, "rmtree"),
        (os, "replace"),
        (os, "rmdir"),
        (os, "unlink"),
        (Path, "rename"),
        (Path, "mkdir"),
        (Path, "write_text"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
