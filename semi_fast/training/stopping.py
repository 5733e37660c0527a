"""Stopping on request: SIGTERM and Ctrl-C let the step under way end, so that the run can be saved first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """The run was asked to stop; it is saved. `signum` says by which signal."""

    def __init__(self, signum: int, step: int, saved: bool) -> None:
        self.signum = signum
        rest = "the same command goes on from there" if saved else "it could not be saved"
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step:,}; {rest}")


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second SIGINT ends the process at once, as Ctrl-C always does.

    Args:
        say: takes the line that says so.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signum: int | None = None
        self._say = say

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Within the block the signals are only remembered; afterwards they act as before."""
        before = {name: signal.signal(name, self._remember) for name in SIGNALS}
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def agreed(self, accel: Accelerator, log: bool) -> int | None:
        """The signal that came to any process; None when none came.

        Processes must agree on the step, and asking the others waits for a GPU: there only where `log` says that this
        step's figures are fetched anyway. Until then the answer is None.
        """
        if accel.num_processes == 1:
            return self.signum
        if not log and accel.device.type != "cpu":
            return None
        asked = torch.tensor(self.signum or 0, device=accel.device)
        return int(accel.gather(asked).max()) or None

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        self._say("stopping after this step, to save the run; Ctrl-C again ends at once")
