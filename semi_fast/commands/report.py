"""Write a run's report: `python -m semi_fast report runs/NAME [more runs ...] [--open] [--out FILE]`.

One run gives its report, several a comparison. The page needs no network; its figures lie beside it as SVG, PNG, CSV.
"""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from semi_fast.commands.run_command import run_command
from semi_fast.reporting import write_report
from semi_fast.run.saved import STEP_HELP, step_named

app = typer.Typer(add_completion=False)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, finished or not. Several: a comparison.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file. Default: report.html in the run, comparison.html beside the first of several."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data folder, where it has moved. Default: the one the run was trained on.")
    ] = None,
    step: Annotated[str | None, typer.Option(help=STEP_HELP)] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write the report of a run, or the comparison of several, as one HTML file that needs no network."""
    path = write_report(runs, out, data=data, step=step_named(step))
    print(path)
    if open_it and not webbrowser.open(path.resolve().as_uri()):
        print(f"no browser could be started; open {path.resolve()}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, or 2 for a user's mistake."""
    return run_command(app, argv)


if __name__ == "__main__":
    sys.exit(main())
