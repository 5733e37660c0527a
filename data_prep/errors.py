"""What ends a command with one line: a user's mistake (the rule, the value got, the remedy), or an interruption."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

INTERRUPTED = "Interrupted. Run the same command again to go on where it stood."


class UserError(Exception):
    """Something the user can put right. The message is one line; command mains print it and exit with code 2."""


def unknown(kind: str, got: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest known one.

    Args:
        kind: what was named, in the singular ("data set", "method", "config key").
        got: the name given.
        known: the names that exist, in the order to print them.

    Returns: the error, to be raised by the caller.
    """
    names = [str(name) for name in known]
    folded = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(str(got).lower(), list(folded), n=1, cutoff=0.5)
    hint = f" Did you mean '{folded[near[0]]}'?" if near else ""
    return UserError(f"Unknown {kind} '{got}'.{hint} Known: {', '.join(names) or 'none'}.")


def end_at_once(*_: object) -> None:
    """A signal's handler for a process that has begun nothing: the line, and exit code 130."""
    os.write(2, f"{INTERRUPTED}\n".encode())
    os._exit(130)
