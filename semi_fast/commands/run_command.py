"""What the commands beside training share: a user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from data_prep.errors import UserError

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]  # ClickException, wherever this typer keeps its click


def run_command(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0, 2 for a user's mistake, 130 when interrupted.

    Args:
        app: the command. argv: its arguments; None: those of the process.
    """
    try:
        return app(args=None if argv is None else list(argv), standalone_mode=False) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except USAGE_ERROR as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    return 2
