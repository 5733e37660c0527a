"""The next batch is made while the device computes. The batches are the same ones in the same order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import torch

from data_prep.cores import usable_cores
from pipelines.batch import Batch


def prefetched(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, each made before it is asked for where that pays.

    On a GPU, always: on a stream of its own. On a CPU in a thread, where torch leaves a core unused; where it computes
    on all of them, a thread would only take turns with it.
    """
    if device.type == "cuda":
        return on_a_stream(batches, device)
    return in_a_thread(batches) if spare_cores() else batches


def spare_cores() -> int:
    """Cores of this process beyond those that torch computes on."""
    return max(0, usable_cores() - torch.get_num_threads())


def on_a_stream(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Queue each batch's copies and kernels on a second stream, one batch ahead of the caller; the host never waits."""
    stream = torch.cuda.Stream(device)

    def queue_next() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        queued = queue_next()
        while queued is not None:
            batch, ready = queued
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in (batch.images, *batch.labels.values(), *batch.rows.values()):
                tensor.record_stream(current)  # its memory is not used anew before the caller's kernels are done
            queued = queue_next()
            yield batch
    finally:
        batches.close()  # type: ignore[attr-defined]


def in_a_thread(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Make one batch ahead in a thread, which ends with the iterator. An exception comes after the batches before it.

    The thread sleeps while a batch waits to be taken.
    """
    ready: queue.SimpleQueue[tuple[Batch | None, BaseException | None]] = queue.SimpleQueue()
    room, stop = threading.Semaphore(1), threading.Event()
    # The thread must not hold this generator: one that is dropped would never end.
    thread = threading.Thread(target=_fill, args=(batches, ready, room, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            room.release()
            yield batch
    finally:
        stop.set()
        room.release()
        thread.join()


def _fill(
    batches: Iterator[Batch],
    ready: queue.SimpleQueue[tuple[Batch | None, BaseException | None]],
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        for batch in batches:
            room.acquire()
            if stop.is_set():
                return
            ready.put((batch, None))
        ready.put((None, None))
    except BaseException as error:
        ready.put((None, error))
    finally:
        batches.close()  # type: ignore[attr-defined]
