"""The embedded data set: built on the first run, so that training needs neither network nor preparation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_prep.folder.manifest import MANIFEST_NAME
from data_prep.work.builder import build_dataset

NAME = "digits-lt"


def build_missing_digits(path: str, say: Callable[[str], None] = print) -> None:
    """Build digits-lt where `path` is its default folder and nothing is there; other sets are the user's to build.

    Raises: UserError when the folder holds something else.
    """
    folder = Path("data") / NAME
    if Path(path) == folder and not (folder / MANIFEST_NAME).exists():
        build_dataset(NAME, folder, progress=False, say=say)
