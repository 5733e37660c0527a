"""STL-10 and SVHN in their official layouts."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep import build
from data_prep.errors import UserError
from data_prep.folder.manifest import read_manifest
from data_prep.sources import stl10, svhn
from data_prep.sources.downloads import Archive
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import known_as, pixels, write_class_folders, write_tar

STL_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
TRAIN, TEST, MORE = pixels(60, 96), pixels(20, 96, seed=1), pixels(150, 96, seed=2)
LABELS = np.arange(60) * 7 % 10


def stl_planes(images: np.ndarray) -> bytes:
    """As MATLAB writes them: a plane a color, column by column."""
    return images.transpose(0, 3, 2, 1).tobytes()


def stl_files() -> dict[str, bytes]:
    return {
        "stl10_binary/train_X.bin": stl_planes(TRAIN),
        "stl10_binary/train_y.bin": (LABELS + 1).astype(np.uint8).tobytes(),
        "stl10_binary/test_X.bin": stl_planes(TEST),
        "stl10_binary/test_y.bin": (np.arange(20) % 10 + 1).astype(np.uint8).tobytes(),
        "stl10_binary/unlabeled_X.bin": stl_planes(MORE),
        "stl10_binary/class_names.txt": "\n".join(STL_NAMES).encode(),
        "stl10_binary/fold_indices.txt": b"0 1 2\n",
        "../escape.bin": b"never written",
    }


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_tar(tmp_path / "stl10_binary.tar.gz", stl_files())
    monkeypatch.setattr(stl10, "ARCHIVE", known_as(path, stl10.ARCHIVE))
    return path


def test_stl10_build(archive: Path, tmp_path: Path) -> None:
    out = build_dataset(
        "stl10-lt", tmp_path / "d", source=archive, cache=tmp_path / "cache", n1=4, gamma_l="4", progress=False
    )
    manifest = read_manifest(out)
    assert manifest.class_names == list(STL_NAMES)
    assert manifest.labeled_counts == [4, 3, 2, 2, 2, 1, 1, 1, 1, 1]
    assert manifest.unlabeled_counts is None
    train, labels = np.load(out / "train.npy"), np.load(out / "train_labels.npy")
    assert train.shape == (18 + 150, 32, 32, 3)
    assert np.load(out / "unlabeled_rows.npy").tolist() == [*range(168)]
    assert labels[18:].tolist() == [-1] * 150
    rows = np.sort(np.concatenate([np.flatnonzero(k == LABELS)[:n] for k, n in enumerate(manifest.labeled_counts)]))
    assert labels[:18].tolist() == LABELS[rows].tolist()
    for stored, original in (
        (train[5], TRAIN[rows[5]]),
        (train[18 + 77], MORE[77]),
        (np.load(out / "test.npy")[3], TEST[3]),
    ):
        assert np.array_equal(stored, Image.fromarray(original).resize((32, 32), Image.Resampling.BILINEAR))
    assert not (tmp_path / "escape.bin").exists()
    assert not (tmp_path / "cache" / "escape.bin").exists()


def test_stl10_disjoint_and_unpacked(archive: Path, tmp_path: Path) -> None:
    folder = stl10.unpack(archive, stl10.FILES, tmp_path / "unpacked")
    out = build_dataset("stl10-lt", tmp_path / "d", source=folder, n1=2, resolution=96, disjoint=True, progress=False)
    assert np.load(out / "labeled_rows.npy").tolist() == [*range(len(np.load(out / "labeled_rows.npy")))]
    assert len(np.load(out / "unlabeled_rows.npy")) == 150
    assert np.array_equal(np.load(out / "train.npy")[-1], MORE[-1])


def test_stl10_mistakes(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stl10-lt takes no --m1: its own unlabeled images are all taken"):
        build_dataset("stl10-lt", tmp_path / "d", m1=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"No images in .*empty"):
        stl10.open_stl10(tmp_path / "empty", tmp_path)
    folder = stl10.unpack(archive, stl10.FILES, tmp_path / "unpacked")
    (folder / "train_X.bin").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=r"train_X\.bin has 1,000 bytes, no multiple of 27,648: truncated"):
        stl10.open_stl10(folder, tmp_path).open_split("train")
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match="has MD5"):
        stl10.open_stl10(archive, tmp_path)


def test_stl10_cut_at_a_record_is_a_partial_source(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stl10, "IMAGES", {"train": 60, "test": 20, "unlabeled": 150})
    folder = stl10.unpack(archive, stl10.FILES, tmp_path / "unpacked")
    assert stl10.open_stl10(folder, tmp_path).notes == ()
    (folder / "unlabeled_X.bin").write_bytes(stl_planes(MORE[:100]))
    said: list[str] = []
    out = build_dataset("stl10-lt", tmp_path / "d", source=folder, n1=2, progress=False, say=said.append)
    note = "a partial source: 60 of 60 training images, 20 of 20 test images, 100 of 150 unlabeled images"
    assert said[0] == f"note: {note}"
    assert read_manifest(out).source == f"official STL-10 binary archive; {note}"


@pytest.mark.parametrize("packed", [False, True])
def test_stl10_of_class_folders(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "stl10"
    for split, images in (("train", TRAIN[:20]), ("test", TEST)):
        write_class_folders(root / split, {name: list(images[k::10]) for k, name in enumerate(STL_NAMES)})
    source = Path(shutil.make_archive(str(root), "zip", tmp_path, root.name)) if packed else root
    with pytest.raises(UserError, match=r"has no unlabeled/ of class folders\. --source takes stl10_binary"):
        stl10.open_stl10(source, tmp_path)
    write_class_folders(root, {"unlabeled": list(MORE[:5])})
    source = Path(shutil.make_archive(str(root), "zip", tmp_path, root.name)) if packed else root
    said: list[str] = []
    options = {"n1": 2, "gamma_l": "2", "resolution": 96, "progress": False, "say": said.append}
    out = build_dataset("stl10-lt", tmp_path / "d", source=source, **options)
    lacks = "20 of 5,000 training images, 20 of 8,000 test images, 5 of 100,000 unlabeled images"
    assert said[0] == f"note: a partial source: {lacks}"
    assert read_manifest(out).source == f"class folders of {source.name}; a partial source: {lacks}"
    assert np.array_equal(np.load(out / "train.npy")[-5:], MORE[:5])
    assert np.array_equal(np.load(out / "test.npy")[2:4], TEST[1::10])
    assert np.load(out / "train_labels.npy")[[0, 1, 2, -1]].tolist() == [0, 0, 1, -1]


def mat(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels.reshape(-1, 1).astype(np.uint8)})
    return path


@pytest.fixture
def house_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """The two .mat files; returns the training images and their labels 1..10."""
    images, labels = pixels(200), np.arange(200) % 10 + 1
    paths = {
        "train": mat(tmp_path / "train_32x32.mat", images, labels),
        "test": mat(tmp_path / "test_32x32.mat", pixels(30, seed=1), np.arange(30) % 10 + 1),
    }
    known: dict[str, Archive] = {split: known_as(path, svhn.FILES[split]) for split, path in paths.items()}
    monkeypatch.setattr(svhn, "FILES", known)
    return images, labels


def test_svhn_build(house_numbers: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    images, labels = house_numbers
    out = build_dataset("svhn-lt", tmp_path / "d", source=tmp_path, n1=5, m1=10, gamma_l="5", progress=False)
    manifest = read_manifest(out)
    assert manifest.class_names == [*"0123456789"]
    assert manifest.test_counts == [3] * 10
    got, classes = np.load(out / "train.npy"), np.load(out / "train_labels.npy")
    first_zero = np.flatnonzero(labels == 10)[0]  # label 10 is digit 0
    assert np.array_equal(got[np.flatnonzero(classes == 0)[0]], images[first_zero])
    assert np.array_equal(got[np.flatnonzero(classes == 1)[2]], images[np.flatnonzero(labels == 1)[2]])


def test_svhn_mistakes(house_numbers: object, tmp_path: Path) -> None:
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(UserError, match=r"lacks test_32x32\.mat\. Download http"):
        svhn.open_svhn(tmp_path, tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(b"not MATLAB")
    with pytest.raises(UserError, match=r"test_32x32\.mat is no readable \.mat file"):
        svhn.open_svhn(tmp_path, tmp_path)


def test_svhn_packed_anew_is_read_and_told_of(
    house_numbers: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svhn, "IMAGES", {"train": 200, "test": 30})
    assert svhn.open_svhn(tmp_path, tmp_path).notes == ()
    images, labels = house_numbers
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": labels.reshape(-1, 1)}, do_compression=True)
    source = svhn.open_svhn(path, tmp_path)
    assert source.notes == ("train_32x32.mat of another MD5 than the official: packed anew, or changed",)
    assert source.description.startswith("SVHN cropped digits; train_32x32.mat of another MD5")
    assert np.array_equal(source.open_split("train").image(7), images[7])
    damaged = bytearray(path.read_bytes())
    damaged[5000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"train_32x32\.mat is no readable \.mat file"):
        svhn.open_svhn(tmp_path, tmp_path)
    mat(path, images[:150], labels[:150])
    notes = svhn.open_svhn(tmp_path, tmp_path).notes
    assert notes[0] == "a partial source: 150 of 200 training images, 30 of 30 test images"


def test_svhn_of_class_folders(tmp_path: Path) -> None:
    images = pixels(40)
    for split, rows in (("train", images[:30]), ("test", images[30:])):
        write_class_folders(tmp_path / split, {str(k): list(rows[k::10]) for k in range(10)})
    source = svhn.open_svhn(Path(shutil.make_archive(str(tmp_path / "digits"), "zip", tmp_path)), tmp_path)
    assert source.open_split("train").labels.tolist() == [k for k in range(10) for _ in range(3)]
    assert np.array_equal(source.open_split("test").image(3), images[33])
    note = "a partial source: 30 of 73,257 training images, 10 of 26,032 test images"
    assert (source.notes, source.description) == ((note,), f"class folders of digits.zip; {note}")
    with pytest.raises(UserError, match=r"No such file or folder: .*none\. --source takes the folder with train_32x32"):
        svhn.open_svhn(tmp_path / "none", tmp_path)


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(("which", "name"), [("svhn-lt", "test_32x32.mat"), ("stl10-lt", "train_X.bin")])
def test_official_files_inside_an_archive_are_to_be_unpacked(which: str, name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "given" / "raw").mkdir(parents=True)
    for packed in (name, "class_names.txt"):
        (tmp_path / "given" / "raw" / packed).write_bytes(b"official")
    path = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "given")
    message = rf"{name} is read from a folder, and .*packed\.{kind} packs it: unpack it, and give --source that folder"
    with pytest.raises(UserError, match=message):
        build_dataset(which, tmp_path / "d", source=path, progress=False)


@pytest.mark.parametrize("wrong", [0, 11, 2.5, np.nan])
def test_svhn_labels_are_one_to_ten(
    wrong: float, house_numbers: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = house_numbers
    changed = labels.astype(float)
    changed[7] = wrong
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": changed.reshape(-1, 1)})
    monkeypatch.setitem(svhn.FILES, "train", known_as(path, svhn.FILES["train"]))
    with pytest.raises(UserError, match=r"train_32x32\.mat has labels .*, not 1\.\.10\. Take the official file"):
        svhn.open_svhn(tmp_path, tmp_path)


def test_stl10_at_another_size_from_the_command_line(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--n1", "2", "--res", "96", "--source", str(archive), "--cache", "cache"]
    monkeypatch.setattr(sys, "argv", ["build.py", "stl10-lt", *arguments])
    assert build.main() == 0
    assert capsys.readouterr().out == "data/stl10-lt-n2-l10-96px\n"
    assert np.array_equal(np.load(tmp_path / "data/stl10-lt-n2-l10-96px/train.npy")[-1], MORE[-1])
