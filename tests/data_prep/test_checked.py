"""Large files: read whole once a machine, and never taken for whole when they are not."""

import hashlib
import mmap
import os
import threading
import time
from pathlib import Path

import pytest

from data_prep.files import append_record
from data_prep.folder import checked

BLOCKS = 9


@pytest.fixture
def large(tmp_path, monkeypatch) -> Path:
    """A file of BLOCKS blocks, larger than LARGE, long unchanged; of its blocks the first and the last are sampled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"LARGE": 100, "BLOCK": 64, "SAMPLED": 2, "SETTLED_SECONDS": -60.0}.items():
        monkeypatch.setattr(checked, name, value)
    path = tmp_path / "train.npy"
    path.write_bytes(os.urandom(64 * BLOCKS - 5))
    return path


@pytest.fixture
def whole_readings(monkeypatch) -> list[Path]:
    """The files of which all was read, one entry a reading."""
    readings, read = [], checked.has_checksum

    def counted(path: Path, sha256: str) -> bool:
        readings.append(path)
        return read(path, sha256)

    monkeypatch.setattr(checked, "has_checksum", counted)
    return readings


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, place: int) -> None:
    """Change one byte where it lies, and put the time of change back."""
    time.sleep(0.02)  # file systems' clocks may be that coarse
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_large_file_is_read_whole_once(large, whole_readings):
    expected = checksum(large)
    assert all(checked.is_as_written(large, expected) for _ in range(3))
    assert whole_readings == [large]


def test_verify_reads_all_and_remembers_it(large, whole_readings):
    expected = checksum(large)
    assert checked.has_checksum(large, expected)
    assert checked.has_checksum(large, expected)
    assert checked.is_as_written(large, expected)
    assert len(whole_readings) == 2


def test_a_small_file_is_read_whole_every_time(large, whole_readings, monkeypatch):
    monkeypatch.setattr(checked, "LARGE", 64 * BLOCKS)
    expected = checksum(large)
    assert all(checked.is_as_written(large, expected) for _ in range(2))
    assert len(whole_readings) == 2


def test_another_checksum_is_not_the_one_that_is_remembered(large):
    assert checked.is_as_written(large, checksum(large))
    assert not checked.is_as_written(large, "0" * 64)


@pytest.mark.parametrize("place", [0, 200, 64 * BLOCKS - 6])
def test_a_change_in_place_is_noticed_though_its_time_was_set_back(large, place):
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    flip(large, place)
    assert not checked.is_as_written(large, expected)
    assert not checked.is_as_written(large, expected), "what is damaged is never remembered"


def tells_of_mappings(path: Path) -> bool:
    """Whether the file system has a time of change for what is written through a mapping: tmpfs has none."""
    path.write_bytes(bytes(10))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        os.fsync(file.fileno())
        before = path.stat().st_ctime_ns
        time.sleep(0.02)
        mapping[0] = 1
        return path.stat().st_ctime_ns != before


def test_a_change_through_a_mapping_is_noticed_though_one_before_waits_to_be_written(large):
    if not tells_of_mappings(large.with_name("other")):
        pytest.skip("the file system keeps no time of changes through a mapping")
    with open(large, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[200] ^= 1
        expected = checksum(large)
        time.sleep(0.02)
        assert checked.is_as_written(large, expected)
        mapping[200] ^= 1
        assert not checked.is_as_written(large, expected)


def test_a_file_of_another_size_is_noticed(large):
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    with open(large, "ab") as file:
        file.write(b"more")
    assert not checked.is_as_written(large, expected)


def test_what_is_remembered_of_a_file_does_not_count_for_the_one_in_its_place(large, whole_readings):
    expected, before = checksum(large), large.stat()
    assert checked.is_as_written(large, expected)
    other = large.with_name("other")
    other.write_bytes(large.read_bytes())
    flip(other, 200)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, large)
    assert not checked.is_as_written(large, expected)
    assert len(whole_readings) == 2


@pytest.mark.parametrize(("place", "seen"), [(3, True), (200, False), (64 * BLOCKS - 6, True)])
def test_what_the_file_system_does_not_tell_is_noticed_in_sampled_blocks_alone(large, monkeypatch, place, seen):
    monkeypatch.setattr(checked, "_facts", lambda state, sha256: ["the same", sha256])
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    flip(large, place)
    assert checked.is_as_written(large, expected) is not seen
    assert not checked.has_checksum(large, expected)
    assert not checked.is_as_written(large, expected), "what was found stays found, wherever the samples lie"


def test_every_block_comes_to_be_sampled(large, monkeypatch):
    monkeypatch.setattr(checked, "_facts", lambda state, sha256: ["the same", sha256])
    monkeypatch.setattr(checked, "SAMPLED", 4)
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    flip(large, 200)
    assert not all(checked.is_as_written(large, expected) for _ in range(200))  # missed with (7/9)^400


def test_a_change_a_moment_ago_is_not_remembered(large, whole_readings, monkeypatch):
    monkeypatch.setattr(checked, "SETTLED_SECONDS", 60.0)
    expected = checksum(large)
    assert all(checked.is_as_written(large, expected) for _ in range(2))
    assert len(whole_readings) == 2


def test_a_damaged_record_counts_for_nothing(large, whole_readings):
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    flip(checked._record(large), 60)
    assert checked.is_as_written(large, expected)
    assert len(whole_readings) == 2


@pytest.mark.parametrize("value", [5, [1, 2, 3], [[1]]])
def test_a_record_of_another_form_counts_for_nothing(large, whole_readings, value):
    expected = checksum(large)
    assert checked.is_as_written(large, expected)
    with open(checked._record(large), "ab") as record:
        append_record(record, value)
    assert all(checked.is_as_written(large, expected) for _ in range(2))
    assert whole_readings == [large, large]


def test_without_a_cache_folder_all_is_read(large, whole_readings, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(large))  # a file: no folder can be made there
    expected = checksum(large)
    assert all(checked.is_as_written(large, expected) for _ in range(2))
    assert len(whole_readings) == 2
    flip(large, 200)
    assert not checked.is_as_written(large, expected)


def test_those_who_ask_together_read_it_once(large, whole_readings):
    expected, answers = checksum(large), []
    threads = [
        threading.Thread(target=lambda: answers.append(checked.is_as_written(large, expected))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4
    assert whole_readings == [large]
