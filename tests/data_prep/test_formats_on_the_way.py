"""Further formats: added to whole folders alone, and gone on with where they stood, by checksums rather than names."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.folder import dali, formats
from data_prep.folder.finished import finished_files, record_finished
from data_prep.folder.manifest import read_manifest
from data_prep.folder.verify import verify_folder
from data_prep.work.builder import build_dataset
from data_prep.work.unfinished import work_folder

SHARDS = 564 // 100 + 1 + 355 // 100 + 1  # of digits-lt's training and test images


def build(out: Path, *forms: str, shards: int | None = 100) -> list[str]:
    """Build digits-lt, and return what was said."""
    said: list[str] = []
    options = {"shard_images": shards} if "dali" in forms else {}
    build_dataset("digits-lt", out, formats=forms, progress=False, say=said.append, **options)
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arrays alone."""
    build(tmp_path_factory.mktemp("digits") / "d")
    return tmp_path_factory.getbasetemp() / "digits0" / "d"


@pytest.fixture
def out(digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(digits, tmp_path / "d")


class StopError(Exception):
    pass


class Tars:
    """Counts the shards that are written, and stops before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.stop_before: int | None = None
        self.real = dali._write_tar
        monkeypatch.setattr(dali, "_write_tar", self)

    def __call__(self, path: Path, *arguments: object) -> list[dali.Sample]:
        if len(self.written) == self.stop_before:
            raise StopError
        self.written.append(f"{path.parent.name}/{path.name}")
        return self.real(path, *arguments)  # type: ignore[arg-type]


@pytest.fixture
def tars(monkeypatch: pytest.MonkeyPatch) -> Tars:
    return Tars(monkeypatch)


@pytest.fixture
def betons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts whose FFCV files were written, by a stand-in that takes no seconds."""
    parts_written: list[str] = []

    def write(folder: Path, parts: Sequence[str], record: str, kept_as: str) -> None:
        parts_written.extend(parts)
        for part in parts:
            (folder / f"{part}.beton").write_bytes(b"beton" + (folder / f"{part}.npy").read_bytes())
            record_finished(folder, "ffcv", record, [folder / f"{part}.beton"])

    monkeypatch.setattr(formats, "write_betons", write)
    monkeypatch.setattr("data_prep.recipes.orders.require_ffcv", lambda: None)
    return parts_written


@pytest.mark.parametrize("name", ["train_labels.npy", "train.npy", "preview.png"])
def test_nothing_is_added_to_a_damaged_folder(out: Path, tars: Tars, name: str) -> None:
    flip(out / name, 136)
    before = contents(out)
    with pytest.raises(
        UserError, match=rf"d is damaged: {name} has another checksum\. Build it again: python .* --out "
    ):
        build(out, "dali")
    assert (contents(out), tars.written) == (before, [])
    with pytest.raises(UserError, match=f"{name} has another checksum"):
        verify_folder(out)


def test_only_new_files_are_hashed_and_strangers_are_not_listed(out: Path) -> None:
    (out / "notes.txt").write_text("mine")
    before = read_manifest(out).files
    build(out, "dali")
    files = read_manifest(out).files
    assert {name: files[name] for name in before} == before
    assert all(name.partition("/")[0] in ("train-dali", "test-dali") for name in set(files) - set(before))
    assert not [*out.glob(".*")]


def test_an_added_format_goes_on_where_it_stood(out: Path, digits: Path, tmp_path: Path, tars: Tars) -> None:
    whole = shutil.copytree(digits, tmp_path / "whole")
    build(whole, "dali")
    assert len(tars.written) == SHARDS
    tars.written, tars.stop_before = [], 8
    with pytest.raises(StopError):
        build(out, "dali")
    assert read_manifest(out).formats == []
    assert build(out) == [f"{out} is there already."]  # a call that does not ask for it leaves it
    for path in (out / "train-dali/00002.tar", out / "train-dali/unlabeled/00004.idx"):
        flip(path, path.stat().st_size // 2)
    (out / "test-dali/00000.idx").unlink()
    tars.written, tars.stop_before = [], None
    build(out, "dali")
    kept = [f"train-dali/0000{shard}.tar" for shard in (0, 1, 3, 5)] + ["test-dali/00001.tar"]
    assert len(tars.written) == SHARDS - len(kept)
    assert not set(tars.written) & set(kept)
    assert contents(out) == contents(whole)
    verify_folder(out)


def test_shards_of_another_size_are_not_kept(out: Path, tars: Tars) -> None:
    tars.stop_before = 8
    with pytest.raises(StopError):
        build(out, "dali")
    tars.written, tars.stop_before = [], None
    build(out, "dali", shards=200)
    assert len(tars.written) == 3 + 2
    verify_folder(out)


def test_what_an_interrupted_build_has_finished_is_kept_by_its_checksum(
    tmp_path: Path, tars: Tars, betons: list[str]
) -> None:
    out = tmp_path / "d"
    build(out, "ffcv", "dali")
    whole = contents(out)
    shutil.rmtree(out)
    betons.clear()
    tars.written, tars.stop_before = [], 8
    with pytest.raises(StopError):
        build(out, "ffcv", "dali")
    result = next(work_folder(out).glob("result-*"))
    flip(result / "train.beton", 1000)
    flip(result / "train-dali/00003.tar", 1000)
    betons.clear()
    tars.written, tars.stop_before = [], None
    build(out, "ffcv", "dali")
    assert betons == ["train"]
    assert tars.written == [f"{name}.tar" for name in ("train-dali/00003", "test-dali/00002", "test-dali/00003")]
    assert contents(out) == whole
    verify_folder(out)


def test_a_format_that_is_not_asked_for_again_goes(tmp_path: Path, tars: Tars, betons: list[str]) -> None:
    out = tmp_path / "d"
    tars.stop_before = 8
    with pytest.raises(StopError):
        build(out, "ffcv", "dali")
    build(out)
    assert (read_manifest(out).formats, betons) == ([], ["train", "test"])
    assert {path.suffix for path in out.iterdir()} == {".npy", ".png", ".json"}


def test_records_that_are_damaged_or_of_other_arrays_do_not_count(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
        record_finished(tmp_path, "dali", "key", [tmp_path / name])
    assert finished_files(tmp_path, "dali", "key").keys() == {"a", "b", "c"}
    assert finished_files(tmp_path, "dali", "other") == finished_files(tmp_path, "ffcv", "key") == {}
    record = tmp_path / ".finished-dali"
    flip(record, record.stat().st_size // 2)
    with open(record, "ab") as file:
        file.write(b'\n0000abcd ["key", {"d"')  # cut short by the end of the process
    record_finished(tmp_path, "dali", "key", [tmp_path / "b"])
    (tmp_path / "c").write_text("d")
    assert finished_files(tmp_path, "dali", "key").keys() == {"a", "b"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_every_file_of_a_shard_is_on_the_disk_before_it_is_recorded(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, named, sync, replace = set(), {}, os.fsync, os.replace

    def fsync(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        assert str(source) in synced, f"{target} is named before its bytes are on the disk"
        synced.discard(str(target.parent))
        named[target] = source
        replace(source, target)

    def finish(paths: Sequence[Path]) -> None:
        for path in paths:
            assert path in named
            assert str(path.parent) in synced, f"{path.parent} is not on the disk"

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    dali.write_dali(out, "train", 200, finish=finish)
    assert {path.suffix for path in named} == {".tar", ".idx", ".npy"}
    assert {str(out), str(out / "train-dali")} <= synced


@pytest.mark.parametrize("shards", [None, 100])
def test_the_command_names_the_shards_that_were_added_later(out: Path, betons: list[str], shards: int | None) -> None:
    build(out, "dali", shards=shards)
    command = read_manifest(out).command
    assert command.endswith((" --shard-images 100" if shards else "") + " --format dali")
    build(out, "ffcv")
    assert read_manifest(out).command == command.replace("--format dali", "--format ffcv,dali")
