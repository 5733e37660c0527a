"""FFCV's files: the same rows in the same order, or none at all."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import beton
from data_prep.builder import build_dataset
from data_prep.errors import UserError
from data_prep.manifest import read_manifest
from tests.data_prep.archives import pixels

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


def arrays(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    return np.load(folder / f"{part}.npy"), np.load(folder / f"{part}_labels.npy")


@with_ffcv
def test_files_hold_the_rows_and_are_the_same_each_time(folder: Path) -> None:
    first = (folder / "train.beton").read_bytes()
    for part in ("train", "test"):
        beton.compare_beton(folder / f"{part}.beton", *arrays(folder, part))
    beton.write_betons(folder, ["train"])
    assert (folder / "train.beton").read_bytes() == first
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]


@with_ffcv
def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    rows, data = arrays(folder, "test"), (folder / "test.beton").read_bytes()
    place = data.index(rows[0][17].tobytes())
    harms = {
        "image 17 differs": data[: place + 300] + b"\x7f" * 9 + data[place + 309 :],
        "damaged": data[: len(data) // 1000],
        "unfinished": data[:16] + b"\0" * 8 + data[24:],
    }
    for message, harmed in harms.items():
        (tmp_path / "x.beton").write_bytes(harmed)
        with pytest.raises(UserError, match=message):
            beton.compare_beton(tmp_path / "x.beton", *rows)


@with_ffcv
def test_a_hanging_writer_is_stopped_and_leaves_nothing(tmp_path: Path) -> None:
    # FFCV's worker fails on two channels, and its main process waits for it for ever.
    np.save(tmp_path / "train.npy", pixels(300)[..., :2])
    np.save(tmp_path / "train_labels.npy", np.zeros(300, np.int64))
    with pytest.raises(UserError, match="was stopped"):
        beton.write_betons(tmp_path, ["train"], stall_seconds=20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.npy", "train_labels.npy"]


@with_ffcv
def test_a_writer_ends_with_its_build(root: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.zeros((200_000, 32, 32, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.zeros(200_000, np.int64))
    code = f"from pathlib import Path; from data_prep.beton import write_betons; write_betons(Path({str(tmp_path)!r}), ['train'])"
    build = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 120
    while not (tmp_path / ".train.beton.tmp").exists():
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    writers = [pid for pid in processes() if str(tmp_path) in command_line(pid) and pid != build.pid]
    assert writers
    build.kill()
    build.wait()
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
    with pytest.raises(UserError, match=r"pip install 'semi-fast\[ffcv\]'"):
        build_dataset("digits-lt", tmp_path / "d", formats=["ffcv"], progress=False)
    assert not (tmp_path / "d").exists()
