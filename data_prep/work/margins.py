"""The margins of padded images: of the color of the data set, which is known once all of it has been read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from data_prep.folder.writers import ImageRows, write_rows
from data_prep.sources.resize import fill_margins, inner
from data_prep.work.filling import Target, crc
from data_prep.work.journal import Done, Journal


def paint_margins(arrays: Mapping[str, Target], journal: Journal) -> tuple[int, int, int] | None:
    """Give the margins of all images the mean color of the training images inside of theirs, rounded half up.

    Painting again gives the same, so that an interrupted build may: a chunk is noted as it is painted, and one that was
    written but not noted is read again.

    Returns: the color (R, G, B), None where images are not padded.
    """
    if arrays["train"].rule.fit != "pad":
        return None
    total, count = np.zeros(3, np.int64), 0
    for _, _, block, sizes in _chunks(arrays["train"], journal):
        for image, size in zip(block, sizes, strict=True):
            inside = image[inner(size, len(image))]
            total += inside.sum((0, 1), dtype=np.int64)
            count += inside.shape[0] * inside.shape[1]
    red, green, blue = ((2 * total + count) // (2 * count)).tolist()
    for goal in arrays.values():
        for chunk, done, block, sizes in _chunks(goal, journal):
            for image, size in zip(block, sizes, strict=True):
                fill_margins(image, size, (red, green, blue))
            if crc(block) != done.crc:
                write_rows(goal.path, goal.positions(chunk).start, block)
                journal.add(goal.path.name, chunk, done._replace(crc=crc(block)))
    return red, green, blue


def _chunks(goal: Target, journal: Journal) -> Iterator[tuple[int, Done, NDArray[np.uint8], list[tuple[int, int]]]]:
    """The chunks of an array, with a copy of their images, and width and height of what lies inside the margins."""
    side = goal.rule.resolution
    with ImageRows(goal.path) as images:
        for chunk, done in list(journal.chunks[goal.path.name].items()):
            span = goal.positions(chunk)
            margins = {mark.position: mark.margin for mark in done.marks}
            each = (margins.get(position, 0) for position in range(span.stop - span.start))
            sizes = [(side + min(margin, 0), side - max(margin, 0)) for margin in each]
            yield chunk, done, images.block(span.start, span.stop).copy(), sizes
