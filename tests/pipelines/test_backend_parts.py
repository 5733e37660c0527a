"""What single back ends do: the choice among them, errors of FFCV's thread, threads of DALI."""

import gc
import re
import threading
import time
from itertools import count, repeat

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipelines.arrays import _load, as_tensor, open_arrays
from pipelines.backends import ffcv
from pipelines.backends.ffcv import FfcvReader, Places, RawPixels
from pipelines.backends.resident import ResidentReader, room_for_images
from tests.pipelines.test_backends import open_tiny


def test_auto_takes_the_resident_one_for_a_small_set(ffcv_folder):
    assert open_tiny(ffcv_folder, "auto").backend == "resident"


def test_auto_takes_ffcv_where_memory_is_short_and_there_is_a_beton(ffcv_folder, folder, monkeypatch):
    monkeypatch.setattr("pipelines.room_for_images", lambda device: 5_000)
    assert open_tiny(ffcv_folder, "auto").backend == "ffcv"
    assert open_tiny(folder, "auto").backend == "resident"


def test_the_choice_comes_with_its_reason(ffcv_folder, folder, monkeypatch):
    assert open_tiny(folder, "resident").reason == "as set"
    chosen = open_tiny(ffcv_folder, "auto").reason
    assert re.fullmatch(r"0\.0 MB of images, room for [\d.]+ [GM]B in memory", chosen)
    monkeypatch.setattr("pipelines.room_for_images", lambda device: 5_000)
    assert open_tiny(ffcv_folder, "auto").reason == "0.0 MB of images, room for 0.0 MB in memory"
    assert "has no .beton files: images are paged in from disk" in open_tiny(folder, "auto").reason
    monkeypatch.setattr("pipelines.find_spec", lambda name: None)
    without = open_tiny(ffcv_folder, "auto")
    assert without.backend == "resident"
    assert "FFCV is not installed" in without.reason


@pytest.mark.parametrize("kind", ["resident", "dali"])
def test_a_gpu_without_an_index_is_the_one_of_this_process(kind, request, monkeypatch):
    folder = request.getfixturevalue("dali_folder" if kind == "dali" else "folder")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert open_tiny(folder, kind, device=torch.device("cuda"))._device == torch.device("cuda", 3)


def test_where_no_kernel_runs_on_the_gpu_that_is_told_and_the_cpu_makes_the_views(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("pipelines.room_for_images", lambda device: asked.append(device.type) or 10**9)
    monkeypatch.setattr("pipelines.backends.resident.room_for_images", lambda device: 0)
    gpu = torch.device("cuda", 0)
    for fault in (None, "numba-cuda cannot launch a kernel (the driver is too old)"):
        monkeypatch.setattr("pipelines.cuda.launch.fault", lambda device, fault=fault: fault)
        for backend in ("auto", "resident"):
            loaders = open_tiny(folder, backend, device=gpu)
            told = f"views are made on the CPU, much slower: {fault}"
            assert (told in loaders.reason) == (fault is not None)
            assert loaders._on_gpu == (fault is None)
    assert asked == ["cuda", "cpu"]


def test_a_split_is_copied_to_the_gpu_once_and_only_when_it_is_read(folder, monkeypatch):
    arrays, somewhere = open_arrays(folder), torch.device("meta")
    room = arrays.train.nbytes + arrays.test.nbytes - 1
    monkeypatch.setattr("pipelines.backends.resident.room_for_images", lambda device: room)
    reader, rows = ResidentReader(arrays, somewhere), np.array([3, 1])
    first, where = next(reader.read("train", [rows], 2))
    again, _ = next(reader.read("train", [rows], 2))
    assert first is again
    assert first.device == somewhere
    assert where.tolist() == [3, 1]
    images, where = next(reader.read("test", [rows], 2))
    np.testing.assert_array_equal(images.numpy(), arrays.test[rows])
    assert where.tolist() == [0, 1]


def test_images_take_a_quarter_of_a_gpu_at_most_and_half_of_what_is_free(monkeypatch):
    for free, room in ((80, 20), (40, 20), (30, 15)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device, free=free: (free * 10**9, 80 * 10**9))
        assert room_for_images(torch.device("cuda", 0)) == room * 10**9


def test_iterators_of_dali_leave_no_thread_of_the_system_behind(dali_folder):
    import psutil

    loaders = open_tiny(dali_folder, "dali", ())
    next(loaders.train())
    gc.collect()
    before = psutil.Process().num_threads()
    for _ in range(5):
        next(loaders.train())
    gc.collect()
    assert psutil.Process().num_threads() <= before


def test_a_reader_that_stops_delivering_is_an_error_not_a_hang(ffcv_folder, monkeypatch):
    loaders = open_tiny(ffcv_folder, "ffcv")
    batches = loaders.train()
    next(batches)
    monkeypatch.setattr("pipelines.backends.ffcv.READ_TIMEOUT", 0.2)
    monkeypatch.setattr("pipelines.backends.ffcv.END_TIMEOUT", 0.1)
    hanging, going_on = open_tiny(ffcv_folder, "ffcv"), threading.Event()
    monkeypatch.setattr(hanging, "_rows", lambda sources, step: going_on.wait(60) and np.zeros(0, np.int64))
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"FFCV read nothing from .*train.beton for 0.2 s"):
            next(hanging.train())
        assert time.monotonic() - began < 30
        left = [thread for thread in threading.enumerate() if thread.name == "ffcv"]
        assert left
        assert all(thread.daemon for thread in left)  # so that the process can end
    finally:
        going_on.set()


def test_an_exception_in_the_reading_thread_reaches_the_caller(ffcv_folder, monkeypatch, threads_before):
    loaders = open_tiny(ffcv_folder, "ffcv")

    def broken(sources: list, step: int) -> None:
        raise OSError("no such disk")

    monkeypatch.setattr(loaders, "_rows", broken)
    with pytest.raises(UserError, match=r"FFCV failed to read .*train.beton \(OSError\('no such disk'\)\)"):
        next(loaders.train())
    assert threading.active_count() <= threads_before


@pytest.mark.parametrize("cold", [False, True])
def test_raw_pixels_are_taken_from_where_they_lie(cold, tmp_path, monkeypatch, threads_before):
    announce = RawPixels._announce
    data = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)
    data.tofile(tmp_path / "pixels")
    first = np.array([4000, 17, 11_003, 20_000 - 4 * 5 * 3, 0])
    stored = RawPixels(tmp_path / "pixels", Places(first, np.full(5, 60)), (4, 5, 3))
    wanted = [np.array([3, 0]), np.array([1]), np.array([4, 4, 2])]
    monkeypatch.setattr(ffcv, "blocks_read", count().__next__ if cold else lambda: 0)
    announced = []
    monkeypatch.setattr(RawPixels, "_announce", lambda self, found: announced.extend(found) or announce(self, found))
    for ahead in (1, 4 * 60, 1 << 20):  # one array of rows at a time, two, all
        monkeypatch.setattr(ffcv, "AHEAD", ahead)
        found = list(stored.read(iter(wanted), 2))
        assert [index.tolist() for _, index in found] == [first[rows].tolist() for rows in wanted]
        for images, index in found:
            expected = np.stack([data[start : start + 60].reshape(4, 5, 3) for start in index.tolist()])
            np.testing.assert_array_equal(images[torch.from_numpy(index)].numpy(), expected)
    assert len(announced) == (9 if cold else 1)  # the first of all, and what follows what came from the disk
    begun = stored.read(repeat(wanted[0]), 2)  # without end
    next(begun)
    begun.close()
    assert threading.active_count() <= threads_before


def test_for_a_gpu_raw_pixels_are_copied_out_of_the_file(ffcv_folder):
    arrays, rows = open_arrays(ffcv_folder), np.array([30, 2, 30])
    reader = FfcvReader(arrays, torch.device("cuda", 0))
    images, where = next(reader.read("train", [rows], 3))
    np.testing.assert_array_equal(images.numpy()[where], arrays.train[rows])
    assert len(images) == 3


def test_files_larger_than_memory_are_mapped(ffcv_folder, tmp_path, monkeypatch):
    import psutil

    rows = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total) // (1 << 16) + 1
    np.lib.format.open_memmap(tmp_path / "train.npy", "w+", np.uint8, (rows, 128, 170, 3))  # a hole, of no blocks
    monkeypatch.setattr("pipelines.arrays.verify", lambda *_: None)
    manifest = open_arrays(ffcv_folder).manifest
    images = _load(tmp_path, manifest, "train.npy", "uint8", (None, 128, 170, 3))
    assert not as_tensor(images)[-1].any()
    end = (tmp_path / "train.npy").stat().st_size
    stored = RawPixels(tmp_path / "train.npy", Places(np.array([end - 60]), np.array([60])), (4, 5, 3))
    ((found, index),) = stored.read([np.array([0])], 1)
    assert not found[index].any()
