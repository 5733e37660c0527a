"""Back end `ffcv`: images of .beton files are read ahead, the fused kernel makes the views.

FFCV's reader says where in a file the images lie, and the file is mapped into memory. Raw pixels the kernel takes from
there, once a thread has had the disk deliver them. JPEGs are decoded by FFCV's library, in several threads, a batch
each.

FFCV's loader is not used. It can hang for ever (an exception in its thread is lost), leaks a thread for each loop left
early, only resumes at an epoch's start, sets the thread counts of the whole process, compiles anew in each, and copies
raw pixels.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import queue
import resource
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from pipelines.arrays import Arrays, as_tensor, copied, verify
from pipelines.augment.ops_cpu import cached

TESTED = "1.0.2"  # this module leans on how FFCV works inside
READ_TIMEOUT = 120.0  # seconds without a batch after which reading has failed
END_TIMEOUT = 10.0  # seconds for a thread to end what it is at
AHEAD = 1 << 24  # bytes of raw pixels read ahead at a time: handing over so many costs no more than handing over one
_OTHERWISE = "or use the back end resident"
_MODES = {"jpeg90": 0, "raw": 1}  # FFCV's codes for how images are stored


Read = Iterator[tuple[Tensor, NDArray[np.int64]]]


class FfcvReader:
    """Reads train.beton and test.beton of a data folder.

    Args:
        gpu: where the views are made, when that is a GPU.
        threads: that decode images which are kept as JPEG.

    Raises: UserError when FFCV is missing or untested, or a file is missing or damaged. A file is compared with its
        checksum first: its structure alone would not tell images from garbage.
    """

    name = "ffcv"

    def __init__(self, arrays: Arrays, gpu: torch.device | None = None, threads: int = 1) -> None:
        require_ffcv()
        self._stored: dict[str, RawPixels | Jpegs] = {}
        for split, images, kept_as in (
            ("train", arrays.train, arrays.manifest.origin.beton),
            ("test", arrays.test, "raw"),
        ):
            path = arrays.folder / f"{split}.beton"
            if path.name not in arrays.manifest.files:
                raise UserError(f"{arrays.folder} has no {path.name}. Build it with --format ffcv, {_OTHERWISE}")
            verify(arrays.folder, path.name, arrays.manifest)
            places, shape = check_beton(path, images, kept_as), images.shape[1:]
            raw = kept_as == "raw"
            self._stored[split] = RawPixels(path, places, shape, gpu) if raw else Jpegs(path, places, shape, threads)

    def read(self, split: str, rows: Iterable[NDArray[np.int64]], most: int) -> Read:
        """For each array of row ids, at most `most` long: images (N, H, W, 3) uint8, and where among them theirs are.

        The images are valid until the next ones are asked for. Threads end when the iterator is closed or dropped.
        Raises: UserError when reading fails, or delivers nothing within `READ_TIMEOUT` seconds.
        """
        return self._stored[split].read(rows, most)

    def close(self) -> None:
        self._stored.clear()


class Places(NamedTuple):
    """Where in a file the image of each row begins, and its bytes, (N,) int64 each."""

    first: NDArray[np.int64]
    sizes: NDArray[np.int64]


class RawPixels:
    """The raw images of a .beton, (H, W, 3) each.

    images: (N, H, W, 3) uint8, one from every byte of the file on; those that are any lie where FFCV has put them.
    """

    def __init__(self, path: Path, places: Places, shape: tuple[int, ...], gpu: torch.device | None = None) -> None:
        self._path, self._places, self._gpu, self._size = path, places, gpu, math.prod(shape)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = np.frombuffer(self._map, np.uint8)
        strides = (1, shape[1] * shape[2], shape[2], 1)
        self.images = as_tensor(self._bytes).as_strided((len(self._bytes) - self._size + 1, *shape), strides)
        self._touched = np.array([*range(0, self._size, mmap.PAGESIZE), self._size - 1])
        self._cold = True  # whether what was read last came from the disk

    def read(self, rows: Iterable[NDArray[np.int64]], most: int) -> Read:
        """`FfcvReader.read`: all images, or, for a GPU, copies of those asked for."""
        stopped, rows = threading.Event(), takewhile(lambda _: not stopped.is_set(), rows)

        def ahead() -> list[NDArray[np.int64]]:
            found = [self._places.first[wanted] for wanted in islice(rows, max(1, AHEAD // (most * self._size)))]
            before = blocks_read()
            if self._cold:
                self._announce(found)
            for index in found:
                self._bytes.take(index[:, None] + self._touched)  # without the interpreter's lock
            self._cold = blocks_read() > before
            return found

        threads = Threads(1)
        coming = threads.submit(ahead)
        try:
            while found := received(coming, self._path):
                coming = threads.submit(ahead)
                for index in found:
                    yield (self.images, index) if self._gpu is None else copied(self.images, index)
        finally:
            stopped.set()
            threads.end([coming])

    def _announce(self, found: list[NDArray[np.int64]]) -> None:
        """Have the disk read these images at the same time, and nothing around them. Of images in the page cache that
        would take a microsecond each for nothing."""
        for first in np.concatenate(found).tolist() if found else ():
            into_page = first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first - into_page, self._size + into_page)


class Jpegs:
    """The images of a .beton that are kept as JPEG, (H, W, 3) each, decoded by `threads` threads."""

    def __init__(self, path: Path, places: Places, shape: tuple[int, ...], threads: int) -> None:
        from ffcv import libffcv

        self._path, self._places, self._shape, self._threads = path, places, shape, threads
        self._bytes = np.memmap(path, np.uint8, "r")
        self._decoder = ctypes.cast(libffcv.ctypes_imdecode, ctypes.c_void_p).value

    def read(self, rows: Iterable[NDArray[np.int64]], most: int) -> Read:
        """`FfcvReader.read`: those asked for."""
        left, coming = iter(rows), deque[futures.Future[Any]]()
        threads = Threads(self._threads)
        try:
            coming.extend(threads.submit(self._decoded, wanted) for wanted in islice(left, 2 * self._threads))
            while coming:
                images = received(coming[0], self._path)
                coming.popleft()
                coming.extend(threads.submit(self._decoded, wanted) for wanted in islice(left, 1))
                yield torch.from_numpy(images), np.arange(len(images), dtype=np.int64)
        finally:
            threads.end(coming)

    def _decoded(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        images = np.empty((len(rows), *self._shape), np.uint8)
        first, sizes = (numbers[rows] for numbers in self._places)
        if decode(self._decoder, self._bytes.ctypes.data + first, sizes, images.ctypes.data, *self._shape[:2]):
            raise ValueError("a JPEG cannot be decoded")
        return images


@intrinsic
def call_decoder(_, decoder, data, size, image, height, width):
    """Call FFCV's `imdecode`, at an address, for a JPEG at one and pixels at one: nothing cropped, scaled or mirrored.

    Returns: 0, or what is not 0 where it fails.

    Its own function for that cannot be kept compiled: addresses are others in each process.
    """

    def generate(context, builder, signature, args):
        long, word = ir.IntType(64), ir.IntType(32)
        decoder, data, size, image, height, width = args
        sides = [builder.trunc(side, word) for side in (height, width)]
        numbers = [word(number) for number in (0, 0, 1, 1, 0, 0)]
        kind = ir.FunctionType(word, [long, long, word, word, long, *[word] * 8])
        function = builder.inttoptr(decoder, kind.as_pointer())
        return builder.call(function, [data, size, *sides, image, *sides, *numbers])

    return types.int32(*[types.int64] * 6), generate


@cached
def decode(decoder, data, sizes, image, height, width):
    """Decode JPEGs at the addresses `data` (n,), of `sizes` (n,) bytes, to pixels one after the other from `image`.

    Returns: how many cannot be decoded.
    """
    failed = 0
    for i in range(len(data)):
        failed += call_decoder(decoder, data[i], sizes[i], image + i * 3 * height * width, height, width) != 0
    return failed


def blocks_read() -> int:
    """How many blocks of disks this thread has had read."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_inblock


def received(coming: futures.Future[Any], path: Path) -> Any:
    """What a thread that reads a file makes. Raises: UserError where that fails, or takes too long."""
    try:
        return coming.result(READ_TIMEOUT)
    except futures.TimeoutError:
        problem, remedy = f"FFCV read nothing from {path} for {READ_TIMEOUT:g} s", "Check the disk"
        raise UserError(f"{problem}. {remedy}, {_OTHERWISE}") from None
    except Exception as error:
        problem, remedy = f"FFCV failed to read {path} ({error!r})", "Build the data set again"
        raise UserError(f"{problem}. {remedy}, {_OTHERWISE}") from error


class Threads:
    """What futures.ThreadPoolExecutor is, of threads that do not keep the process from ending where they hang."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[tuple[futures.Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="ffcv", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()
        self._work.put((future, partial(function, *arguments)))
        return future

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    def end(self, submitted: Iterable[futures.Future[Any]]) -> None:
        """Let the threads do what they are at, and nothing else, for at most `END_TIMEOUT` seconds."""
        for future in submitted:
            future.cancel()
        for _ in self._threads:
            self._work.put(None)
        deadline = time.monotonic() + END_TIMEOUT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


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
        import ffcv  # noqa: F401


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


def check_beton(path: Path, images: NDArray[np.uint8], kept_as: str = "raw") -> Places:
    """Check that FFCV can read all rows of the file without leaving it: images (N, H, W, 3), raw or as JPEG.

    Returns: where they are.

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
    sizes, raw, end = table["size"], height * width * channels, path.stat().st_size
    within = (sizes == raw if kept_as == "raw" else sizes > 0) & (sizes <= end) & (table["ptr"] <= end - sizes)
    require(bool(within.all() and np.isin(pointer, table["ptr"]).all()), "its images lie outside of it")
    order = np.argsort(table["ptr"])
    sizes = sizes[order[np.searchsorted(table["ptr"], pointer, sorter=order)]]
    return Places(pointer.astype(np.int64), sizes.astype(np.int64))


@contextmanager
def _thread_counts_kept() -> Iterator[None]:
    """FFCV sets the thread counts of torch and numba when it is imported."""
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)
