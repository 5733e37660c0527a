"""`verify` finds what a crash, a disk or a hand has changed; a loader's quick look finds wrong sizes."""

import errno
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.folder.manifest import read_manifest
from data_prep.folder.verify import verify_folder
from tests.data_prep import tiny_builds

WITH_FFCV = importlib.util.find_spec("ffcv") is not None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    tiny_builds.make_images(root / "raw", unlabeled=50)
    tiny_builds.build(root / "raw", root / "out", formats=("ffcv", "dali") if WITH_FFCV else ("dali",))
    return root / "out"


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A folder of all forms, to harm."""
    return shutil.copytree(built, tmp_path / "out")


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_folder(folder)
    out = capsys.readouterr().out
    assert f"{folder}: all {len(read_manifest(folder).files)} files are as they were written" in out
    (folder / "notes.txt").write_text("mine")
    verify_folder(folder)
    assert "not part of it: notes.txt" in capsys.readouterr().out


def test_every_form_is_looked_at(folder: Path) -> None:
    names = ["train.npy", "test_labels.npy", "labeled_rows.npy", "preview.png", "train-dali/00000.tar"]
    names += [name for name in ("train.beton", "test.beton") if WITH_FFCV]
    for name in names:
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(
            UserError, match=rf"damaged: {name} has another checksum\. Build it again: python .* --force$"
        ):
            verify_folder(folder)
        assert read_manifest(folder)  # of the right sizes: a loader does not read it all
        path.write_bytes(good[:-1])
        with pytest.raises(UserError, match=rf"{name} has [\d,]+ bytes, the manifest says [\d,]+"):
            verify_folder(folder)
        with pytest.raises(UserError, match=f"{name} has .* bytes, the manifest says"):
            read_manifest(folder)
        os.remove(path)
        with pytest.raises(UserError, match=rf"{name} is missing"):
            verify_folder(folder)
        path.write_bytes(good)
    verify_folder(folder)


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No data set at"):
        verify_folder(tmp_path)


@pytest.mark.skipif(not WITH_FFCV, reason="FFCV is not installed")
def test_damage_in_the_middle_of_an_ffcv_file(folder: Path) -> None:
    path = folder / "train.beton"
    good = path.read_bytes()
    for position in (0, 40, len(good) // 2):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(UserError, match=r"damaged: train\.beton has another checksum"):
            verify_folder(folder)


def test_every_damage_is_named_at_once(folder: Path) -> None:
    (folder / "test.npy").unlink()
    (folder / "train_labels.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged: test\.npy is missing; train_labels\.npy has 0 bytes, the"):
        verify_folder(folder)


def test_unreadable_files_are_named_with_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "test.npy").unlink()

    def refuse(path: Path, sha256: str) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("data_prep.folder.manifest.has_checksum", refuse)
    with pytest.raises(
        UserError, match=r"labeled_rows\.npy cannot be read \(Input/output error\); .*test\.npy is miss"
    ):
        verify_folder(folder)
