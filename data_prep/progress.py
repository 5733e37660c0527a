"""A line of progress on the terminal."""

from __future__ import annotations

import sys

from rich import progress as columns
from rich.console import Console
from rich.text import Text


class Bar:
    """How much of a work is done, on standard error; nothing where that is no terminal.

    Without a `total` the line appears with the first `update`. `total`, `update`, `reset` and `close` are what pooch
    asks of a bar.

    Args:
        unit: what is counted; "bytes" are shown in kB, MB and so on.
        total: units in all, 0 where it is not known yet.
    """

    def __init__(self, label: str, unit: str, total: int = 0, *, shown: bool = True) -> None:
        self.total, self._label, self._unit = total, label, unit
        self._shown = shown and sys.stderr.isatty()
        self._progress: columns.Progress | None = None
        if total:
            self.update(0)

    def update(self, count: int) -> None:
        """So many more units are done."""
        if not self._shown:
            return
        if self._progress is None:
            self._progress = columns.Progress(*_columns(self._unit), console=Console(stderr=True))
            self._progress.start()
            self._progress.add_task(self._label, total=self.total or None)
        self._progress.advance(self._progress.task_ids[0], count)

    def reset(self) -> None:
        """Nothing is done."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=0)

    def close(self) -> None:
        """Leave the line as it is."""
        if self._progress is not None:
            self._progress.stop()
        self._shown = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _columns(unit: str) -> list[columns.ProgressColumn]:
    counts = [columns.MofNCompleteColumn(), columns.TextColumn(unit), _Rate()]
    if unit == "bytes":
        counts = [columns.DownloadColumn(), columns.TransferSpeedColumn()]
    left = columns.TimeRemainingColumn(elapsed_when_finished=True)
    return [columns.TextColumn("{task.description}"), columns.BarColumn(), *counts, left]


class _Rate(columns.ProgressColumn):
    def render(self, task: columns.Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f}/s")
