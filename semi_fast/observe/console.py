"""What a run prints: one live line in a terminal, plain lines in a pipe or a log, a closing box, or nothing."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console as Rich
from rich.control import Control
from rich.panel import Panel
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

REDRAW_SECONDS = 0.1  # at least between two drawings of the live line
FEWEST_COLUMNS, MOST_COLUMNS = 60, 100  # of the closing box
ERASE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Console:
    """Prints for one run. Live where stdout and stderr are a terminal that can rewrite a line, and no CI runs it.

    Otherwise no control codes are written: a line at every log window. Quiet: nothing but warnings, on stderr.

    Args:
        steps: of the whole run.
        quiet: whether only warnings are printed.
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        self.steps, self.quiet = steps, quiet
        self.live = not quiet and can_rewrite(sys.stdout) and can_rewrite(sys.stderr)
        self._line = ""  # the live line as it stands on the screen
        self._drawn = 0.0
        self._figures: tuple[str, ...] = ()  # of the last window, what matters most first

    def say(self, line: str) -> None:
        """Print a line to stay."""
        if not self.quiet:
            self._write(line, sys.stdout)
        elif line.startswith("warning"):
            self.warn(line)

    def warn(self, line: str) -> None:
        """Print a line to stay on stderr, quiet or not."""
        self._write(line, sys.stderr)

    def step(self, step: int, seconds_left: Callable[[], float | None] = lambda: None) -> None:
        """`step` steps are done: redraw the live line where enough time has passed, and only then ask what is left."""
        if self.live and time.perf_counter() - self._drawn >= REDRAW_SECONDS:
            self._draw(step, seconds_left())

    def window(
        self, step: int, figures: Mapping[str, Any], accuracy: float | None, seconds_left: float | None, *, keep: bool
    ) -> None:
        """A log window is read: a plain line for a pipe, in a terminal only where `keep` is on.

        Args:
            figures: of the window, by the names of the log.
            accuracy: the newest one, in percent.
        """
        self._figures = tuple(live_parts(figures, accuracy))
        if keep or not self.live:
            self.say(console_line(step, self.steps, figures, accuracy, seconds_left))
        if self.live:
            self._draw(step, seconds_left)

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
        self._show("")

    def _write(self, line: str, stream: TextIO) -> None:
        live = self._line
        self._show("")
        print(line, file=stream, flush=True)
        self._show(live)

    def _draw(self, step: int, seconds_left: float | None) -> None:
        self._drawn = time.perf_counter()
        done = f"step {step:,}/{self.steps:,} {100 * step // self.steps}%"
        parts = [done, *_eta(seconds_left), *self._figures]
        self._show(fitting(parts, terminal_columns() - 1))

    def _show(self, line: str) -> None:
        if line or self._line:
            screen = Rich(file=sys.stdout, force_terminal=True, highlight=False)
            with screen:  # one write
                screen.control(ERASE)
                screen.print(Text(line), end="", soft_wrap=True)
        self._line = line


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


def console_line(
    step: int, steps: int, figures: Mapping[str, Any], accuracy: float | None, seconds_left: float | None
) -> str:
    """`step 12,000/250,000 | loss 0.412 | used 71% | 38,400 img/s | data wait 0.3% | acc 78.1 | eta 41m`."""
    loss, used, rate, wait, test = _parts(figures, accuracy)
    loss = loss or ["loss not finite, all steps skipped"]
    return " | ".join([f"step {step:,}/{steps:,}", *loss, *used, *rate, *wait, *test, *_eta(seconds_left)])


def live_parts(figures: Mapping[str, Any], accuracy: float | None) -> list[str]:
    """The figures of `console_line` for a line that may be narrow: what matters most first."""
    loss, used, rate, wait, test = _parts(figures, accuracy)
    return [*rate, *test, *(loss or ["loss not finite"]), *used, *wait]


def _parts(figures: Mapping[str, Any], accuracy: float | None) -> tuple[list[str], ...]:
    """Loss, pseudo-labels used, rate, data wait and accuracy as they are printed; empty where there is none."""
    formats = {
        "loss/total": lambda value: f"loss {value:.3f}",
        "pseudo/used": lambda value: f"used {100 * value:.0f}%",
        "throughput/images_per_s": lambda value: f"{value:,.0f} img/s",
        "time/data_wait_share": lambda value: f"data wait {100 * value:.1f}%",
    }
    parts = [[text(figures[name])] if name in figures else [] for name, text in formats.items()]
    return *parts, [] if accuracy is None else [f"acc {accuracy:.1f}"]


def _eta(seconds_left: float | None) -> list[str]:
    return [] if seconds_left is None else [f"eta {duration(seconds_left)}"]


def duration(seconds: float) -> str:
    """`41m`, `2h05m`, `3d04h`, `12s`."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m" if minutes >= 10 else f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"
