"""Builds that are interrupted, in every way, end as if they had not been."""

import errno
import importlib.util
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import INTERRUPTED, UserError
from data_prep.folder.manifest import read_manifest
from data_prep.sources.containers import FIELDS, Members
from data_prep.sources.images import ArrayImages, EncodedImages, Mark
from data_prep.sources.resize import Preparation
from data_prep.work import filling
from data_prep.work.filling import fill, target
from data_prep.work.journal import Done, Journal, build_lock
from tests.data_prep import tiny_builds
from tests.data_prep.archives import encoded, pixels

CHUNK = filling.CHUNK


@pytest.fixture(autouse=True)
def restore_chunk() -> None:
    filling.CHUNK = CHUNK


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def clean_context() -> multiprocessing.context.ForkServerContext:
    """Processes forked from one that has the modules loaded already, so that they start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.work.builder", "data_prep.folder.preview", "matplotlib.figure"])
    return context


class Builds:
    """Tiny builds in processes of their own, of which some are killed."""

    def __init__(self, root: Path, on_bad: str, workers: int, formats: tuple[str, ...]) -> None:
        self.root, self.options = root, (on_bad, formats, workers)
        self.context = clean_context()
        tiny_builds.make_images(root / "raw", unlabeled=1200)
        if on_bad == "skip":  # rows are then planned twice
            for number in (3, 500, 1100):
                (root / "raw" / "unlabeled" / f"{number:04d}.png").write_bytes(b"broken")

    def start(self, out: str) -> multiprocessing.context.ForkServerProcess:
        process = self.context.Process(
            target=tiny_builds.build, args=(self.root / "raw", self.root / out, *self.options)
        )
        process.start()
        return process

    def whole(self, out: str) -> float:
        """A build without interruption; its seconds."""
        begin = time.perf_counter()
        process = self.start(out)
        process.join()
        assert process.exitcode == 0
        return time.perf_counter() - begin

    def kill(self, out: str, after: float) -> bool:
        """Start a build and kill it after so many seconds. Returns False when it had ended by itself."""
        process = self.start(out)
        process.join(after)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0


def check_kills(builds: Builds, kills: int) -> None:
    """Kill a build so many times, at random moments of its life, and compare what comes out with a build left alone."""
    root, moments = builds.root, random.Random(1)
    builds.whole("warm-up")
    duration = builds.whole("whole")
    while kills:
        if builds.kill("out", moments.uniform(0.02, 0.9) * duration):
            kills -= 1
        else:
            duration *= 0.9
        if (root / "out").exists():  # it got through: what is there must be whole; begin anew
            assert contents(root / "out") == contents(root / "whole")
            shutil.rmtree(root / "out")
    builds.whole("out")
    assert contents(root / "out") == contents(root / "whole")
    assert sorted(p.name for p in root.iterdir()) == ["out", "raw", "warm-up", "whole"]


@pytest.mark.parametrize(("on_bad", "kills"), [("error", 20), ("skip", 8)])
def test_killed_at_random_moments_it_ends_the_same(on_bad: str, kills: int, tmp_path: Path) -> None:
    check_kills(Builds(tmp_path, on_bad, workers=1, formats=("dali",)), kills)


def test_a_removal_that_was_killed_is_finished_by_the_next_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=40)
    out, real = tmp_path / "out", shutil.rmtree

    def half(path: Path, **options: bool) -> None:
        if Path(path).name.startswith(".out.building") and Path(path).exists():
            (Path(path) / "order").unlink()
            raise KeyboardInterrupt
        real(path, **options)

    for again in (False, True):  # the folder is there, or was taken away
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", half)
            with pytest.raises(KeyboardInterrupt):
                tiny_builds.build(tmp_path / "raw", out)
        whole = contents(out)
        if again:
            real(out)
        tiny_builds.build(tmp_path / "raw", out)
        assert contents(out) == whole
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]
        real(out)


def test_killed_with_two_workers_it_ends_the_same(tmp_path: Path) -> None:
    check_kills(Builds(tmp_path, "error", workers=2, formats=("dali",)), kills=5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_killed_twenty_times_with_workers_and_every_format(on_bad: str, tmp_path: Path) -> None:
    check_kills(Builds(tmp_path, on_bad, workers=2, formats=("ffcv", "dali")), kills=20)


def test_work_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ArrayImages(pixels(1000, 8), np.zeros(1000, np.int64), "image")
    goal = target(tmp_path, "train", images, np.arange(1000), Preparation(8))
    with Journal(tmp_path / "journal") as journal:
        parts = fill(goal, journal, workers=1)
        for _ in range(3):
            next(parts)
        parts.close()
    with open(tmp_path / "journal", "ab") as file:  # a line cut short by the end of the process
        file.write(b'["train-')
    with Journal(tmp_path / "journal") as journal:
        assert sorted(journal.chunks[goal.path.name]) == [0, 1, 2]
    # A chunk that the journal knows but that did not reach the disk is noticed by its checksum.
    broken = np.load(goal.path, mmap_mode="r+")
    broken[CHUNK + 5] = 0
    broken.flush()
    written: list[int] = []
    real = filling.write_rows
    monkeypatch.setattr(
        filling, "write_rows", lambda path, start, block: (written.append(start), real(path, start, block))
    )
    with Journal(tmp_path / "journal") as journal:
        assert sum(done for done, _ in fill(goal, journal, workers=1)) == 1000
    assert written == [CHUNK, *range(3 * CHUNK, 1000, CHUNK)]
    assert np.array_equal(np.load(goal.path), images.pixels)


def test_rows_are_taken_over_from_an_earlier_choice(tmp_path: Path) -> None:
    images = ArrayImages(pixels(700, 8), np.zeros(700, np.int64), "image")
    first = target(tmp_path, "train", images, np.arange(700), Preparation(8))
    rows = np.delete(np.arange(700), [0, 130, 699])
    unreadable = ArrayImages(np.zeros((700, 9, 9, 3), np.uint8), np.zeros(700, np.int64), "image")
    second = target(tmp_path, "train", unreadable, rows, Preparation(8))
    with Journal(tmp_path / "journal") as journal:
        list(fill(first, journal, workers=1))
        list(fill(second, journal, workers=1, others=[first]))
    assert np.array_equal(np.load(second.path), images.pixels[rows])


def test_processes_and_one_process_write_the_same(tmp_path: Path) -> None:
    images = tiny_builds.Decoded(pixels(1300, 12), np.zeros(1300, np.int64), "image")
    arrays = []
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        goal = target(tmp_path / str(workers), "train", images, np.arange(1, 1300), Preparation(8))
        with Journal(tmp_path / f"j{workers}") as journal:
            assert sum(done for done, _ in fill(goal, journal, workers)) == 1299
        arrays.append(goal.path.read_bytes())
    assert arrays[0] == arrays[1]


def test_processes_and_one_process_say_the_same_of_truncated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "SERIAL_IMAGES", 1)
    monkeypatch.setattr(filling, "CHUNK", 8)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400), np.uint8))
    noise.save(tmp_path / "whole.jpg", quality=90)
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert len(whole) > 100_000
    names = [f"{number}.jpg" for number in range(24)]
    for number, name in enumerate(names):  # beyond the 64 KB that Pillow's decoder gets at once
        (tmp_path / name).write_bytes(whole[: 66_000 + 1_217 * number])
    images = EncodedImages(Members(tmp_path, names, np.zeros(24, FIELDS)), np.zeros(24, np.int64))
    found = []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        goal = target(tmp_path / str(workers), "train", images, np.arange(24), Preparation(8))
        with Journal(tmp_path / f"j{workers}") as journal:
            found.append(sorted(bad for _, some in fill(goal, journal, workers) for bad in some))
    assert len(found[0]) == 24
    assert found[0] == found[1]


def test_a_worker_that_dies_is_said(tmp_path: Path) -> None:
    images = tiny_builds.Deadly(pixels(1000, 8), np.zeros(1000, np.int64), "image")
    goal = target(tmp_path, "train", images, np.arange(1000), Preparation(8))
    with (
        Journal(tmp_path / "journal") as journal,
        pytest.raises(UserError, match="A worker process died, most likely for lack of memory"),
    ):
        list(fill(goal, journal, workers=2))


def test_an_interrupt_waits_until_a_worker_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny_builds.Decoded(pixels(1000, 8), np.zeros(1000, np.int64), "image")
    goal = target(tmp_path, "train", images, np.arange(1000), Preparation(8))
    started, submit = [], filling.ProcessPoolExecutor.submit

    def interrupted(pool: filling.ProcessPoolExecutor, *arguments: object) -> object:
        signal.raise_signal(signal.SIGINT)
        future = submit(pool, *arguments)
        started.append(future)
        return future

    monkeypatch.setattr(filling.ProcessPoolExecutor, "submit", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with Journal(tmp_path / "journal") as journal, pytest.raises(KeyboardInterrupt):
            list(fill(goal, journal, workers=2))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 1  # the call went on


def command(root: Path, raw: Path, out: Path) -> list[str]:
    places = [part for key in ("labeled", "unlabeled", "test") for part in (f"--{key}", str(raw / key))]
    script = str(root / "data_prep" / "build.py")
    return [sys.executable, script, "folder", *places, "--res", "64", "--out", str(out), "--workers", "2"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_imports_is_answered_with_one_line(signum: int, root: Path, tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(f"import os\nos.kill(os.getpid(), {int(signum)})\nraise ImportError\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    build = [sys.executable, str(root / "data_prep" / "build.py"), "list"]
    done = subprocess.run(build, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{INTERRUPTED}\n")


def descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(one for child in found for one in descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_signals_with_worker_processes(root: Path, tmp_path: Path) -> None:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=1)
    photo = encoded(Image.linear_gradient("L").resize((600, 600)), "JPEG")  # takes some milliseconds to decode
    first = tmp_path / "raw" / "unlabeled" / "photo.jpg"
    first.write_bytes(photo)
    for number in range(1600):
        first.with_name(f"{number:05d}.jpg").write_bytes(photo)
    out, journal = tmp_path / "out", tmp_path / "out.building" / "journal"
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        before = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command(root, tmp_path / "raw", out), stderr=subprocess.PIPE, text=True)
        wait_until(lambda size=before: journal.exists() and journal.stat().st_size > size)
        workers = descendants(process.pid)  # with the process that workers are forked from
        assert len(workers) >= 3
        if signum == signal.SIGKILL:
            second = subprocess.run(command(root, tmp_path / "raw", out), capture_output=True, text=True, check=False)
            assert second.returncode == 2
            assert f"Another build of {out} is running (process {process.pid})" in second.stderr
        process.send_signal(signum)
        _, err = process.communicate()
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
        else:
            assert process.returncode == 130
            assert err.splitlines()[-1] == INTERRUPTED
        wait_until(lambda pids=workers: not any(alive(pid) for pid in pids))
        assert not out.exists()
    done = subprocess.run(command(root, tmp_path / "raw", out), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert read_manifest(out).labeled_counts == [8, 8]
    assert not (tmp_path / "out.building").exists()


WORKER = """
import os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context

sys.path[0] = {root!r}
from data_prep.work import filling

def place():
    return filling.__file__

if __name__ == "__main__":
    interrupts = []
    signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    filling.start_server()
    server = forkserver._forkserver._forkserver_pid
    os.killpg(0, signal.SIGINT)
    with ProcessPoolExecutor(1, get_context("forkserver"), filling._start_worker) as pool:
        print(pool.submit(place).result() == place(), forkserver._forkserver._forkserver_pid == server, len(interrupts))
"""


def test_workers_run_the_callers_code_and_start_through_ctrl_c(root: Path, tmp_path: Path) -> None:
    for package in ("data_prep", "data_prep/work"):  # another version, in the working folder
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "data_prep" / "work" / "filling.py").write_text("def _start_worker(): pass\n")
    script = tmp_path / "script" / "main.py"
    script.parent.mkdir()
    script.write_text(WORKER.format(root=str(root)))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        start_new_session=True,  # a group of its own, as a terminal's command has, to be interrupted as a whole
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True 1\n", "")


def test_a_stale_lock_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").write_text("999999\n")
    with build_lock(tmp_path / "out"):
        with (
            pytest.raises(UserError, match=r"Another build of .*out is running \(process \d+\)"),
            build_lock(tmp_path / "out"),
        ):
            pass
        with build_lock(tmp_path / "other"):
            pass
    with build_lock(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def limited(kilobytes: int, line: list[str]) -> list[str]:
    """A command whose files have at most that size. A shell sets it: a copy of this process may be too large."""
    return ["bash", "-c", f'ulimit -f {kilobytes} && exec "$@"', "bash", *line]


def test_a_file_size_limit_is_said_and_resumable(root: Path, tmp_path: Path) -> None:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=40)
    line = command(root, tmp_path / "raw", tmp_path / "out")
    full = subprocess.run(limited(256, line), capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert full.stderr == (
        f"error: No room left for {tmp_path / 'out'} (a file of 0.7 MB is needed, ulimit -f allows 0.3 MB). What is "
        f"finished is kept in {tmp_path / 'out.building'}: make room and run the same command again, it goes on where "
        "it stood.\n"
    )
    assert not (tmp_path / "out").exists()
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")
def test_no_room_for_a_format_is_said_before_its_writer_hangs(root: Path, tmp_path: Path) -> None:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=40)
    line = [*command(root, tmp_path / "raw", tmp_path / "out"), "--format", "ffcv"]
    # An array fits, a page of FFCV's does not.
    full = subprocess.run(limited(1024, line), capture_output=True, text=True, check=False)
    assert full.returncode == 2
    message = r"error: No room left for .*out \(a file of [\d.]+ MB is needed, ulimit -f allows 1\.0 MB\)\. .*\n"
    assert re.fullmatch(rf"note: 72 images are smaller than 64 pixels and are enlarged\n{message}", full.stderr)
    result = next((tmp_path / "out.building").glob("result-*"))
    assert (result / "train.npy").exists()
    assert not [p.name for p in result.iterdir() if p.name.endswith((".beton", ".tmp"))]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 0
    assert {"train.beton", "test.beton"} < set(read_manifest(tmp_path / "out").files)


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=300)
    tiny_builds.build(tmp_path / "raw", tmp_path / "whole")
    real, calls = filling.write_rows, []

    def write_rows(path: Path, start: int, block: np.ndarray) -> None:
        calls.append(start)
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, start, block)

    monkeypatch.setattr(filling, "write_rows", write_rows)
    with pytest.raises(UserError, match=r"No room left for .* What is finished is kept in .*out.building"):
        tiny_builds.build(tmp_path / "raw", tmp_path / "out")
    tiny_builds.build(tmp_path / "raw", tmp_path / "out")
    chunks = 20 + 1  # of train and test; six were there already
    assert len(calls) == 7 + chunks - 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_is_read_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal") as journal:
        journal.add("a", 3, Done(7, [], "ab", [Mark(2, True, False, -3)]))
        journal.add("b", 0, Done(9, [filling.BadImage(4, "猫\udcff.png", "damaged")], "cd", []))
    with Journal(tmp_path / "journal") as again:
        assert again.chunks == {
            "a": {3: Done(7, [], "ab", [Mark(2, True, False, -3)])},
            "b": {0: Done(9, [filling.BadImage(4, "猫\udcff.png", "damaged")], "cd", [])},
        }
