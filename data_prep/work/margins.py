"""The margins of padded images: of the color of the data set, which is known once all of it has been read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data_prep.folder.writers import ImageRows, write_rows
from data_prep.sources.resize import fill_margins, inner
from data_prep.work.filling import Target, crc
from data_prep.work.journal import Journal


def paint_margins(arrays: Mapping[str, Target], journal: Journal) -> tuple[int, int, int] | None:
    """Give the margins of all images the mean color of the training images inside of theirs, rounded half up.

    Painting again gives the same, so that an interrupted build may: a chunk is noted as it is painted, and one that was
    written but not noted is read again.

    Returns: the color (R, G, B), None where images are not padded.
    """
    if arrays["train"].rule.fit != "pad":
        return None
    total, count = np.zeros(3, np.int64), 0
    with ImageRows(arrays["train"].path) as images:
        for chunk, done in journal.chunks[arrays["train"].path.name].items():
            span = arrays["train"].positions(chunk)
            for image, margin in zip(images.block(span.start, span.stop), done.margins, strict=True):
                inside = image[inner(_size(margin, len(image)), len(image))]
                total += inside.sum((0, 1), dtype=np.int64)
                count += inside.shape[0] * inside.shape[1]
    red, green, blue = ((2 * total + count) // (2 * count)).tolist()
    for goal in arrays.values():
        _paint(goal, journal, (red, green, blue))
    return red, green, blue


def _paint(goal: Target, journal: Journal, color: tuple[int, int, int]) -> None:
    with ImageRows(goal.path) as images:
        for chunk, done in list(journal.chunks[goal.path.name].items()):
            span = goal.positions(chunk)
            block = images.block(span.start, span.stop).copy()
            for image, margin in zip(block, done.margins, strict=True):
                fill_margins(image, _size(margin, len(image)), color)
            if crc(block) != done.crc:
                write_rows(goal.path, span.start, block)
                journal.add(goal.path.name, chunk, done._replace(crc=crc(block)))


def _size(margin: int, side: int) -> tuple[int, int]:
    """Width and height of what lies inside the margins, given the one less the other."""
    return (side, side - margin) if margin >= 0 else (side + margin, side)
