"""The user's own folders: nothing in them vanishes without a word, and no test image is trained on unsaid."""

import json
import os
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.folder.manifest import read_manifest
from data_prep.folder.show import show_folder
from data_prep.sources import class_folders, containers
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import encoded, pixels, write_class_folders, write_tar

Places = dict[str, Path]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """labeled/ and test/ of two classes with three images each, and six unlabeled ones."""
    images = iter(pixels(18, 12))
    for split in ("labeled", "test"):
        write_class_folders(tmp_path / split, {name: [next(images) for _ in range(3)] for name in ("cat", "dog")})
    write_class_folders(tmp_path, {"unlabeled": [next(images) for _ in range(6)]})
    return {key: tmp_path / key for key in ("labeled", "unlabeled", "test")}


def build(places: Places, **options: object) -> tuple[Path, list[str]]:
    """The folder, and what was said."""
    said: list[str] = []
    out = places["labeled"].parent / "out"
    build_dataset("folder", out, **places, resolution=8, progress=False, say=said.append, **options)  # type: ignore[arg-type]
    return out, said


def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (containers, class_folders):
        monkeypatch.setattr(module, "SUFFIXES", module.SUFFIXES - {".heic", ".heif"})


def test_files_that_are_not_read_are_counted_by_their_endings(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    without_heif(monkeypatch)
    for number, ending in enumerate(("HEIC", "heic", "avif", "jp2", "cr2")):
        (places["unlabeled"] / f"{number}.{ending}").write_bytes(b"photograph")
    (places["labeled"] / "cat" / "notes").write_bytes(b"text")
    (places["labeled"] / "cat" / ".hidden.heic").write_bytes(b"side file")
    _, said = build(places)
    assert said == [
        "note: 6 files of other kinds are not read: 2 .heic, 1 without ending, 1 .avif, 1 .jp2, 1 .cr2 "
        "(pip install -e '.[heif]' makes .heic readable)"
    ]


@pytest.mark.parametrize("split", ["labeled", "test"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_class_without_a_readable_image_is_named(
    places: Places, split: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_heif(monkeypatch)
    (places[split] / "bird").mkdir()
    (places[split] / "fox").mkdir()
    (places[split] / "fox" / "0.heic").write_bytes(b"photograph")
    if packed:
        places[split] = Path(shutil.make_archive(str(places[split]), "zip", places[split]))
    with pytest.raises(UserError, match=rf"{split}.*/bird holds no image that is read \(found nothing\), and 1 more"):
        build(places)
    shutil.rmtree(places["labeled"].parent / split / "bird")
    if packed:
        places[split] = Path(
            shutil.make_archive(str(places[split].with_suffix("")), "tar", places[split].with_suffix(""))
        )
    with pytest.raises(UserError, match=rf"{split}.*/fox holds no image that is read \(found 1 \.heic .*heif"):
        build(places)


def test_all_of_jpegs_endings_are_read(places: Places) -> None:
    for number, ending in enumerate(("jfif", "JPE")):
        (places["unlabeled"] / f"{number}.{ending}").write_bytes(encoded(pixels(2, 12, seed=3)[number], "JPEG"))
    out, said = build(places)
    assert (len(np.load(out / "unlabeled_rows.npy")), said) == (6 + 6 + 2, [])


def test_heic_is_read_where_pillow_heif_is_installed(places: Places) -> None:
    pytest.importorskip("pillow_heif")
    plain = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    (places["unlabeled"] / "z.heic").write_bytes(encoded(plain, "HEIF", quality=100))
    out, said = build(places)
    assert said == []
    assert np.abs(np.load(out / "train.npy")[-1].astype(int) - plain[0, 0]).max() < 8


def leak(places: Places, how: str) -> None:
    """One labeled and one unlabeled image among the test images."""
    for number, original in enumerate((places["labeled"] / "cat" / "0001.png", places["unlabeled"] / "0002.png")):
        target = places["test"] / "dog" / f"leak{number}.png"
        if how == "copy":
            shutil.copy(original, target)
        elif how == "hard link":
            os.link(original, target)
        elif how == "link":
            target.symlink_to(original)
        else:
            with Image.open(original) as image:
                image.save(target.with_suffix(".bmp"))


@pytest.mark.parametrize("how", ["copy", "hard link", "link", "another file of the same pixels"])
def test_test_images_that_are_training_images_are_said(
    places: Places, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    leak(places, how)
    message = (
        r"2 of 8 test images are also training images, 1 of them labeled \(\S*test/dog/leak0\.(png|bmp) is "
        r"\S*labeled/cat/0001\.png, \S*leak1\.\w+ is \S*unlabeled/0002\.png\)\. Take .*--allow-overlap"
    )
    with pytest.raises(UserError, match=message):
        build(places)
    out, said = build(places, allow_overlap=True)
    assert said[0].startswith("warning: 2 of 8 test images are also training images")
    manifest = read_manifest(out)
    assert manifest.split["test_overlap"] == 2
    assert "--allow-overlap" in manifest.command
    with pytest.raises(UserError, match=r"out was built with --allow-overlap: 2 of its test images .* Add --allow"):
        build(places)
    assert build(places, allow_overlap=True)[1] == [f"{out} is there already."]
    show_folder(out)
    assert "2 test images are training images too" in capsys.readouterr().out


def test_without_a_leak_nothing_is_said(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    out, said = build(places)
    assert said == []
    assert "test_overlap" not in read_manifest(out).split
    show_folder(out)
    assert "overlap" not in capsys.readouterr().out


@pytest.mark.parametrize("how", ["hard link", "link"])
def test_a_file_of_two_names_counts_once(places: Places, how: str) -> None:
    make = os.link if how == "hard link" else os.symlink
    make(places["labeled"] / "cat" / "0000.png", places["unlabeled"] / "labeled.png")
    make(places["unlabeled"] / "0000.png", places["unlabeled"] / "again.png")
    out, _ = build(places)
    assert len(np.load(out / "train.npy")) == 6 + 6


@pytest.mark.parametrize("how", ["hard link", "link"])
def test_a_labeled_file_of_two_names_counts_once(places: Places, how: str) -> None:
    make = os.link if how == "hard link" else os.symlink
    make(places["labeled"] / "cat" / "0000.png", places["labeled"] / "cat" / "again.png")
    out, said = build(places)
    assert len(np.load(out / "labeled_rows.npy")) == 6
    cat = places["labeled"] / "cat"
    assert said == [
        "note: 1 labeled images are links to other labeled ones and count once "
        f"({cat / 'again.png'} is {cat / '0000.png'})"
    ]


@pytest.mark.parametrize("how", ["hard link", "link"])
def test_a_labeled_file_in_two_classes_is_an_error(places: Places, how: str) -> None:
    make = os.link if how == "hard link" else os.symlink
    make(places["labeled"] / "cat" / "0000.png", places["labeled"] / "dog" / "again.png")
    with pytest.raises(
        UserError, match=r"labeled/cat/0000\.png and \S*labeled/dog/again\.png are links to one file, .* Remove one"
    ):
        build(places)


@pytest.mark.parametrize("disjoint", [False, True])
def test_unlabeled_images_that_are_all_unreadable_are_an_error(places: Places, disjoint: bool) -> None:
    for path in places["unlabeled"].iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(
        UserError,
        match=r"of the 6 images in --unlabeled \S*unlabeled that are .* none can be read, .* Mend them, or give others",
    ):
        build(places, on_bad_image="skip", disjoint=disjoint)
    assert not (places["labeled"].parent / "out").exists()


@pytest.mark.parametrize("how", ["copy", "another file of the same pixels"])
def test_disjoint_finds_copies(places: Places, how: str) -> None:
    original, copy = places["labeled"] / "dog" / "0002.png", places["unlabeled"] / "copy.png"
    if how == "copy":
        shutil.copy(original, copy)
    else:
        with Image.open(original) as image:
            image.save(copy := copy.with_suffix(".bmp"))
    with pytest.raises(UserError) as caught:
        build(places, disjoint=True)
    listed = places["labeled"].parent / "out.building" / "labeled_copies.json"
    assert str(caught.value) == (
        f"1 of 7 unlabeled images are copies of labeled ones, the same at 8 pixels ({copy} is {original}), in spite of "
        f"--disjoint; all are in {listed}. Take them out of --unlabeled, or leave out --disjoint."
    )
    assert json.loads(listed.read_text()) == [{"unlabeled": str(copy), "labeled": str(original)}]
    copy.unlink()
    out, _ = build(places, disjoint=True)
    assert len(np.load(out / "unlabeled_rows.npy")) == 6
    assert not listed.parent.exists()
    shutil.copy(original, copy)
    assert build(places, force=True)[1] == []


def test_disjoint_with_nothing_left_is_an_error(places: Places) -> None:
    places["unlabeled"] = places["labeled"]
    with pytest.raises(UserError, match="No unlabeled image is left: --disjoint keeps the labeled ones out"):
        build(places, disjoint=True)


def test_class_names_that_look_alike_are_one(places: Places) -> None:
    for split, form in (("labeled", "NFC"), ("test", "NFD")):
        (places[split] / "cat").rename(places[split] / unicodedata.normalize(form, "Grünfink"))
    out, _ = build(places)
    assert read_manifest(out).class_names == ["Grünfink", "dog"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_one_folder_is_entered(places: Places, kind: str) -> None:
    out, _ = build(places)
    plain = [(out / name).read_bytes() for name in ("train.npy", "train_labels.npy", "test_labels.npy")]
    for split in ("labeled", "test"):
        (places[split] / "README.txt").write_text("not an image")
        places[split] = Path(shutil.make_archive(f"{places[split]}", kind, places[split].parent, split))
    out, _ = build(places, force=True)
    assert plain == [(out / name).read_bytes() for name in ("train.npy", "train_labels.npy", "test_labels.npy")]


def test_a_cut_zip_is_called_so(places: Places) -> None:
    path = Path(shutil.make_archive(str(places["labeled"]), "zip", places["labeled"]))
    whole = path.read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"labeled\.zip is a damaged archive \(it is cut off: a zip ends with"):
            build({**places, "labeled": path})


def test_rotated_photographs_are_counted(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    for number, orientation in enumerate((1, 3, 6, 8, 77)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(pixels(5, 12, seed=4)[number], "JPEG", exif=exif.tobytes())
        (places["unlabeled"] / f"{number}.jpg").write_bytes(data)
    (places["unlabeled"] / "5.jpg").write_bytes(b"damaged")  # so that rows are chosen twice, and images copied over
    out, _ = build(places, on_bad_image="skip", exif="stored")
    assert read_manifest(out).split["exif_rotated"] == {"train": 3}
    show_folder(out)
    assert "3 train images, stored as they are" in capsys.readouterr().out


def tiny_imagenet(root: Path) -> None:
    """The layout of tiny-imagenet-200.zip: two of its classes."""
    wnids, images = ("n01443537", "n01484850"), pixels(10, 16)
    for k, wnid in enumerate(wnids):
        write_class_folders(root / "train" / wnid, {"images": list(images[3 * k : 3 * k + 3])}, ".JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("x\t0\t0\t63\t63\n")
    write_class_folders(root / "val", {"images": list(images[6:8])}, ".JPEG")
    write_class_folders(root / "test", {"images": list(images[8:])}, ".JPEG")
    lines = [f"000{i}.JPEG\t{wnids[1 - i]}\t0\t32\t44\t62" for i in range(2)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines))
    (root / "wnids.txt").write_text("\n".join(wnids))


@pytest.mark.parametrize("packed", [False, True])
def test_tiny_imagenet_as_it_is_published(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "tiny-imagenet-200"
    tiny_imagenet(root)
    source = Path(shutil.make_archive(str(root), "zip", tmp_path, root.name)) if packed else root
    base = source / root.name if packed else root
    places = {"labeled": base / "train", "unlabeled": base / "test" / "images", "test": base / "val"}
    out = build_dataset("folder", tmp_path / "own", **places, resolution=8, progress=False, say=str)
    assert read_manifest(out).class_names == ["n01443537", "n01484850"]
    assert np.load(out / "test_labels.npy").tolist() == [0, 1]
    expected = [Image.fromarray(image).resize((8, 8), Image.Resampling.BOX) for image in pixels(10, 16)]
    assert np.array_equal(np.load(out / "test.npy"), np.stack([expected[7], expected[6]]))
    said: list[str] = []
    out = build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, progress=False, say=said.append)
    assert read_manifest(out).test_counts == [1, 1]
    assert read_manifest(out).class_names == ["soft-finned fish", "shark"]
    assert np.array_equal(np.load(out / "test.npy"), np.stack(expected[6:8]))
    assert np.load(out / "test_labels.npy").tolist() == [1, 0]
    assert "note: 2 files of other kinds are not read: 2 .txt" in said


def test_an_image_without_an_annotation_is_named(tmp_path: Path) -> None:
    tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text("0000.JPEG\tn01443537\t0\t0\t1\t1\n")
    places = {"labeled": tmp_path / "train", "unlabeled": tmp_path / "test", "test": tmp_path / "val"}
    with pytest.raises(UserError, match=r"val has images outside of class folders \(images/0001\.JPEG\)"):
        build_dataset("folder", tmp_path / "own", **places, resolution=8, progress=False, say=str)


def test_links_in_a_tar_are_named_each(places: Places) -> None:
    """They are no file of the tar, so none is the same as another."""
    path = write_tar(places["unlabeled"].with_suffix(".tar"), {"a.png": encoded(pixels(1, 12, seed=8)[0])}, "w")
    with tarfile.open(path, "a") as archive:
        for name in ("b.png", "c.png"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "a.png"
            archive.addfile(link)
    with pytest.raises(UserError, match=r"2 images cannot be used: .*a link inside a tar"):
        build({**places, "unlabeled": path})


def test_a_zip_inside_of_which_names_climb_out_is_not_entered(places: Places) -> None:
    path = places["unlabeled"].with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("/x/a.png", "y/b.png"):
            archive.writestr(name, encoded(pixels(1, 12, seed=8)[0]))
    with pytest.raises(UserError, match=r"1 images cannot be used: .*its name leaves the archive's folder"):
        build({**places, "unlabeled": path})
