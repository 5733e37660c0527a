"""FFCV's format: the same rows in the same order as the array, image (field "image") and label (field "label").

Images are raw pixels, so that what is read is the array's to the bit. `train.beton` may keep them as JPEG of quality 90
instead, a fifth or less of the bytes: training then reads what that leaves. Test images are raw always.

FFCV's writer hangs when its worker fails, and, killed, leaves a file that opens and holds garbage. So it runs in a
process group of its own, under a watchdog, into a temporary name; every image is read back and compared before the
rename.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import fsync_path, reserve
from data_prep.folder.finished import record_finished
from data_prep.folder.writers import ImageRows

JPEG, QUALITY = "jpeg90", 90
STALL_SECONDS = 120.0  # without a byte written or a row compared, the writer has hung
BEAT_ROWS = 64
HEADER = 1 << 10  # bytes by which a JPEG of quality 90 may be larger than the raw pixels, of small images
ROOT = Path(__file__).resolve().parents[2]


def require_ffcv() -> None:
    """Raises: UserError when FFCV is not installed."""
    if importlib.util.find_spec("ffcv") is None:
        raise UserError("--format ffcv needs FFCV, which is not installed. Install it: pip install -e '.[ffcv]'")


def write_betons(
    folder: Path,
    parts: Sequence[str],
    stall_seconds: float = STALL_SECONDS,
    record: str | None = None,
    kept_as: str = "raw",
) -> None:
    """Write `<part>.beton` from `<part>.npy`, (N, H, W, 3) uint8, and `<part>_labels.npy`, (N,) int64, in `folder`.

    Args:
        record: the key under which each file is recorded (finished.py) as soon as it is whole; None records nothing.
        kept_as: how train.beton keeps images, "raw" or "jpeg90".

    Raises: UserError when the writer fails, hangs or writes something else than these rows; OSError when the disk has
        no room. Nothing unfinished is left then.
    """
    require_ffcv()
    temporary = {part: _temporary(folder, part) for part in parts}
    try:
        for part, path in temporary.items():  # without room the writer would hang: better to know before it starts
            reserve(path, _size(folder / f"{part}.npy"))
        _run_writer(folder, parts, stall_seconds, record, kept_as)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _page(image_bytes: int) -> int:
    """Bytes of a page, FFCV's unit of writing: it must hold at least an image."""
    return 1 << (21 if image_bytes <= 1 << 18 else 23)


def _size(path: Path) -> int:
    """Bytes that the FFCV file of an array takes at most."""
    with ImageRows(path) as images:
        image_bytes = int(np.prod(images.shape[1:])) + HEADER
        page = _page(image_bytes)
        tables = 128 * len(images)  # each row's fields, and where its image lies
        return (-(-len(images) // (page // image_bytes)) + 2) * page + tables


def _temporary(folder: Path, part: str) -> Path:
    return folder / f".{part}.beton.tmp"


def _run_writer(folder: Path, parts: Sequence[str], stall_seconds: float, record: str | None, kept_as: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["NUMBA_DISABLE_JIT"] = "1"  # the writer needs none of what FFCV compiles when it is imported (8 s)
    # Nor numba's threads. With those of TBB, and one core, a process that has forked hangs at its end.
    environment["NUMBA_THREADING_LAYER"] = "workqueue"
    command = [sys.executable, "-m", "data_prep.folder.beton", str(folder.absolute()), record or "", kept_as, *parts]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment
        )
        try:
            _watch(process, folder, [_temporary(folder, part) for part in parts], stall_seconds)
        finally:
            _end_group(process)
        if process.returncode != 0:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise UserError(f"FFCV's writer failed for {folder}: {lines[-1]} (exit code {process.returncode}).")


def _watch(process: subprocess.Popen[bytes], folder: Path, files: list[Path], stall_seconds: float) -> None:
    """Wait for the writer to end; give it up when its files have not changed for `stall_seconds`."""
    last: list[int] = []
    since = time.monotonic()
    while True:
        try:
            process.wait(timeout=min(1.0, stall_seconds / 4))
            return
        except subprocess.TimeoutExpired:
            pass
        state = [stamp for file in files if file.exists() for stamp in (file.stat().st_size, file.stat().st_mtime_ns)]
        if state != last:
            last, since = state, time.monotonic()
        elif time.monotonic() - since > stall_seconds:
            raise UserError(f"FFCV's writer for {folder} wrote nothing for {stall_seconds:g} s and was stopped.")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the writer with its own worker processes, which would live on otherwise.

    First by SIGTERM, which Python's resource tracker among them survives, to give back the writer's shared memory.
    """
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + patience
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.02)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


class _Samples:
    """Rows for FFCV's writer; opened in the process that reads them."""

    def __init__(self, images: Path, labels: Path) -> None:
        self.path, self.labels = images, np.load(labels)
        self.images: ImageRows | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        if self.images is None:
            self.images = ImageRows(self.path)
        return self.images[row], int(self.labels[row])


def _write(folder: Path, part: str, kept_as: str = "raw") -> None:
    """In the writer's process: write, then read back and compare."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    samples, output = _Samples(folder / f"{part}.npy", folder / f"{part}_labels.npy"), _temporary(folder, part)
    with ImageRows(samples.path) as images:
        page, jpeg = _page(images[0].nbytes + HEADER), part == "train" and kept_as == JPEG
        image = RGBImageField(write_mode="jpg" if jpeg else "raw", jpeg_quality=QUALITY)
        fields = {"image": image, "label": IntField()}
        # One worker: the file is then the same, byte for byte, each time.
        DatasetWriter(str(output), fields, page_size=page, num_workers=1).from_indexed_dataset(samples)
        # What is read back is not written: a new time of change tells the watchdog that this goes on, however slowly.
        compare_beton(output, images, samples.labels, jpeg=jpeg, beat=lambda: os.utime(output))


def _keep(folder: Path, part: str, record: str) -> None:
    """Give a file that was compared its name, and record it."""
    temporary, path = _temporary(folder, part), folder / f"{part}.beton"
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(folder)
    if record:
        record_finished(folder, "ffcv", record, [path])


def compare_beton(
    path: Path,
    images: ImageRows,
    labels: NDArray[np.int64],
    jpeg: bool = False,
    beat: Callable[[], object] = lambda: None,
) -> None:
    """Check an FFCV file against the arrays it was made of: allocation table, every label, every image's bytes.

    Args:
        jpeg: whether it must hold the images as JPEG: then its bytes are those that the same encoder gives once more.
        beat: called every BEAT_ROWS images.

    Raises: UserError naming what differs.
    """
    from ffcv.fields.rgb_image import encode_jpeg
    from ffcv.reader import Reader

    try:
        reader = Reader(str(path))
    except (ValueError, AssertionError, IndexError, OverflowError) as error:
        raise UserError(f"{path} is damaged: {error}. Build it again.") from None
    if not reader.header["alloc_table_ptr"] or len(reader.alloc_table) != len(labels):
        raise UserError(f"{path} is unfinished: its allocation table is missing. Build it again.")
    image_fields, stored_labels = (reader.metadata[name] for name in reader.metadata.dtype.names)
    if not np.array_equal(stored_labels, labels):
        raise UserError(f"{path} is damaged: its labels differ from the array's. Build it again.")
    pointers = image_fields[next(name for name in image_fields.dtype.names if "ptr" in name)]
    with open(path, "rb") as file:
        for row, pointer in enumerate(pointers.tolist()):
            if row % BEAT_ROWS == 0:
                beat()
            expected = (encode_jpeg(images[row], QUALITY) if jpeg else images[row]).tobytes()
            if os.pread(file.fileno(), len(expected), pointer) != expected:
                raise UserError(f"{path} is damaged: image {row} differs from the array's. Build it again.")


def _end_with_parent() -> None:
    """End this process group when the build's process goes away: its end of the pipe then closes."""
    os.read(0, 1)  # not through sys.stdin: its lock, held here, would block the writer's own forked processes
    os.killpg(os.getpgid(0), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for name in sys.argv[4:]:
            _write(Path(sys.argv[1]), name, sys.argv[3])
            _keep(Path(sys.argv[1]), name, sys.argv[2])
    except UserError as problem:
        sys.exit(str(problem))
