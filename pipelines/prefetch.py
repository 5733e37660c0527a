"""The next batch is made while the device computes. The batches are the same ones in the same order."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

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
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores - torch.get_num_threads())


def on_a_stream(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Queue each batch's copies and kernels on a second stream, one batch ahead of the caller; the host never waits."""
    stream = torch.cuda.Stream(device)

    def make() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            return None if batch is None else (batch, stream.record_event())

    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        made = make()
        while made is not None:
            batch, ready = made
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in (batch.images, *batch.labels.values(), *batch.rows.values()):
                tensor.record_stream(current)  # its memory is not used anew before the caller's kernels are done
            made = make()
            yield batch
    finally:
        batches.close()  # type: ignore[attr-defined]


def in_a_thread(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Make one batch ahead in a thread, which ends with the iterator. An exception reaches the caller in its place."""
    made: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()
    # The thread must not hold this generator: one that is dropped would never end.
    thread = threading.Thread(target=_fill, args=(batches, made, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = made.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stop.set()
        thread.join()


def _fill(batches: Iterator[Batch], made: queue.Queue[Any], stop: threading.Event) -> None:
    def offer(item: tuple[Batch | None, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    try:
        for batch in batches:
            if not offer((batch, None)):
                return
        offer((None, None))
    except BaseException as error:
        offer((None, error))
    finally:
        batches.close()  # type: ignore[attr-defined]
