"""A second call: what is there is compared with what is asked for, and nothing unfinished is lost unsaid."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.files import read_records
from data_prep.folder.manifest import read_manifest
from data_prep.work import assembly, filling
from data_prep.work.builder import build_dataset
from data_prep.work.unfinished import work_folder
from tests.data_prep.archives import encoded, pixels, write_class_folders

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLIT = {"n1": 2, "m1": 1, "gamma_l": "1", "gamma_u": "1"}
LACKS = "a partial source: 30 of 50,000 training images, 10 of 10,000 test images"


def class_folders(root: Path, seed: int = 0, per_class: int = 3) -> Path:
    """train/ and test/ folders of CIFAR-10's classes."""
    images = iter(pixels(10 * per_class + 10, 32, seed))
    write_class_folders(root / "train", {name: [next(images) for _ in range(per_class)] for name in CIFAR10})
    write_class_folders(root / "test", {name: [next(images)] for name in CIFAR10})
    return root


def own_folders(root: Path, seed: int = 0, unlabeled: int = 20) -> dict[str, Path]:
    """labeled/, unlabeled/ and test/ folders of two classes."""
    images = iter(pixels(12 + unlabeled, 12, seed))
    for split in ("labeled", "test"):
        write_class_folders(root / split, {name: [next(images) for _ in range(3)] for name in ("cat", "dog")})
    write_class_folders(root, {"unlabeled": [next(images) for _ in range(unlabeled)]})
    return {key: root / key for key in ("labeled", "unlabeled", "test")}


def call(name: str, out: Path, **options: object) -> list[str]:
    """Build, and return what was said."""
    said: list[str] = []
    build_dataset(name, out, progress=False, say=said.append, **options)  # type: ignore[arg-type]
    return said


def touch(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        os.utime(path, (1, 1))


@pytest.mark.parametrize(("seed", "per_class"), [(1, 3), (0, 4), (1, 4)])
def test_another_source_of_the_same_name_is_another_data_set(tmp_path: Path, seed: int, per_class: int) -> None:
    first, second = class_folders(tmp_path / "a" / "raw"), class_folders(tmp_path / "b" / "raw", seed, per_class)
    out = tmp_path / "d"
    call("cifar10-lt", out, source=first, **SPLIT)
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(
        UserError, match=rf"The source changed: {out} was built from class folders of raw; .* Add --force"
    ):
        call("cifar10-lt", out, source=second, **SPLIT)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert not work_folder(out).exists()
    assert call("cifar10-lt", out, source=first, **SPLIT) == [f"{out} is there already."]
    call("cifar10-lt", out, source=second, force=True, **SPLIT)
    assert call("cifar10-lt", out, source=second, **SPLIT) == [f"{out} is there already."]


def test_one_changed_picture_is_another_source(tmp_path: Path) -> None:
    places, out = own_folders(tmp_path / "raw"), tmp_path / "d"
    call("folder", out, resolution=8, **places)
    path = places["unlabeled"] / "0007.png"
    path.write_bytes(encoded(pixels(1, 12, seed=9)[0]))
    with pytest.raises(UserError, match="The source changed"):
        call("folder", out, resolution=8, **places)


def test_a_picture_that_changes_while_the_rest_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder holds the old picture, and the manifest must not vouch for the new one."""
    places, out = own_folders(tmp_path / "raw"), tmp_path / "d"
    real = assembly.write_formats

    def late(*arguments: object) -> list[str]:
        (places["unlabeled"] / "0007.png").write_bytes(encoded(pixels(1, 12, seed=9)[0]))
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "write_formats", late)
        call("folder", out, resolution=8, **places)
    with pytest.raises(UserError, match="The source changed"):
        call("folder", out, resolution=8, **places)


def test_a_source_that_was_moved_is_the_same_and_one_that_was_touched_is_not(tmp_path: Path) -> None:
    source, out = class_folders(tmp_path / "raw"), tmp_path / "d"
    call("cifar10-lt", out, source=source, **SPLIT)
    before = read_manifest(out)
    moved = source.rename(tmp_path / "elsewhere")
    assert call("cifar10-lt", out, source=moved, **SPLIT) == [f"{out} is there already."]
    assert read_manifest(out).origin.places == {"source": str(moved)}
    touch(moved)
    with pytest.raises(UserError) as caught:
        call("cifar10-lt", out, source=moved, **SPLIT)
    assert str(caught.value) == (
        f"The source changed: {out} was built from class folders of elsewhere; {LACKS}; what is there now differs "
        "(names, sizes or times of change of its files). Add --force to rebuild, or give another --out."
    )
    call("cifar10-lt", out, source=moved, force=True, **SPLIT)
    assert call("cifar10-lt", out, source=moved, **SPLIT) == [f"{out} is there already."]
    assert read_manifest(out).fingerprint == before.fingerprint


def test_a_zip_is_known_by_its_checksums(tmp_path: Path) -> None:
    class_folders(tmp_path / "raw")
    archive = Path(shutil.make_archive(str(tmp_path / "one"), "zip", tmp_path / "raw"))
    out = tmp_path / "d"
    call("cifar10-lt", out, source=archive, **SPLIT)
    touch(archive)
    copied = shutil.copyfile(archive, tmp_path / "two.zip")
    for same in (archive, copied):
        assert call("cifar10-lt", out, source=same, **SPLIT) == [f"{out} is there already."]
    with zipfile.ZipFile(copied, "a") as more:
        more.writestr("train/cat/0001.more.png", encoded(pixels(1, 32, seed=5)[0]))
    with pytest.raises(UserError, match="The source changed"):
        call("cifar10-lt", out, source=copied, **SPLIT)


def test_own_folders_may_move_too(tmp_path: Path) -> None:
    places, out = own_folders(tmp_path / "raw"), tmp_path / "d"
    call("folder", out, resolution=8, **places)
    moved = {key: shutil.move(path, tmp_path / f"new-{key}") for key, path in places.items()}
    assert call("folder", out, resolution=8, **moved) == [f"{out} is there already."]
    swapped = {**moved, "labeled": moved["test"], "test": moved["labeled"]}
    with pytest.raises(UserError, match="The source changed"):
        call("folder", out, resolution=8, **swapped)


def test_a_source_that_is_gone_is_said(tmp_path: Path) -> None:
    source, out = class_folders(tmp_path / "raw"), tmp_path / "d"
    call("cifar10-lt", out, source=source, **SPLIT)
    shutil.rmtree(source)
    said = call("cifar10-lt", out, source=source, **SPLIT)
    assert said[0] == f"note: {source} is not there any more, so the folder cannot be compared with it."
    assert said[1].startswith(f"{out} is there already, built from class folders of raw")
    with pytest.raises(UserError, match="No such file or folder"):
        call("cifar10-lt", out, source=tmp_path / "other", **SPLIT)


def test_without_a_source_it_says_what_the_folder_was_built_from(tmp_path: Path) -> None:
    source, out = class_folders(tmp_path / "raw"), tmp_path / "d"
    call("cifar10-lt", out, source=source, **SPLIT)
    assert call("cifar10-lt", out, **SPLIT) == [f"{out} is there already, built from class folders of raw; {LACKS}."]


def test_skipped_images_are_an_error_when_errors_are_asked_for(tmp_path: Path) -> None:
    places, out = own_folders(tmp_path / "raw"), tmp_path / "d"
    (places["unlabeled"] / "0003.png").write_bytes(b"")
    call("folder", out, resolution=8, on_bad_image="skip", **places)
    assert read_manifest(out).origin.on_bad_image == "skip"
    again = {"resolution": 8, **places}
    assert call("folder", out, on_bad_image="skip", **again) == [f"{out} is there already."]
    with pytest.raises(UserError, match=r"lacks 1 unreadable images, error is asked for. Add --on-bad-image skip"):
        call("folder", out, **again)
    whole = tmp_path / "whole"
    shutil.copyfile(places["unlabeled"] / "0004.png", places["unlabeled"] / "0003.png")
    with pytest.raises(UserError, match="The source changed"):
        call("folder", out, on_bad_image="skip", **again)
    call("folder", whole, **again)
    assert call("folder", whole, on_bad_image="skip", **again) == [f"{whole} is there already."]  # nothing to skip


def test_shards_of_another_size_are_said(tmp_path: Path) -> None:
    out = tmp_path / "d"
    call("digits-lt", out, formats=["dali"], shard_images=100)
    assert read_manifest(out).origin.shard_images == 100
    with pytest.raises(UserError, match="holds another data set: shard_images is 100 there, 200 is asked for"):
        call("digits-lt", out, formats=["dali"], shard_images=200)
    assert call("digits-lt", out, formats=["dali"]) == [f"{out} is there already."]
    with pytest.raises(UserError, match="--shard-images has no effect without --format dali"):
        call("digits-lt", out, shard_images=200)
    later = tmp_path / "later"
    call("digits-lt", later)
    assert read_manifest(later).origin.shard_images is None
    call("digits-lt", later, formats=["dali"], shard_images=50)
    assert read_manifest(later).origin.shard_images == 50


def test_the_command_of_the_manifest_makes_this_folder(tmp_path: Path) -> None:
    out = tmp_path / "my digits"
    call("digits-lt", out, n1=20, disjoint=True)
    base = f"python data_prep/build.py digits-lt --n1 20 --disjoint --out '{out}'"
    assert read_manifest(out).command == base
    call("digits-lt", out, n1=20, disjoint=True, formats=["dali"])
    assert read_manifest(out).command == f"{base} --format dali"
    command = "python data_prep/build.py digits-lt --force --format=dali --seed 3 --selection random"
    call("digits-lt", tmp_path / "e", selection="random", seed=3, command=command)
    assert read_manifest(tmp_path / "e").command == "python data_prep/build.py digits-lt --seed 3 --selection random"


def test_what_is_read_must_not_lie_in_what_is_replaced(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "d" / "raw")
    for out in (tmp_path / "d", tmp_path / "d" / "raw"):
        with pytest.raises(UserError, match=r"--source .*raw lies inside --out .*, the folder that the build makes"):
            call("cifar10-lt", out, source=source, force=True, **SPLIT)
    with pytest.raises(UserError, match=r"--out .*out lies inside .*train, all of whose images the build reads"):
        call("cifar10-lt", source / "train" / "out", source=source, **SPLIT)
    call("cifar10-lt", source / "out", source=source, **SPLIT)  # beside train/ and test/ it is not read
    with pytest.raises(UserError, match=r"--cache .* lies inside --out"):
        call("digits-lt", tmp_path / "e", cache=tmp_path / "e" / "cache")
    with pytest.raises(UserError, match=r"--out .*inner lies inside the data set .*out\. Give an --out beside it"):
        call("digits-lt", source / "out" / "deep" / "inner")  # where --force on the outer one would remove it
    places = own_folders(tmp_path / "mine")
    with pytest.raises(UserError, match=r"--labeled .* lies inside --out"):
        call("folder", tmp_path / "mine", resolution=8, **places)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=r"lies inside .*unlabeled, all of whose images"):
        call("folder", link / "unlabeled" / "deep" / "out", resolution=8, **places)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["labeled", "test", "unlabeled"]


class StopError(Exception):
    pass


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Path], Path]:
    """A build of own folders at 8 px that ended after three chunks of four images: (its places, its --out)."""
    places, out = own_folders(tmp_path / "raw"), tmp_path / "d"
    real, calls = filling.write_rows, []

    def write_rows(path: Path, start: int, block: np.ndarray) -> None:
        calls.append(start)
        if len(calls) > 3:
            raise StopError
        real(path, start, block)

    with monkeypatch.context() as patch:
        patch.setattr(filling, "CHUNK", 4)
        patch.setattr(filling, "write_rows", write_rows)
        with pytest.raises(StopError):
            call("folder", out, resolution=8, **places)
    return places, out


def test_an_unfinished_build_of_other_options_is_not_dropped_unsaid(
    tmp_path: Path, unfinished: tuple[dict[str, Path], Path]
) -> None:
    places, out = unfinished
    journal = (work_folder(out) / "journal").read_bytes()
    assert len([*read_records(work_folder(out) / "journal")]) == 3
    message = r"d\.building holds an unfinished build of another order: resolution is 8 there, 9 is asked for\. Go on "
    with pytest.raises(UserError, match=message + r"with it \(python .*--out .*d\), give another --out, or --force"):
        call("folder", out, resolution=9, **places)
    other = own_folders(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"labeled is .*raw/labeled there, .*other/labeled with other images is asked"):
        call("folder", out, resolution=8, **other)
    assert (work_folder(out) / "journal").read_bytes() == journal
    assert call("folder", out, resolution=8, **places) == []
    assert read_manifest(out).resolution == 8


def test_force_gives_an_unfinished_build_up_and_says_so(unfinished: tuple[dict[str, Path], Path]) -> None:
    places, out = unfinished
    said = call("folder", out, resolution=9, force=True, **places)
    assert said == [
        f"warning: gave up the unfinished build in {work_folder(out)}: resolution is 8 there, 9 is asked for."
    ]
    assert read_manifest(out).resolution == 9


def test_only_changed_images_are_read_again(
    tmp_path: Path, unfinished: tuple[dict[str, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    places, out = unfinished
    (places["labeled"] / "dog" / "0002.png").write_bytes(encoded(pixels(1, 12, seed=9)[0]))  # row 5, of chunk 1
    monkeypatch.setattr(filling, "CHUNK", 4)
    real, written = filling.write_rows, []
    monkeypatch.setattr(
        filling, "write_rows", lambda path, start, block: (written.append(start), real(path, start, block))
    )
    said = call("folder", out, resolution=8, **places)
    assert said == [
        f"note: the source has changed since the build in {work_folder(out)} began; what changed is read again."
    ]
    assert written == [4, 12, 16, 20, 24, 0, 4]  # of train, without chunks 0 and 2; of test
    fresh = tmp_path / "fresh"
    call("folder", fresh, resolution=8, **places)
    assert (out / "train.npy").read_bytes() == (fresh / "train.npy").read_bytes()


@pytest.mark.parametrize("key", ["options", "places", "source", "command"])
def test_a_damaged_note_of_an_unfinished_build_is_of_no_order(
    unfinished: tuple[dict[str, Path], Path], key: str
) -> None:
    places, out = unfinished
    note = work_folder(out) / "order"
    note.write_text(note.read_text().replace(f'"{key}":', '"kez":'))
    message = (
        r"d\.building holds an unfinished build of another order: dataset is None there, 'folder' is asked for\. Give"
    )
    with pytest.raises(UserError, match=message):
        call("folder", out, resolution=8, **places)
    assert not out.exists()


def test_a_folder_of_something_else_at_the_work_folders_place_stays(tmp_path: Path) -> None:
    out = tmp_path / "d"
    work_folder(out).mkdir()
    (work_folder(out) / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(
            UserError, match=r"d\.building is where the unfinished build would lie, and holds something"
        ):
            call("digits-lt", out, force=force)
    assert (work_folder(out) / "thesis.tex").exists()


def test_an_unfinished_replacement_outlives_a_look_at_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    call("digits-lt", out)

    def stop(*_: object) -> None:
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.folder.preview.write_preview", stop)
        with pytest.raises(StopError):
            call("digits-lt", out, n1=20, force=True)
    said = call("digits-lt", out)
    assert said == [
        f"{out} is there already.",
        f"note: {work_folder(out)} holds an unfinished build of other options; remove it if it is not needed.",
    ]
    assert (work_folder(out) / "journal").exists()
    call("digits-lt", out, n1=20, force=True)
    assert not work_folder(out).exists()


def test_what_the_system_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "raw"))

    monkeypatch.setattr("data_prep.work.builder.assemble", refuse)
    with pytest.raises(UserError, match=r"Cannot use .*raw \(Permission denied\)\. Mend that, or give another --out"):
        call("digits-lt", tmp_path / "d")


def test_every_option_that_differs_is_named(tmp_path: Path) -> None:
    out = tmp_path / "d"
    call("digits-lt", out)
    message = rf"{out} holds another data set: n1 is 30 there, 20 is asked for; disjoint is False there, True is asked"
    with pytest.raises(UserError, match=message + r" for\. Give another --out, or --force to replace it\."):
        call("digits-lt", out, n1=20, disjoint=True)


def test_copies_in_a_published_set_are_a_warning_with_disjoint(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "raw")
    shutil.copy(source / "train" / "cat" / "0000.png", source / "train" / "cat" / "0002.png")
    partial = call("cifar10-lt", tmp_path / "d", source=source, **SPLIT)
    assert [line.partition(":")[0] for line in partial] == ["note"], "of a small source, and nothing of copies"
    said = [
        line
        for line in call("cifar10-lt", tmp_path / "e", source=source, disjoint=True, **SPLIT)
        if line not in partial
    ]
    assert said[0].startswith("warning: 1 of 10 unlabeled images are copies of labeled ones, the same at 32 pixels (")
