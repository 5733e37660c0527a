"""The manifest: what is written is what is read, and what is wrong is said."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError, unknown
from data_prep.folder.manifest import ARRAYS, FileEntry, Manifest, file_entry, read_manifest, write_manifest
from data_prep.folder.show import show_folder
from data_prep.folder.verify import verify_folder
from data_prep.work.builder import build_dataset

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
    for name in ARRAYS:
        (folder / name).write_bytes(b"12345")
    entry = FileEntry(bytes=5, sha256="0" * 64, shape=[5], dtype="uint8")
    return Manifest(**{**FACTS, "files": dict.fromkeys(ARRAYS, entry), **changes})


def sealed(content: object) -> bytes:
    """A manifest's bytes with the checksum that goes with them."""
    if isinstance(content, dict):
        content = {"checksum": "", **{key: value for key, value in content.items() if key != "checksum"}}
    data = json.dumps(content).encode()
    return data.replace(b'"checksum": ""', f'"checksum": "{hashlib.sha256(data).hexdigest()}"'.encode())


def test_round_trip(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["manifest.json", *ARRAYS])


def test_fingerprint_is_of_the_data_alone(tmp_path: Path) -> None:
    base = make(tmp_path)
    other = base.files["train.npy"].model_copy(update={"sha256": "1" * 64})
    assert base.fingerprint == make(tmp_path, command="another", name="else").fingerprint
    assert base.fingerprint == make(tmp_path, files={**base.files, "train.beton": other}).fingerprint
    assert base.fingerprint == make(tmp_path, files={**base.files, "train-dali/order.npy": other}).fingerprint
    assert base.fingerprint != make(tmp_path, files={**base.files, "train.npy": other}).fingerprint
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
        UserError, match=r"not valid JSON .* Rebuild it: python data_prep/build.py folder --res 8 --out \S+ --force$"
    ):
        read_manifest(tmp_path, build="folder --res 8")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    write_manifest(tmp_path, make(tmp_path))
    path = tmp_path / "manifest.json"
    good = json.loads(path.read_text())
    wrongs = {
        "schema version 3": {**good, "schema_version": 3},
        "schema version None": [],
        "labeled_counts has 1 entries for 2 classes": {**good, "labeled_counts": [1]},
        "extra: Extra inputs": {**good, "extra": 1},
        "train.npy has 5 bytes, the manifest says 6": {
            **good,
            "files": {**good["files"], "train.npy": {**good["files"]["train.npy"], "bytes": 6}},
        },
        "train.beton is missing": {**good, "files": {**good["files"], "train.beton": good["files"]["train.npy"]}},
        **{
            f"files must list {missing} with its shape": {
                **good,
                "files": {name: entry for name, entry in good["files"].items() if name != missing},
            }
            for missing in ARRAYS
        },
    }
    for message, content in wrongs.items():
        path.write_bytes(sealed(content))
        with pytest.raises(UserError, match=message) as caught:
            read_manifest(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text("{")
    with pytest.raises(UserError, match=rf"not valid JSON.*Rebuild it with python .* NAME --out {tmp_path} --force"):
        read_manifest(tmp_path)


def test_unknown_names_the_nearest() -> None:
    assert str(unknown("method", "fixmach", ["semi", "fixmatch"])) == (
        "Unknown method 'fixmach'. Did you mean 'fixmatch'? Known: semi, fixmatch."
    )
    assert "Did you mean" not in str(unknown("method", "zzz", ["semi"]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_dataset("digits-lt", tmp_path_factory.mktemp("built") / "d", progress=False)


@pytest.fixture
def digits(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "moved")


CHANGES = {
    "a mean": ["mean", 0, 0.75],
    "a class name": ["class_names", 1, "seven"],
    "a count": ["labeled_counts", 0, 4],
    "a file less": ["files", "unlabeled_rows.npy", None],
    "a command": ["command", None, "rm -r /"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_changed_is_refused_everywhere(digits: Path, change: str) -> None:
    path, (key, part, value) = digits / "manifest.json", CHANGES[change]
    content = json.loads(path.read_text())
    if part is None:
        content[key] = value
    elif value is None:
        del content[key][part]
    else:
        content[key][part] = value
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for refuse in (verify_folder, show_folder, read_manifest, lambda folder: build_dataset("digits-lt", folder)):
        with pytest.raises(UserError, match=r"manifest\.json is damaged: its checksum is not that of its content"):
            refuse(digits)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ({"mean": [0, 0, 0]}, ": python data_prep/build.py digits-lt --out {}"),
        ({"command": "rm -r /"}, " with python data_prep/build.py NAME --out {}"),
    ],
)
def test_a_damaged_manifest_is_told_how_to_be_rebuilt(digits: Path, content: dict[str, object], remedy: str) -> None:
    path = digits / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(UserError) as caught:
        read_manifest(digits)
    assert f"Rebuild it{remedy.format(digits)} --force" in str(caught.value)


def test_a_manifest_of_an_earlier_version_is_told_how_to_be_rebuilt(digits: Path) -> None:
    path = digits / "manifest.json"
    content = {**json.loads(path.read_text()), "schema_version": 1}
    del content["checksum"]
    for damaged in ({**content, "command": "build.py 'unfinished"}, {"schema_version": 1}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(
            UserError, match=rf"which has a checksum of its own\. Rebuild it with python .* NAME --out {digits} --force"
        ):
            verify_folder(digits)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        verify_folder(digits)
    assert str(caught.value) == (
        f"{path} has schema version 1, this program reads version 2, which has a checksum of its own. Rebuild it: "
        f"python data_prep/build.py digits-lt --out {digits} --force"
    )


@pytest.mark.parametrize("name", ["labeled_counts", "unlabeled_counts", "test_counts"])
def test_counts_are_those_of_the_label_arrays(digits: Path, name: str) -> None:
    manifest = read_manifest(digits)
    counts = getattr(manifest, name)
    write_manifest(digits, manifest.model_copy(update={name: [counts[1], counts[0] + 1, *counts[2:]]}))
    with pytest.raises(UserError, match=f"damaged: {name} of manifest.json are not those of the label arrays"):
        verify_folder(digits)


def test_other_labels_are_other_counts(digits: Path) -> None:
    labels = np.load(digits / "test_labels.npy")
    np.save(digits / "test_labels.npy", np.where(labels == 3, 4, labels))
    manifest = read_manifest(digits)
    files = {**manifest.files, "test_labels.npy": file_entry(digits / "test_labels.npy")}
    write_manifest(digits, manifest.model_copy(update={"files": files}))
    with pytest.raises(UserError, match=r"test_counts of manifest\.json are not those of the label arrays"):
        verify_folder(digits)


def test_the_remedy_rebuilds_a_folder_where_it_lies_now(built: Path, digits: Path) -> None:
    assert f"--out {built}" in read_manifest(digits).command
    (digits / "test.npy").unlink()
    for refuse in (verify_folder, read_manifest):
        with pytest.raises(UserError) as caught:
            refuse(digits)
        assert str(caught.value).endswith(f": python data_prep/build.py digits-lt --out {digits} --force")


def test_an_unreadable_manifest_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    for refuse in (verify_folder, show_folder):
        with pytest.raises(
            UserError, match=r"^Cannot read .*manifest\.json \(Is a directory\)\. Mend that, or rebuild"
        ):
            refuse(tmp_path)
