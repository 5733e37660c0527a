"""The manifest: what is written is what is read, and what is wrong is said."""

import json
import shlex
from pathlib import Path

import pytest
import typer

from data_prep.build import app
from data_prep.catalog import long_tail
from data_prep.errors import UserError, unknown
from data_prep.manifest import FileEntry, Manifest, guess_command, read_manifest, write_manifest

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


def test_missing_folder_names_the_command() -> None:
    with pytest.raises(UserError, match=r"No data set at data/imagenet127-64 .*build.py imagenet127 --res 64$"):
        read_manifest("data/imagenet127-64")
    with pytest.raises(UserError, match=r"build.py imagenet127 --res 32 --seed 1$"):
        read_manifest("data/imagenet127-32-s1")
    with pytest.raises(UserError, match=r"build.py cifar10-lt --n1 500 --m1 4000 --gamma-l 100 --gamma-u 100$"):
        read_manifest("data/cifar10-lt-n500-m4000-l100-u100")


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
    with pytest.raises(UserError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_unknown_names_the_nearest() -> None:
    assert str(unknown("method", "fixmach", ["semi", "fixmatch"])) == (
        "Unknown method 'fixmach'. Did you mean 'fixmatch'? Known: semi, fixmatch."
    )
    assert "Did you mean" not in str(unknown("method", "zzz", ["semi"]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma_u": "1/100"},
        {"n1": 1500, "m1": 3000, "gamma_l": "150", "gamma_u": "1"},
        {"selection": "random", "seed": 3, "disjoint": True},
    ],
)
def test_the_command_proposed_for_a_missing_folder_builds_that_folder(options):
    wanted = long_tail("cifar10-lt", **options).folder_name()
    name, *rest = shlex.split(guess_command(Path("data") / wanted))
    group = typer.main.get_command(app)
    command = group.get_command(group.make_context("build.py", [name, *rest]), name)
    given = command.make_context(name, rest).params
    recipe_options = {key: given[key] for key in ("n1", "m1", "gamma_l", "gamma_u", "selection", "seed", "disjoint")}
    assert long_tail(name, **recipe_options).folder_name() == wanted
