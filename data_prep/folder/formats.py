"""The formats of a data folder besides its arrays: written beside them, going on where an interrupted call stood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.folder.beton import write_betons
from data_prep.folder.dali import write_dali
from data_prep.folder.finished import Files, finished_files, record_finished

PARTS = ("train", "test")
FORMS = {"ffcv": [f"{part}.beton" for part in PARTS], "dali": [f"{part}-dali" for part in PARTS]}


def words(forms: Sequence[str], kept_as: str) -> list[str]:
    """Formats as --format takes them: "ffcv:jpeg90" where train.beton keeps JPEGs."""
    return [f"{form}:{kept_as}" if form == "ffcv" and kept_as != "raw" else form for form in forms]


def write_formats(folder: Path, forms: Sequence[str], shard_images: int, arrays: str, kept_as: str = "raw") -> Files:
    """Write the arrays of a folder in further formats, beside them. Returns the entries of all their files.

    Args:
        forms: "ffcv", "dali"; other names are none.
        kept_as: how train.beton keeps images, "raw" or "jpeg90".
        arrays: says which arrays these are. What an interrupted call has finished of the same ones is kept where it is
            as it was then.
    """
    files: Files = {}
    if "ffcv" in forms:
        key = arrays if kept_as == "raw" else f"{arrays} {kept_as}"
        kept = finished_files(folder, "ffcv", key)
        lacking = [part for part in PARTS if f"{part}.beton" not in kept]
        if lacking:
            write_betons(folder, lacking, record=key, kept_as=kept_as)
        files |= finished_files(folder, "ffcv", key, check=False) if lacking else kept
    if "dali" in forms:
        key = f"{arrays} {shard_images}"
        whole = finished_files(folder, "dali", key)

        def finish(paths: Sequence[Path]) -> None:
            whole.update(record_finished(folder, "dali", key, paths))

        for part in PARTS:
            write_dali(folder, part, shard_images, whole, finish)
        files |= whole
    return files
