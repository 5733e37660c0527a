"""Images -> array, in parallel processes, chunk by chunk, going on where an interrupted build stood."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.folder.writers import ImageRows, create_images, is_images, write_rows
from data_prep.memory import keep_memory
from data_prep.sources.images import BadImage, Images, read_images
from data_prep.sources.resize import Preparation, strict_decoding
from data_prep.work.journal import Done, Journal

CHUNK = 64  # images: small enough that the last chunks end together, large enough to cost no messages
KEPT = 128 * 2**20  # bytes a worker: the pixels of one photograph are what the next one needs
SERIAL_IMAGES = 512  # images for which starting processes costs more than it saves
PRELOADED = ["numpy", "PIL.TiffImagePlugin", "pillow_heif"]  # what of this module takes longest


class Target(NamedTuple):
    """An array to fill: `rows` of `images`, prepared by a rule."""

    path: Path
    images: Images
    rows: NDArray[np.int64]
    rule: Preparation

    @property
    def chunks(self) -> int:
        return -(-len(self.rows) // CHUNK)

    def positions(self, chunk: int) -> slice:
        return slice(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.rows)))

    def source(self, chunk: int) -> Images:
        """The images of a chunk."""
        return self.images.take(self.rows[self.positions(chunk)])


class Task(NamedTuple):
    """A chunk for a worker: small to send."""

    path: Path
    start: int
    images: Images
    rule: Preparation


def target(folder: Path, part: str, images: Images, rows: NDArray[np.int64], rule: Preparation) -> Target:
    """The array of these rows in `folder`, named by its part and by what it holds."""
    identity = hashlib.sha256(f"{tuple(rule)} {CHUNK}".encode() + rows.tobytes()).hexdigest()[:12]
    return Target(folder / f"{part}-{identity}.npy", images, rows, rule)


def fill(
    goal: Target, journal: Journal, workers: int, others: Iterable[Target] = ()
) -> Iterator[tuple[int, list[BadImage]]]:
    """Bring every chunk of `goal` into its array. Yields (images done, bad ones among them) as chunks are there.

    Chunks that the journal knows, whose bytes are as it says and whose images have not changed are kept, except those
    with bad images, which may have been mended since. Rows found in one of the `others`, arrays of the same images, are
    copied. The rest is decoded, by `workers` processes where that pays. Bad images leave zeros; their position is a row
    of the array.

    Raises: OSError when the disk is full; UserError when a worker process dies.
    """
    if not goal.path.exists() or not is_images(goal.path, len(goal.rows), goal.rule.resolution):
        journal.chunks.pop(goal.path.name, None)
        create_images(goal.path, len(goal.rows), goal.rule.resolution)
    done = _kept(goal, journal)
    donors = [_Donor(other, _kept(other, journal), journal) for other in others if other.path.exists()]
    missing = []
    for chunk in range(goal.chunks):
        if chunk not in done and not _copied(goal, chunk, donors, journal):
            missing.append(chunk)
            continue
        span = goal.positions(chunk)
        yield span.stop - span.start, []
    parallel = workers > 1 and goal.images.worth_processes and len(missing) * CHUNK >= SERIAL_IMAGES
    results = _in_processes(goal, missing, workers) if parallel else _in_this_process(goal, missing)
    for chunk, finished in results:
        span = goal.positions(chunk)
        bad = [BadImage(span.start + b.position, b.name, b.reason) for b in finished.bad]
        journal.add(goal.path.name, chunk, finished._replace(bad=bad))
        yield span.stop - span.start, bad


def _kept(goal: Target, journal: Journal) -> set[int]:
    """Chunks that are in the array, whole, without a bad image, and of the images that are there now."""
    known = journal.chunks.get(goal.path.name, {})
    if not known:
        return set()
    with ImageRows(goal.path) as array:
        return {c for c, done in known.items() if not done.bad and _unchanged(goal, array, c, done)}


def _unchanged(goal: Target, array: ImageRows, chunk: int, done: Done) -> bool:
    span = goal.positions(chunk)
    same_bytes = crc(array.block(span.start, span.stop)) == done.crc
    return same_bytes and goal.source(chunk).digest() == done.digest


class _Donor:
    """An array of an earlier choice of rows, from which finished images are taken over."""

    def __init__(self, goal: Target, chunks: set[int], journal: Journal) -> None:
        self.path = goal.path
        finished = [np.arange(len(goal.rows))[goal.positions(c)] for c in sorted(chunks)]
        self.positions = np.concatenate(finished) if finished else np.zeros(0, np.int64)
        self.rows = goal.rows[self.positions]
        known = journal.chunks.get(goal.path.name, {})
        self.marks = {int(goal.rows[c * CHUNK + mark.position]): mark for c in chunks for mark in known[c].marks}

    def find(self, rows: NDArray[np.int64]) -> NDArray[np.uint8] | None:
        """The images of `rows`, if all are here."""
        at = np.searchsorted(self.rows, rows)
        if len(self.rows) == 0 or at[-1] >= len(self.rows) or not np.array_equal(self.rows[at], rows):
            return None
        with ImageRows(self.path) as array:
            return np.stack([array[position] for position in self.positions[at].tolist()])


def _copied(goal: Target, chunk: int, donors: list[_Donor], journal: Journal) -> bool:
    span = goal.positions(chunk)
    for donor in donors:
        block = donor.find(goal.rows[span])
        if block is not None:
            write_rows(goal.path, span.start, block)
            rows = goal.rows[span].tolist()
            marks = [donor.marks[row]._replace(position=i) for i, row in enumerate(rows) if row in donor.marks]
            journal.add(goal.path.name, chunk, Done(crc(block), [], goal.source(chunk).digest(), marks))
            return True
    return False


def _task(goal: Target, chunk: int) -> Task:
    span = goal.positions(chunk)
    return Task(goal.path, span.start, goal.source(chunk), goal.rule)


def _run(task: Task) -> Done:
    digest = task.images.digest()  # before the pixels: a file that changes in between then counts as changed
    block, bad, marks = read_images(task.images, task.rule)
    write_rows(task.path, task.start, block)
    return Done(crc(block), bad, digest, marks)


def crc(block: NDArray[np.uint8]) -> int:
    """CRC-32 of a chunk's bytes."""
    return zlib.crc32(np.ascontiguousarray(block).reshape(-1).data)


def _in_this_process(goal: Target, chunks: list[int]) -> Iterator[tuple[int, Done]]:
    for chunk in chunks:
        with strict_decoding():
            finished = _run(_task(goal, chunk))
        yield chunk, finished


def start_server() -> None:
    """Start the process that workers are forked from, and return: it loads what they need while the images are listed.

    Workers are forked from it and not from the caller, who may hold threads, or a GPU. The server looks for the project
    where the caller does, or it might find another version; where it cannot be told to, the workers import it.
    """
    told = sys.version_info >= (3, 11) and not sys.flags.ignore_environment
    multiprocessing.set_forkserver_preload([*PRELOADED, *([__name__] if told else [])])
    resource_tracker.ensure_running()  # which unblocks SIGINT, so first
    path = {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path), "PYTHONSAFEPATH": "1"}
    kept = {name: os.environ.get(name) for name in path}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is for the main process
    os.environ.update(path)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_processes(goal: Target, chunks: list[int], workers: int) -> Iterator[tuple[int, Done]]:
    """Run chunks in worker processes, at most a few per worker under way, so that memory stays the same."""
    start_server()  # if it does not run yet
    context = multiprocessing.get_context("forkserver")
    waiting = iter(chunks)
    running: dict[Future[Done], int] = {}
    with ProcessPoolExecutor(min(workers, len(chunks)), context, _start_worker) as pool:
        try:
            while True:
                while len(running) < 3 * workers and (chunk := next(waiting, None)) is not None:
                    with _uninterrupted():  # it may start a worker, which the pool must know to end
                        running[pool.submit(_run_strictly, _task(goal, chunk))] = chunk
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "A worker process died, most likely for lack of memory. Run the same command again with fewer "
                "--workers: it goes on where it stood."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end. Other threads than the main one are not interrupted anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: caught.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
        for caught_one in caught[:1]:
            signal.raise_signal(caught_one)


def _run_strictly(task: Task) -> Done:
    with strict_decoding():
        return _run(task)


def _start_worker() -> None:
    """In a new worker: leave Ctrl-C to the main process, and end when that ends, killed or not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_memory(KEPT)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
