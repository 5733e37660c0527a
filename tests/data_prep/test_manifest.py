"""The manifest: what is written is what is read, and what is wrong is said."""

import json
import shlex
from pathlib import Path

import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.build import app
from data_prep.errors import UserError, unknown
from data_prep.folder.manifest import FileEntry, Manifest, guess_command, read_manifest, write_manifest
from data_prep.recipes.catalog import CATALOG, recipe

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


gammas = st.fractions(min_value=1, max_value=300, max_denominator=12)
draws = st.one_of(st.just({}), st.integers(0, 99).map(lambda seed: {"selection": "random", "seed": seed}))
sizes = st.sampled_from([None, 16, 32, 64, 96])
tails = st.fixed_dictionaries(
    {"n1": st.integers(1, 9999), "gamma_l": gammas.map(str), "disjoint": st.booleans(), "resolution": sizes}
)
unlabeled = st.fixed_dictionaries(
    {"m1": st.integers(0, 9999), "gamma_u": st.one_of(gammas, gammas.map(lambda g: 1 / g)).map(str)}
)
LONG_TAILED = [name for name, entry in CATALOG.items() if entry.defaults]


def long_tailed(name: str) -> st.SearchStrategy:
    more = st.just({}) if name == "stl10-lt" else unlabeled
    return st.tuples(st.just(name), st.tuples(tails, more, draws).map(lambda parts: parts[0] | parts[1] | parts[2]))


imagenet = st.tuples(
    st.just("imagenet127"),
    st.fixed_dictionaries(
        {
            "resolution": st.integers(4, 1024),
            "labeled_fraction": st.floats(1e-6, 1),
            "selection": st.sampled_from(["first", "random"]),
            "disjoint": st.booleans(),
        },
    ).flatmap(lambda o: st.integers(0, 0 if o["selection"] == "first" else 99).map(lambda seed: {**o, "seed": seed})),
)
wishes = st.one_of(imagenet, st.sampled_from(LONG_TAILED).flatmap(long_tailed))


@settings(deadline=None, max_examples=50)
@given(wishes)
@example(("cifar10-lt", {}))
@example(("digits-lt", {}))
@example(("stl10-lt", {"resolution": 96}))
@example(("cifar10-lt", {"gamma_l": "5/2", "gamma_u": "2/5"}))
@example(("imagenet127", {"labeled_fraction": 0.2, "disjoint": True}))
def test_the_command_proposed_for_a_missing_folder_builds_that_folder(wish: tuple[str, dict[str, object]]) -> None:
    wanted = recipe(wish[0], **wish[1])
    name, *rest = shlex.split(guess_command(Path("data") / wanted.folder_name()))
    group = typer.main.get_command(app)
    command = group.get_command(group.make_context("build.py", [name, *rest]), name)
    given = command.make_context(name, rest).params
    assert given["out"] is None
    keys = {"res": "resolution"}
    found = recipe(
        name, **{keys.get(k, k): v for k, v in given.items() if keys.get(k, k) in wanted.__dataclass_fields__}
    )
    assert (found.folder_name(), found.options(), found.resolution) == (
        wanted.folder_name(),
        wanted.options(),
        wanted.resolution,
    )


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("data/imagenet127-64-f0.2-s3", "imagenet127 --res 64 --labeled-fraction 0.2 --seed 3"),
        ("data/imagenet127-32-first-disjoint", "imagenet127 --res 32 --selection first --disjoint"),
        ("data/stl10-lt-n150-l10-96px", "stl10-lt --n1 150 --gamma-l 10 --res 96"),
        ("data/cifar10-lt-n500-m4000-l5over2-urev5over2", "cifar10-lt --n1 500 --m1 4000 --gamma-l 5/2 --gamma-u 2/5"),
        ("/big/svhn-lt-n5-m4-l1-u1", "svhn-lt --n1 5 --m1 4 --gamma-l 1 --gamma-u 1 --out /big/svhn-lt-n5-m4-l1-u1"),
        ("data/cifar10-lt-mine", "cifar10-lt --out data/cifar10-lt-mine"),
        ("data/stl10-lt-m5", "stl10-lt --out data/stl10-lt-m5"),
        ("data/photos", "NAME"),
    ],
)  # fmt: skip
def test_proposed_commands(folder: str, command: str) -> None:
    assert guess_command(Path(folder)) == command
