"""The manifest: what is written is what is read, and what is wrong is said."""

import json
from pathlib import Path

import pytest

from data_prep.errors import UserError, unknown
from data_prep.folder.manifest import FileEntry, Manifest, read_manifest, write_manifest

FACTS = {
    "name": "tiny",
    "resolution": 8,
    "class_names": ["a", "b"],
    "labeled_counts": [2, 1],
    "unlabeled_counts": None,
    "test_counts": [1, 1],
    "mean": [0.1, 0.2, 0.3],
    "std": [1, 1, 1],
    "split": {"dataset": "folder"},
    "source": "here",
    "command": "python data_prep/build.py folder",
    "origin": {},
}


def make(folder: Path, **changes: object) -> Manifest:
    (folder / "train.npy").write_bytes(b"12345")
    entry = FileEntry(bytes=5, sha256="0" * 64, shape=[5], dtype="uint8")
    return Manifest(**{**FACTS, "files": {"train.npy": entry}, **changes})


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "train.npy"]


def test_fingerprint_is_of_the_data_alone(tmp_path: Path) -> None:
    base = make(tmp_path)
    other = base.files["train.npy"].model_copy(update={"sha256": "1" * 64})
    assert base.fingerprint == make(tmp_path, command="another", name="else").fingerprint
    assert base.fingerprint == make(tmp_path, files={**base.files, "train.beton": other}).fingerprint
    assert base.fingerprint == make(tmp_path, files={**base.files, "train-dali/order.npy": other}).fingerprint
    assert base.fingerprint != make(tmp_path, files={"train.npy": other}).fingerprint
    assert base.fingerprint != make(tmp_path, class_names=["b", "a"]).fingerprint


def test_missing_folder_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_manifest("data/imagenet127-64", build="imagenet127 --res 64")
    assert str(caught.value) == (
        "No data set at data/imagenet127-64 (manifest.json is missing). "
        "Build it: python data_prep/build.py imagenet127 --res 64"
    )
    with pytest.raises(UserError) as caught:
        read_manifest("data/photos")
    assert str(caught.value) == (
        "No data set at data/photos (manifest.json is missing). "
        "Build it with python data_prep/build.py NAME (python data_prep/build.py --help lists the names)"
    )
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(
        UserError, match=r"not valid JSON .* Rebuild it: python data_prep/build.py folder --res 8 --force$"
    ):
        read_manifest(tmp_path, build="folder --res 8")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    write_manifest(tmp_path, make(tmp_path))
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    wrongs = {
        "schema version 2": {**good, "schema_version": 2},
        "schema version None": [],
        "labeled_counts has 1 entries for 2 classes": {**good, "labeled_counts": [1]},
        "extra: Extra inputs": {**good, "extra": 1},
        "train.npy has 5 bytes, the manifest says 6": {
            **good,
            "files": {"train.npy": {**good["files"]["train.npy"], "bytes": 6}},
        },
        "test.npy is missing": {**good, "files": {"test.npy": good["files"]["train.npy"]}},
    }
    for message, content in wrongs.items():
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message) as caught:
            read_manifest(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match=r"not valid JSON.*Rebuild it with python .* NAME --force"):
        read_manifest(tmp_path)


def test_unknown_names_the_nearest() -> None:
    assert str(unknown("method", "fixmach", ["semi", "fixmatch"])) == (
        "Unknown method 'fixmach'. Did you mean 'fixmatch'? Known: semi, fixmatch."
    )
    assert "Did you mean" not in str(unknown("method", "zzz", ["semi"]))
