"""Images as records of equal size in large files: read one by one, never all at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.sources.images import Images
from data_prep.sources.resize import UnreadableError


class RecordImages(Images):
    """Uncompressed images, `side` x `side` in three planes (red, green, blue), one after the other in a file.

    Args:
        path: the file.
        offset: bytes before the first image.
        columns_first: whether a plane is stored column by column (MATLAB's order) rather than row by row.
        prefix: what to call an image in messages, followed by its number.
    """

    worth_processes = True

    def __init__(
        self,
        path: Path,
        labels: NDArray[np.int64],
        side: int,
        prefix: str,
        *,
        offset: int = 0,
        columns_first: bool = False,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:
        self.path, self.labels, self.side, self.prefix = path, labels, side, prefix
        self.offset, self.columns_first = offset, columns_first
        self.numbers = np.arange(len(labels)) if numbers is None else numbers

    def image(self, index: int) -> Image.Image:
        size = 3 * self.side * self.side
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset + int(self.numbers[index]) * size)
                data = file.read(size)
        except OSError as error:
            raise UnreadableError(f"cannot be read: {error.strerror}") from None
        if len(data) < size:
            raise UnreadableError("the file ends within the image")
        planes = np.frombuffer(data, np.uint8).reshape(3, self.side, self.side)
        return Image.fromarray(np.ascontiguousarray(planes.transpose((2, 1, 0) if self.columns_first else (1, 2, 0))))

    def name(self, index: int) -> str:
        return f"{self.prefix} {self.numbers[index]}"

    def take(self, indices: NDArray[np.int64]) -> RecordImages:
        return RecordImages(
            self.path,
            self.labels[indices],
            self.side,
            self.prefix,
            offset=self.offset,
            columns_first=self.columns_first,
            numbers=self.numbers[indices],
        )

    def folders(self) -> list[Path]:
        return []

    def digest(self) -> str:
        status = self.path.stat()
        form = f"{self.side} {self.offset} {self.columns_first}"
        facts = f"{self.path.name} {status.st_size} {status.st_mtime_ns} {form}"
        return hashlib.sha256(facts.encode() + self.labels.tobytes() + self.numbers.tobytes()).hexdigest()
