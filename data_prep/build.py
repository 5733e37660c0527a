"""Build data sets: python data_prep/build.py NAME [options]. See `list` and `NAME --help`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

if __package__ in (None, ""):  # started by path: Python put this folder first, where the project's root belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if __name__ == "__main__":  # nothing is begun before `main`, which looks after them itself
    from data_prep.errors import end_at_once

    signal.signal(signal.SIGINT, end_at_once)
    signal.signal(signal.SIGTERM, end_at_once)

if __name__ != "__mp_main__":  # worker processes import this file, and need no commands
    from data_prep.commands import app, main

    __all__ = ["app", "main"]

if __name__ == "__main__":
    sys.exit(main())
