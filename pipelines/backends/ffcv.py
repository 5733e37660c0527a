"""Back end `ffcv`: images of .beton files are read ahead, the fused kernel makes the views.

FFCV's reader says where in a file the images lie. Raw pixels the kernel takes from there, the file being mapped into
memory, once a thread has had the disk deliver them: FFCV's decoder would copy them.

JPEGs are decoded by FFCV, in several threads, a batch each in turn. Its loader is used below its public iterator,
because that one can hang for ever (an exception in its thread is lost), leaks a thread for each loop left early, only
resumes at an epoch's start, and sets the thread counts of the whole process. A thread decodes with one worker, since
with more, FFCV runs it on numba's thread pool, which other kernels of the process may be using.
"""

from __future__ import annotations

import math
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice, takewhile
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from pipelines.arrays import Arrays, verify

TESTED = "1.0.2"  # this module leans on how FFCV works inside
READ_TIMEOUT = 120.0  # seconds without a batch after which reading has failed; the first one includes compiling
AHEAD = 1 << 24  # bytes of raw pixels read ahead at a time: handing over so many costs no more than handing over one
_OTHERWISE = "or use the back end resident"
_MODES = {"jpeg90": 0, "raw": 1}  # FFCV's codes for how images are stored


class FfcvReader:
    """Reads train.beton and test.beton of a data folder.

    Args:
        gpu: where the views are made, when that is a GPU.
        threads: that decode images which are kept as JPEG.

    Raises: UserError when FFCV is missing or untested, or a file is missing or damaged. A file is compared with its
        checksum first: FFCV itself would crash on some damaged files, hang on others and read garbage from the rest.
    """

    name = "ffcv"

    def __init__(self, arrays: Arrays, gpu: torch.device | None = None, threads: int = 1) -> None:
        require_ffcv()
        self._gpu, self._threads = gpu, threads
        self._stored: dict[str, RawPixels | Path] = {}
        for split, images in (("train", arrays.train), ("test", arrays.test)):
            path, kept_as = (
                arrays.folder / f"{split}.beton",
                arrays.manifest.origin.beton if split == "train" else "raw",
            )
            if path.name not in arrays.manifest.files:
                raise UserError(f"{arrays.folder} has no {path.name}. Build it with --format ffcv, {_OTHERWISE}")
            verify(arrays.folder, path.name, arrays.manifest)
            with _thread_counts_kept():
                first = check_beton(path, images, kept_as)
            self._stored[split] = RawPixels(path, first, images.shape[1:]) if kept_as == "raw" else path
        self._loaders: dict[int, Any] = {}

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """For each array of row ids, at most `most` long: images (N, H, W, 3) uint8, and where among them theirs are.

        The images are valid until the next ones are asked for. Threads end when the iterator is closed or dropped.
        Raises: UserError when reading fails, or delivers nothing within `READ_TIMEOUT` seconds.
        """
        stored = self._stored[split]
        if isinstance(stored, Path):
            yield from self._decoded(stored, rows, most)
            return
        for index in stored.read(rows, most):
            if self._gpu is None:
                yield stored.images, index
            else:
                yield stored.images[torch.from_numpy(index)], np.arange(len(index), dtype=np.int64)

    def _decoded(
        self, path: Path, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        turns = Turns(rows, self._threads)
        loader = self._loader(path, most)
        threads = [start_reading(loader, turns.of(i)) for i in range(self._threads)]
        try:
            for thread in cycle(threads):
                if (images := thread.receive()) is None:
                    return
                yield torch.from_numpy(images), np.arange(len(images), dtype=np.int64)
        finally:
            turns.stop()
            for thread in threads:
                thread.stop()

    def close(self) -> None:
        self._stored.clear()
        self._loaders.clear()

    def _loader(self, path: Path, most: int) -> Any:
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader

        if most not in self._loaders:
            pipelines = {"image": [SimpleRGBImageDecoder()], "label": None}
            with _thread_counts_kept():
                ahead = {} if self._threads == 1 else {"batches_ahead": 1}  # of each thread
                self._loaders[most] = Loader(
                    str(path), most, num_workers=1, os_cache=True, pipelines=pipelines, **ahead
                )
        return self._loaders[most]


class RawPixels:
    """The raw images of a .beton, mapped into memory.

    images: (N, H, W, 3) uint8, one from every byte of the file on; those that are any lie where FFCV has put them.

    Args:
        first: where each row's image begins, (rows,) int64.
        shape: of an image, (H, W, 3).
    """

    def __init__(self, path: Path, first: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        self._path, self._first, self._size = path, first, math.prod(shape)
        self._bytes = np.memmap(path, np.uint8, "c")  # writable, or torch would warn
        strides = (1, shape[1] * shape[2], shape[2], 1)
        self.images = torch.from_numpy(self._bytes).as_strided((len(self._bytes) - self._size + 1, *shape), strides)
        self._touched = np.array([*range(0, self._size, PAGESIZE), self._size - 1])

    def read(self, rows: Iterable[NDArray[np.int64]], most: int) -> Iterator[NDArray[np.int64]]:
        """For each array of row ids, at most `most` long, where in `images` theirs are, once these are in memory."""
        stopped, rows = threading.Event(), takewhile(lambda _: not stopped.is_set(), rows)

        def ahead() -> list[NDArray[np.int64]]:
            found = [self._first[wanted] for wanted in islice(rows, max(1, AHEAD // (most * self._size)))]
            for index in found:
                self._bytes.take(index[:, None] + self._touched)  # without the interpreter's lock
            return found

        with futures.ThreadPoolExecutor(1, "ffcv") as thread:
            try:
                coming = thread.submit(ahead)
                while found := self._received(coming):
                    coming = thread.submit(ahead)
                    yield from found
            finally:
                stopped.set()

    def _received(self, coming: futures.Future[list[NDArray[np.int64]]]) -> list[NDArray[np.int64]]:
        try:
            return coming.result(READ_TIMEOUT)
        except futures.TimeoutError:
            raise silent(self._path) from None
        except Exception as error:
            raise failed(self._path, error) from error


def silent(path: str | Path) -> UserError:
    """The error of a file of which nothing comes."""
    return UserError(f"FFCV read nothing from {path} for {READ_TIMEOUT:g} s. Check the disk, {_OTHERWISE}")


def failed(path: str | Path, error: Exception) -> UserError:
    """The error of a file that cannot be read."""
    return UserError(f"FFCV failed to read {path} ({error!r}). Build the data set again, {_OTHERWISE}")


class Turns:
    """An iterator dealt out to several threads, which take its items in turn: thread i those numbered i, i + n, ..."""

    def __init__(self, items: Iterable[NDArray[np.int64]], threads: int) -> None:
        self._items, self._threads, self._next = iter(items), threads, 0
        self._changed, self._stopped = threading.Condition(), False

    def of(self, thread: int) -> Iterator[NDArray[np.int64]]:
        """The items of a thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next == thread or self._stopped)
                item = None if self._stopped else next(self._items, None)
                self._next = (thread + 1) % self._threads
                self._changed.notify_all()
            if item is None:
                return
            yield item

    def stop(self) -> None:
        """Give out no further items."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def require_ffcv() -> None:
    """Raises: UserError when FFCV is not installed, or is another version than the tested one."""
    try:
        installed = version("ffcv")
    except PackageNotFoundError:
        problem = "The back end ffcv needs FFCV, which is not installed"
        raise UserError(f"{problem}. Install it (pip install -e '.[ffcv]'), {_OTHERWISE}") from None
    if installed != TESTED:
        problem = f"The back end ffcv needs ffcv {TESTED}, got {installed}"
        raise UserError(f"{problem}. Install it (pip install ffcv=={TESTED}), {_OTHERWISE}")
    import_typed_dictionary()
    with _thread_counts_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv 1.0.2 imports the deprecated distutils
        import ffcv.loader  # noqa: F401


def import_typed_dictionary() -> None:
    """Import numba's typed dictionary, and keep what it compiles where numba keeps all that asks for it.

    FFCV makes one as it is imported, which compiles for three seconds in every process.
    """
    plain = numba.njit
    numba.njit = partial(plain, cache=True)
    try:
        import_module("numba.typed.typeddict")
    except RuntimeError:  # numba finds no folder it may write to
        numba.njit = plain
        import_module("numba.typed.typeddict")
    finally:
        numba.njit = plain


def check_beton(path: Path, images: NDArray[np.uint8], kept_as: str = "raw") -> NDArray[np.int64]:
    """Check that FFCV can read all rows of the file without leaving it: images (N, H, W, 3), raw or as JPEG.

    Returns: where in the file the image of each row begins, (N,) int64.

    Raises: UserError for a file cut short, an unfinished one (its allocation table was never written) or another shape.
    """
    from ffcv.fields import RGBImageField
    from ffcv.reader import Reader

    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{path} is damaged, FFCV cannot read it ({rule}). Build the data set again, {_OTHERWISE}")

    try:
        reader = Reader(str(path))
    except (ValueError, AssertionError, IndexError, OverflowError, KeyError, MemoryError) as error:
        require(False, repr(error))
    count, height, width, channels = images.shape
    require(len(reader.metadata) == count, f"it has {len(reader.metadata)} rows instead of {count}")
    image_first = reader.field_names[:1] == ["image"] and isinstance(reader.handlers["image"], RGBImageField)
    require(image_first, "its first field is not an image")
    table, entries = reader.alloc_table, reader.metadata[reader.metadata.dtype.names[0]]
    require(bool(reader.header["alloc_table_ptr"]) and len(table) == count, "its allocation table is missing")
    mode, tall, wide, pointer = (entries[name] for name in entries.dtype.names)
    alike = (mode == _MODES[kept_as]) & (tall == height) & (wide == width)
    require(bool(alike.all()), f"its images are not all {kept_as} {height} x {width}")
    sizes, raw = table["size"], height * width * channels
    within = (sizes == raw if kept_as == "raw" else sizes > 0) & (table["ptr"] + sizes <= path.stat().st_size)
    require(bool(within.all() and np.isin(pointer, table["ptr"]).all()), "its images lie outside of it")
    return pointer.astype(np.int64)


def start_reading(loader: Any, rows: Iterable[NDArray[np.int64]]) -> Any:
    """Start a thread of FFCV that reads the images of each array of row ids in turn.

    Returns: the thread, with `receive()` (images (n, H, W, 3) uint8 in one of FFCV's slots, None at the end) and
        `stop()`.
    """
    from ffcv.loader.epoch_iterator import EpochIterator

    class ReadAhead(EpochIterator):
        def __init__(self) -> None:
            self.rows = iter(rows)
            super().__init__(loader, [])  # prepares memory and starts the thread

        def run(self) -> None:
            try:
                for i, wanted in enumerate(self.rows):
                    slot = i % (self.loader.batches_ahead + 2)
                    (images,) = self.run_pipeline(i, np.ascontiguousarray(wanted, np.uint64), slot, None)
                    if not self.send(images):
                        return
                self.send(None)
            except Exception as error:
                self.send(error)

        def send(self, item: object) -> bool:
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def receive(self) -> NDArray[np.uint8] | None:
            try:
                item = self.output_queue.get(timeout=READ_TIMEOUT)
            except queue.Empty:
                raise silent(self.loader.fname) from None
            if isinstance(item, Exception):
                raise failed(self.loader.fname, item) from item
            return item

        def stop(self) -> None:
            self.terminate_event.set()
            self.join(timeout=10.0)

    return ReadAhead()


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """FFCV sets the thread counts of torch and numba, when imported and with every loader."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)
