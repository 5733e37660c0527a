"""Making batches ahead: the same batches, no thread left behind, errors where they belong."""

import gc
import itertools
import threading
import time

import pytest
import torch

from data_prep.errors import UserError
from pipelines import open_loaders
from pipelines.batch import Batch
from pipelines.prefetch import in_a_thread, prefetched
from tests.pipelines.test_backends import CPU, open_tiny, same, standard, take, tensors


def numbered(n=None, closed=None, fails_at=None):
    """Batches that say which they are; `closed` gets an entry when the iterator is closed."""
    try:
        for i in itertools.count() if n is None else range(n):
            if i == fails_at:
                raise UserError("the disk is gone")
            number = torch.tensor([i])
            yield Batch(number, (), {}, {})
    finally:
        if closed is not None:
            closed.append(threading.current_thread().name)


def values(batches, n=None):
    return [int(batch.images) for batch in itertools.islice(batches, n)]


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_thread_gives_the_same_batches_in_the_same_order():
    assert values(in_a_thread(numbered(50))) == list(range(50))
    assert values(in_a_thread(numbered(0))) == []
    assert not prefetch_threads()


def test_a_thread_works_one_batch_ahead_and_no_further():
    begun = []

    def batches():
        for i, batch in enumerate(numbered()):
            begun.append(i)
            yield batch

    ahead = in_a_thread(batches())
    next(ahead)
    deadline = time.monotonic() + 10
    while len(begun) < 3 and time.monotonic() < deadline:  # one handed out, one waiting, one in hand
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(begun) == 3
    ahead.close()


@pytest.mark.parametrize("leave", ["close", "drop", "never started"])
def test_a_thread_ends_with_its_iterator_and_closes_what_it_reads(leave):
    closed = []
    ahead = in_a_thread(numbered(closed=closed))
    if leave != "never started":
        assert values(ahead, 3) == [0, 1, 2]
        assert len(prefetch_threads()) == 1
    if leave == "close":
        ahead.close()
    del ahead
    gc.collect()
    assert not prefetch_threads()
    assert closed == ([] if leave == "never started" else ["prefetch"])


def test_an_error_comes_after_the_batches_before_it():
    ahead = in_a_thread(numbered(fails_at=2))
    assert values(ahead, 2) == [0, 1]
    with pytest.raises(UserError, match="the disk is gone"):
        next(ahead)
    assert not prefetch_threads()


def test_a_thread_is_used_where_a_core_is_free(monkeypatch):
    for spare, threads in ((0, 0), (1, 1)):
        monkeypatch.setattr("pipelines.prefetch.spare_cores", lambda spare=spare: spare)
        ahead = prefetched(numbered(), CPU)
        assert values(ahead, 3) == [0, 1, 2]
        assert len(prefetch_threads()) == threads
        ahead.close()


@pytest.mark.parametrize("kind", ["resident", "ffcv"])
def test_prefetched_batches_are_the_same_to_the_bit(kind, request, monkeypatch):
    folder = request.getfixturevalue("ffcv_folder" if kind == "ffcv" else "folder")
    runs = []
    for spare in (0, 1):
        monkeypatch.setattr("pipelines.prefetch.spare_cores", lambda spare=spare: spare)
        runs.append(take(open_tiny(folder, kind, ("weak", "strong", "strong")), 20, start=3))
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_of_a_gpu_are_those_of_the_cpu(folder):
    on = {}
    for device in (CPU, torch.device("cuda")):
        options = {"batch": 4, "seed": 7, "device": device, "dtype": torch.float32, "backend": "resident"}
        on[device.type] = take(open_loaders(folder, standard(("weak", "strong", "strong")), **options), 20)
    for ours, theirs in zip(on["cpu"], on["cuda"], strict=True):
        assert all(t.is_cuda for t in tensors(theirs))
        labels, rows = ({name: t.cpu() for name, t in each.items()} for each in (theirs.labels, theirs.rows))
        assert same(ours, Batch(theirs.images.cpu(), theirs.groups, labels, rows))
