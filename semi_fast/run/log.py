"""log.jsonl: one JSON object a line. What cannot be written is said and left out; it never ends a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import replacing

UNKNOWN = 2**62  # step of a damaged line: later than any


class LogWriter:
    """Writes the log of a run.

    Args:
        path: of log.jsonl; its folder exists by the first line.
        say: takes one line about trouble.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self._say = path, say
        self._lost = 0  # lines, since the last one that could be written

    def cut(self, step: int) -> int:
        """Drop the lines of later steps: a run that goes on from a checkpoint of `step` writes them again.

        Returns: the last step that training has written a line of; 0 where there is none.

        Raises: OSError when the log cannot be written.
        """
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept) if step else "")
        steps = [_step_of(line) for line in lines if '"kind": "train"' in line]
        return max((step for step in steps if step < UNKNOWN), default=0)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line, whole or not at all."""
        try:
            _append(self.path, (json.dumps(entry) + "\n").encode())
        except OSError as error:
            if not self._lost:
                self._say(f"warning: {self.path} cannot be written ({error.strerror}); training goes on without it.")
            self._lost += 1
            return
        if self._lost:
            self._say(f"{self.path} can be written again; {self._lost:,} lines are missing")
            self._lost = 0


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write what a user asked for to `path`, whole or not at all. Raises: UserError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def _append(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.fstat(handle).st_size
        try:
            while data:
                data = data[os.write(handle, data) :]
        except OSError:
            os.ftruncate(handle, end)  # no half line for the next one to be glued to
            raise
    finally:
        os.close(handle)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the half line of a process that was killed while writing it
        return UNKNOWN
