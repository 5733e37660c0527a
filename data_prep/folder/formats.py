"""The formats of a data folder besides its arrays: written beside them, going on where an interrupted call stood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.folder.beton import write_betons
from data_prep.folder.dali import write_dali
from data_prep.folder.finished import Files, finished_files, record_finished

PARTS = ("train", "test")
FORMS = {"ffcv": [f"{part}.beton" for part in PARTS], "dali": [f"{part}-dali" for part in PARTS]}


def write_formats(folder: Path, forms: Sequence[str], shard_images: int, arrays: str) -> Files:
    """Write the arrays of a folder in further formats, beside them. Returns the entries of all their files.

    Args:
        forms: "ffcv", "dali"; other names are none.
        arrays: says which arrays these are. What an interrupted call has finished of the same ones is kept where it is
            as it was then.
    """
    files: Files = {}
    if "ffcv" in forms:
        kept = finished_files(folder, "ffcv", arrays)
        lacking = [part for part in PARTS if f"{part}.beton" not in kept]
        if lacking:
            write_betons(folder, lacking, record=arrays)
        files |= finished_files(folder, "ffcv", arrays, check=False) if lacking else kept
    if "dali" in forms:
        key = f"{arrays} {shard_images}"
        whole = finished_files(folder, "dali", key)

        def finish(paths: Sequence[Path]) -> None:
            whole.update(record_finished(folder, "dali", key, paths))

        for part in PARTS:
            write_dali(folder, part, shard_images, whole, finish)
        files |= whole
    return files
