"""What a run prints: one live line in a terminal, plain lines in a pipe or a log, a closing box, or nothing."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console as Rich
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

if TYPE_CHECKING:
    from semi_fast.observe.meter import Window

REDRAW_SECONDS = 0.1  # at least between two drawings of the live line
FEWEST_COLUMNS, MOST_COLUMNS = 60, 100  # of the closing box


class _Line(tqdm):
    monitor_interval = 0  # no thread that watches over it


class Console:
    """Prints for one run. Live where stdout and stderr are a terminal that can rewrite a line, and no CI runs it.

    Otherwise no control codes are written: a line at every log window. Quiet: nothing but warnings, on stderr.

    Args:
        steps: of the whole run. step: those already done.
        quiet: whether only warnings are printed.
    """

    def __init__(self, steps: int, step: int = 0, *, quiet: bool = False) -> None:
        self.steps, self.quiet = steps, quiet
        self.live = not quiet and can_rewrite(sys.stdout) and can_rewrite(sys.stderr)
        self._line: _Line | None = None
        self._start, self._begun, self._warm = time.perf_counter(), step, False
        self._drawn = 0.0
        self._known: tuple[str, ...] = ()

    def say(self, line: str) -> None:
        """Print a line to stay."""
        if not self.quiet:
            self._write(line, sys.stdout)
        elif line.startswith("warning"):
            self.warn(line)

    def warn(self, line: str) -> None:
        """Print a line to stay on stderr, quiet or not."""
        self._write(line, sys.stderr)

    def begin(self, step: int) -> None:
        """Training starts, after `step` steps that were done before."""
        self._start, self._begun = time.perf_counter(), step
        self.step(step)

    def step(self, step: int) -> None:
        """A step is done: redraw the live line where enough time has passed."""
        if not self.live:
            return
        now = time.perf_counter()
        if step == self._begun + 1 and not self._warm:  # the first one compiles: no measure of the others
            self._start, self._begun, self._warm = now, step, True
        if now - self._drawn >= REDRAW_SECONDS:
            self._draw(step)

    def window(self, step: int, line: str, known: Sequence[str], *, keep: bool) -> None:
        """A log window is read.

        Args:
            line: what a pipe gets; a terminal only where `keep` is on.
            known: figures for the live line, what matters most first; a narrow terminal shows the first few.
        """
        self._known = tuple(known)
        if keep or not self.live:
            self.say(line)
        if self.live:
            self._draw(step)

    def box(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The closing figures: a box in a terminal, `name: value` lines elsewhere."""
        self.close()
        if self.quiet:
            return
        columns = terminal_columns()
        if not self.live or columns < FEWEST_COLUMNS:  # in a narrow box commands break where they cannot be copied
            print("\n".join(f"{name}: {text}" for name, text in rows), flush=True)
            return
        table = Table.grid(padding=(0, 2))
        for name, text in rows:
            table.add_row(Text(name, style="dim"), Text(text, overflow="fold"))
        Rich(file=sys.stdout, width=min(MOST_COLUMNS, columns), highlight=False).print(
            Panel(table, title=Text(title, style="bold green"))
        )

    def close(self) -> None:
        """Take the live line away."""
        if self._line is not None:
            self._line.leave = False
            self._line.close()
            self._line = None

    def _write(self, line: str, stream: TextIO) -> None:
        if self._line is None:
            print(line, file=stream, flush=True)
        else:
            self._line.write(line, file=stream)
            stream.flush()

    def _draw(self, step: int) -> None:
        self._drawn = time.perf_counter()
        if self._line is None:
            self._line = _Line(bar_format="{desc}", file=sys.stdout, leave=False, dynamic_ncols=True)
        done = f"step {step:,}/{self.steps:,} {100 * step // self.steps}%"
        fresh = step - self._begun
        left = (self._drawn - self._start) / fresh * (self.steps - step) if fresh else None
        eta = [] if left is None else [f"eta {duration(left)}"]
        self._line.set_description_str(fitting([done, *eta, *self._known], terminal_columns() - 1))


def can_rewrite(stream: TextIO) -> bool:
    """Whether a line on the stream can be written over: a terminal, not a dumb one, not the log of a CI service."""
    environment = os.environ.get("TERM", "") not in ("dumb", "unknown") and not os.environ.get("CI")
    return stream.isatty() and environment


def terminal_columns() -> int:
    """Width of the terminal; 80 where it does not tell."""
    return max(1, shutil.get_terminal_size((80, 24)).columns)


def fitting(parts: Sequence[str], width: int) -> str:
    """`first | second | ...` as far as whole parts fit; the first is cut where even it does not."""
    line = parts[0][:width]
    for part in filter(None, parts[1:]):
        if len(line) + len(part) + 3 > width:
            break
        line += f" | {part}"
    return line


def console_line(step: int, steps: int, window: Window, accuracy: float | None, seconds_left: float) -> str:
    """`step 12,000/250,000 | loss 0.412 | used 71% | 38,400 img/s | data wait 0.3% | acc 78.1 | eta 41m`."""
    loss = f"{window.logs['loss/total']:.3f}" if "loss/total" in window.logs else "not finite, all steps skipped"
    parts = [f"step {step:,}/{steps:,}", f"loss {loss}"]
    if "pseudo/used" in window.logs:
        parts.append(f"used {100 * window.logs['pseudo/used']:.0f}%")
    parts += [f"{window.images_per_s:,.0f} img/s", f"data wait {100 * window.data_wait:.1f}%"]
    if accuracy is not None:
        parts.append(f"acc {accuracy:.1f}")
    parts.append(f"eta {duration(seconds_left)}")
    return " | ".join(parts)


def live_parts(window: Window, accuracy: float | None) -> list[str]:
    """The figures of `console_line` for a line that may be narrow: what matters most first."""
    accuracies = [] if accuracy is None else [f"acc {accuracy:.1f}"]
    loss = [f"loss {window.logs['loss/total']:.3f}"] if "loss/total" in window.logs else ["loss not finite"]
    used = [f"used {100 * window.logs['pseudo/used']:.0f}%"] if "pseudo/used" in window.logs else []
    rate, wait = f"{window.images_per_s:,.0f} img/s", f"data wait {100 * window.data_wait:.1f}%"
    return [rate, *accuracies, *loss, *used, wait]


def duration(seconds: float) -> str:
    """`41m`, `2h05m`, `3d04h`, `12s`."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m" if minutes >= 10 else f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
