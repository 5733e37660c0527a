"""`verify` finds what a crash, a disk or a hand has changed; a loader's quick look finds wrong sizes."""

import os
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.manifest import read_manifest
from data_prep.verify import verify_folder
from tests.data_prep import tiny_builds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_builds.make_images(tmp_path / "raw", unlabeled=50)
    tiny_builds.build(tmp_path / "raw", tmp_path / "out")
    return tmp_path / "out"


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_folder(folder)
    out = capsys.readouterr().out
    assert f"{folder}: all {len(read_manifest(folder).files)} files are as they were written" in out
    (folder / "notes.txt").write_text("mine")
    verify_folder(folder)
    assert "not part of it: notes.txt" in capsys.readouterr().out


def test_every_form_is_looked_at(folder: Path) -> None:
    for name in ("train.npy", "test_labels.npy", "labeled_rows.npy", "preview.png", "train-dali/00000.tar"):
        path = folder / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(
            UserError, match=rf"damaged: {name} \(checksum differs\)\. Build it again: python .* --force$"
        ):
            verify_folder(folder)
        assert read_manifest(folder)  # of the right sizes: a loader does not read it all
        path.write_bytes(good[:-1])
        with pytest.raises(UserError, match=rf"{name} \([\d,]+ bytes instead of [\d,]+\)"):
            verify_folder(folder)
        with pytest.raises(UserError, match=f"{name} has .* bytes, the manifest says"):
            read_manifest(folder)
        os.remove(path)
        with pytest.raises(UserError, match=rf"{name} \(missing\)"):
            verify_folder(folder)
        path.write_bytes(good)
    verify_folder(folder)


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No data set at"):
        verify_folder(tmp_path)
