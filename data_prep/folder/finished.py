"""What an interrupted call has finished of a further format: its files, each with its checksum as it was then.

The record of a format, `.finished-<format>`, lies beside its files until the manifest lists them. Nothing is taken over
by its name: what is not as recorded is written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.files import append_record, read_records
from data_prep.folder.manifest import FileEntry, file_entry, problem_with

Files = dict[str, FileEntry]


def record_path(folder: Path, form: str) -> Path:
    """Where a format's record lies."""
    return folder / f".finished-{form}"


def finished_files(folder: Path, form: str, key: str, check: bool = True) -> Files:
    """The finished files of a format by relative name.

    Args:
        key: says what the files are made of: those recorded under another one do not count.
        check: read them, and leave out groups of which one is not as recorded.
    """
    files: Files = {}
    groups = {tuple(group): group for recorded, group in read_records(record_path(folder, form)) if recorded == key}
    for group in groups.values():
        entries = {name: FileEntry(**entry) for name, entry in group.items()}
        if not check or not any(problem_with(folder / name, entry) for name, entry in entries.items()):
            files |= entries
    return files


def record_finished(folder: Path, form: str, key: str, paths: Sequence[Path]) -> Files:
    """Note that these files, which count together, are whole and on the disk. Returns their entries."""
    entries = {path.relative_to(folder).as_posix(): file_entry(path) for path in paths}
    with open(record_path(folder, form), "ab") as file:
        append_record(file, [key, {name: entry.model_dump() for name, entry in entries.items()}])
    return entries
