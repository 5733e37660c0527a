"""Back end `ffcv`: a thread of FFCV reads the stored pixels ahead, the fused kernel makes the views.

FFCV's loader is used below its public iterator, because that one can hang for ever (an exception in its thread is
lost), leaks a thread for each loop left early, only resumes at an epoch's start, and sets the thread counts of the
whole process. A thread reads with one worker, since with more, FFCV runs it on numba's thread pool, which other kernels
of the process may be using. One thread is enough to copy raw pixels, which is far faster than making views of them;
JPEGs are decoded by several, a batch each in turn.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
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
_OTHERWISE = "or use the back end resident"
_MODES = {"jpeg90": 0, "raw": 1}  # FFCV's codes for how images are stored


class FfcvReader:
    """Reads train.beton and test.beton of a data folder.

    Args:
        threads: that decode images which are kept as JPEG.

    Raises: UserError when FFCV is missing or untested, or a file is missing or damaged. A file is compared with its
        checksum first: FFCV itself would crash on some damaged files, hang on others and read garbage from the rest.
    """

    name = "ffcv"

    def __init__(self, arrays: Arrays, threads: int = 1) -> None:
        require_ffcv()
        self._paths = {split: arrays.folder / f"{split}.beton" for split in ("train", "test")}
        for path in self._paths.values():
            if path.name not in arrays.manifest.files:
                raise UserError(f"{arrays.folder} has no {path.name}. Build it with --format ffcv, {_OTHERWISE}")
            verify(arrays.folder, path.name, arrays.manifest)
        with _thread_counts_kept():
            kept_as = arrays.manifest.origin.beton
            check_beton(self._paths["train"], arrays.train, kept_as)
            check_beton(self._paths["test"], arrays.test)
        self._loaders: dict[tuple[str, int], Any] = {}
        self._threads = {"train": 1 if kept_as == "raw" else threads, "test": 1}

    def read(
        self, split: str, rows: Iterable[NDArray[np.int64]], most: int
    ) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        """For each array of row ids, at most `most` long: their images (n, H, W, 3) uint8, and 0..n-1.

        The images are valid until the next ones are asked for. The thread ends when the iterator is closed or dropped.
        Raises: UserError when FFCV fails, or delivers nothing within `READ_TIMEOUT` seconds.
        """
        turns = Turns(rows, self._threads[split])
        loader = self._loader(split, most)
        threads = [start_reading(loader, turns.of(i)) for i in range(self._threads[split])]
        try:
            for thread in cycle(threads):
                if (images := thread.receive(READ_TIMEOUT)) is None:
                    return
                yield torch.from_numpy(images), np.arange(len(images), dtype=np.int64)
        finally:
            turns.stop()
            for thread in threads:
                thread.stop()

    def close(self) -> None:
        self._loaders.clear()

    def _loader(self, split: str, most: int) -> Any:
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader

        if (split, most) not in self._loaders:
            pipelines = {"image": [SimpleRGBImageDecoder()], "label": None}
            with _thread_counts_kept():
                path = str(self._paths[split])
                ahead = {} if self._threads[split] == 1 else {"batches_ahead": 1}  # of each thread
                self._loaders[split, most] = Loader(
                    path, most, num_workers=1, os_cache=True, pipelines=pipelines, **ahead
                )
        return self._loaders[split, most]


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


def check_beton(path: Path, images: NDArray[np.uint8], kept_as: str = "raw") -> None:
    """Check that FFCV can read all rows of the file without leaving it: images (N, H, W, 3), raw or as JPEG.

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


def start_reading(loader: Any, rows: Iterable[NDArray[np.int64]]) -> Any:
    """Start a thread of FFCV that reads the images of each array of row ids in turn.

    Returns: the thread, with `receive(timeout)` (images (n, H, W, 3) uint8 in one of FFCV's slots, None at the end) and
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

        def receive(self, timeout: float) -> NDArray[np.uint8] | None:
            try:
                item = self.output_queue.get(timeout=timeout)
            except queue.Empty:
                problem = f"FFCV read nothing from {self.loader.fname} for {timeout:g} s"
                raise UserError(f"{problem}. Check the disk, {_OTHERWISE}") from None
            if isinstance(item, Exception):
                problem = f"FFCV failed to read {self.loader.fname} ({item!r})"
                raise UserError(f"{problem}. Build the data set again, {_OTHERWISE}") from item
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
