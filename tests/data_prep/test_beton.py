"""FFCV's files: the same rows in the same order, or none at all."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.folder import beton
from data_prep.folder.finished import finished_files, record_path
from data_prep.folder.manifest import read_manifest
from data_prep.folder.show import show_folder
from data_prep.folder.verify import verify_folder
from data_prep.folder.writers import ImageRows
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import pixels, write_class_folders

SHARED = Path("/dev/shm")
with_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of rows with their FFCV files, which a build has added."""
    out = tmp_path_factory.mktemp("beton") / "digits"
    build_dataset("digits-lt", out, progress=False)
    before, said = read_manifest(out), []
    build_dataset("digits-lt", out, formats=["ffcv"], progress=False, say=said.append)
    after = read_manifest(out)
    assert said == [f"{out} is there already; added ffcv."]
    assert set(after.files) - set(before.files) == {"train.beton", "test.beton"}
    assert after.fingerprint == before.fingerprint
    return out


def compare(beton_file: Path, folder: Path, part: str) -> None:
    with ImageRows(folder / f"{part}.npy") as images:
        beton.compare_beton(beton_file, images, np.load(folder / f"{part}_labels.npy"))


@with_ffcv
def test_files_hold_the_rows_and_are_the_same_each_time(folder: Path) -> None:
    first = (folder / "train.beton").read_bytes()
    for part in ("train", "test"):
        compare(folder / f"{part}.beton", folder, part)
        assert (folder / f"{part}.beton").stat().st_size <= beton._size(folder / f"{part}.npy")
    beton.write_betons(folder, ["train"], record="key")
    assert (folder / "train.beton").read_bytes() == first
    assert finished_files(folder, "ffcv", "key") == {"train.beton": read_manifest(folder).files["train.beton"]}
    record_path(folder, "ffcv").unlink()
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


@with_ffcv
def test_training_images_as_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Smaller, verified, said in the manifest; test images are raw; and no other form of the same file beside it."""
    images = np.asarray(Image.fromarray(pixels(1, 12)[0]).resize((600, 500), Image.Resampling.BICUBIC))
    for part, count in (("labeled", 6), ("test", 4)):
        crops = [images[7 * i : 7 * i + 200, 9 * i + (part == "test") : 9 * i + 240] for i in range(2 * count)]
        write_class_folders(tmp_path / part, {"a": crops[::2], "b": crops[1::2]})
    places = {part: tmp_path / part for part in ("labeled", "test")}
    out, said = tmp_path / "out", []

    def build(*formats: str, **options: object) -> None:
        wanted = {**places, "unlabeled": tmp_path / "labeled", "resolution": 96, **options}
        build_dataset("folder", out, formats=formats, progress=False, say=said.append, **wanted)  # type: ignore[arg-type]

    with pytest.raises(UserError, match=r"--format ffcv and ffcv:jpeg90 are two forms of one file, train\.beton"):
        build("ffcv", "ffcv:jpeg90")
    with pytest.raises(UserError, match=r"Unknown --format 'ffcv:jpg90'\. Did you mean 'ffcv:jpeg90'"):
        build("ffcv:jpg90")
    build("array")
    fingerprint = read_manifest(out).fingerprint
    build("ffcv:jpeg90")
    manifest = read_manifest(out)
    assert said[-1] == f"{out} is there already; added ffcv."
    assert (manifest.origin.beton, manifest.fingerprint) == ("jpeg90", fingerprint)
    assert manifest.command.endswith("--format ffcv:jpeg90")
    with ImageRows(out / "train.npy") as images:
        beton.compare_beton(out / "train.beton", images, np.load(out / "train_labels.npy"), jpeg=True)
        with pytest.raises(UserError, match="image 0 differs"):
            beton.compare_beton(out / "train.beton", images, np.load(out / "train_labels.npy"))
    compare(out / "test.beton", out, "test")
    added = (out / "train.beton").read_bytes()
    build("ffcv:jpeg90")
    assert said[-1] == f"{out} is there already."
    with pytest.raises(UserError, match=r"train\.beton is 'jpeg90' there, 'raw' is asked for\. Give another --out, or"):
        build("ffcv")
    build("ffcv:jpeg90", force=True)
    again = read_manifest(out)
    assert (again.origin.beton, (out / "train.beton").read_bytes()) == ("jpeg90", added)
    verify_folder(out)
    show_folder(out)
    assert "array, ffcv:jpeg90" in capsys.readouterr().out
    where = added.index(b"\xff\xda") + 40
    (out / "train.beton").write_bytes(added[:where] + bytes([added[where] ^ 1]) + added[where + 1 :])
    with pytest.raises(UserError, match=r"train\.beton has another checksum"):
        verify_folder(out)


@with_ffcv
def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    data = (folder / "test.beton").read_bytes()
    position = data.index(np.load(folder / "test.npy")[17].tobytes())
    harms = {
        "image 17 differs": data[: position + 300] + b"\x7f" * 9 + data[position + 309 :],
        "damaged": data[: len(data) // 1000],
        "unfinished": data[:16] + b"\0" * 8 + data[24:],
    }
    for message, harmed in harms.items():
        (tmp_path / "x.beton").write_bytes(harmed)
        with pytest.raises(UserError, match=message):
            compare(tmp_path / "x.beton", folder, "test")


@with_ffcv
def test_reading_back_tells_the_watchdog_that_it_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's process changes the file's time while it compares, as often as BEAT_ROWS says."""
    monkeypatch.setattr(beton, "BEAT_ROWS", 100)
    monkeypatch.setattr(beton, "_temporary", lambda folder, part: folder / "copy.beton")
    (folder / "copy.beton").write_bytes((folder / "train.beton").read_bytes())
    writer = pytest.importorskip("ffcv.writer")
    monkeypatch.setattr(writer.DatasetWriter, "from_indexed_dataset", lambda self, samples: None)
    monkeypatch.setattr(writer.DatasetWriter, "__init__", lambda self, *args, **options: None)
    times = []
    real = os.utime
    monkeypatch.setattr(os, "utime", lambda path: (real(path), times.append(path)))
    beton._write(folder, "train")
    assert times == [folder / "copy.beton"] * -(-len(np.load(folder / "train_labels.npy")) // 100)
    (folder / "copy.beton").unlink()


WATCHED = "import os, sys, time; [(os.utime(sys.argv[1]), time.sleep(0.05)) for _ in range(80)]"


@pytest.mark.parametrize(("code", "ends"), [(WATCHED, True), ("import time; time.sleep(60)", False)])
def test_the_watchdog_sees_a_file_that_is_touched(tmp_path: Path, code: str, ends: bool) -> None:
    file = tmp_path / "x.tmp"
    file.touch()
    process = subprocess.Popen([sys.executable, "-c", code, str(file)])
    try:
        if ends:  # in more time than the watchdog's patience
            beton._watch(process, tmp_path, [file], stall_seconds=3.0)
            assert process.returncode == 0
        else:
            with pytest.raises(UserError, match="wrote nothing for 3 s and was stopped"):
                beton._watch(process, tmp_path, [file], stall_seconds=3.0)
    finally:
        process.kill()
        process.wait()


@with_ffcv
def test_a_hanging_writer_is_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    # FFCV's worker fails on two channels, and its main process waits for it for ever.
    np.save(tmp_path / "train.npy", pixels(300)[..., :2])
    np.save(tmp_path / "train_labels.npy", np.zeros(300, np.int64))
    before = set(SHARED.glob("psm_*"))
    with pytest.raises(UserError, match="was stopped"):
        beton.write_betons(tmp_path, ["train"], stall_seconds=6)
    leaked = [path for path in set(SHARED.glob("psm_*")) - before if path.stat().st_size == 300 * 24]
    assert not leaked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.npy", "train_labels.npy"]


@with_ffcv
def test_one_core_is_enough(folder: Path, tmp_path: Path) -> None:
    for name in ("test.npy", "test_labels.npy"):
        shutil.copy(folder / name, tmp_path)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # which the writer inherits
    try:
        beton.write_betons(tmp_path, ["test"], stall_seconds=20)
    finally:
        os.sched_setaffinity(0, cores)
    assert (tmp_path / "test.beton").read_bytes() == (folder / "test.beton").read_bytes()


@with_ffcv
def test_a_writer_ends_with_its_build(root: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros((200_000, 32, 32, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.zeros(200_000, np.int64))
    code = "import sys; from pathlib import Path; from data_prep.folder.beton import write_betons; "
    code += "write_betons(Path(sys.argv[1]), ['train'])"
    deadline = time.monotonic() + 120
    writers: list[int] = []
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root) as build:
        try:
            while not writers:
                assert build.poll() is None
                assert time.monotonic() < deadline
                writers = [pid for pid in processes() if str(tmp_path) in command_line(pid) and pid != build.pid]
        finally:
            build.kill()
    while any(str(tmp_path) in command_line(pid) for pid in writers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "train.beton").exists()


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_without_ffcv_the_remedy_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ffcv\]'"):
        build_dataset("digits-lt", tmp_path / "d", formats=["ffcv"], progress=False)
    assert not (tmp_path / "d").exists()
