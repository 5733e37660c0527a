"""CIFAR in each form in which people have it: all give the same images, labels and class order."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.sources import cifar
from tests.data_prep.archives import (
    cifar_binary,
    encoded,
    known_as,
    pixels,
    python2_pickle,
    python3_pickle,
    write_class_folders,
    write_tar,
)

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGES = pixels(60)
LABELS = np.arange(60) * 7 % 10
FORMS = ("binary archive", "python archive", "binary folder", "python folder", "archive in a folder", "class folders")


def batches(binary: bool) -> dict[str, bytes]:
    files = {}
    for number in range(6):
        rows = slice(10 * number, 10 * number + 10)
        name = "test_batch" if number == 5 else f"data_batch_{number + 1}"
        flat = IMAGES[rows].transpose(0, 3, 1, 2).reshape(10, -1)
        if binary:
            files[f"cifar-10-batches-bin/{name}.bin"] = cifar_binary(LABELS[rows], IMAGES[rows])
        else:
            batch = {"batch_label": name, "labels": LABELS[rows].tolist(), "data": flat}
            files[f"cifar-10-batches-py/{name}"] = (python2_pickle if number % 2 else python3_pickle)(batch)
    if binary:
        files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(NAMES).encode()
    else:
        files["cifar-10-batches-py/batches.meta"] = python2_pickle({"label_names": list(NAMES)})
    return files


def make(form: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if form == "class folders":
        for split, rows in (("train", range(50)), ("test", range(50, 60))):
            classes = {name: [IMAGES[i] for i in rows if LABELS[i] == k] for k, name in enumerate(NAMES)}
            write_class_folders(folder / "cifar10" / split, classes)
        (folder / "cifar10" / "README.txt").write_text("not an image")
        return folder
    files = batches("binary" in form or "in a folder" in form)
    if form.endswith("archive") or form == "archive in a folder":
        name = "cifar-10-python.tar.gz" if "python" in form else "cifar-10-binary.tar.gz"
        path = write_tar(folder / name, files)
        key = "python" if "python" in form else "binary"
        layout = cifar.LAYOUTS["cifar10"]
        monkeypatch.setitem(cifar.LAYOUTS, "cifar10", layout._replace(**{key: known_as(path, getattr(layout, key))}))
        return folder if form == "archive in a folder" else path
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cifar.open_cifar("cifar10", make(form, tmp_path, monkeypatch), tmp_path)
    assert source.class_names == NAMES
    for split, rows in (("train", np.arange(50)), ("test", np.arange(50, 60))):
        images = source.open_split(split)
        order = rows[np.argsort(LABELS[rows], kind="stable")] if form == "class folders" else rows
        assert np.array_equal(images.labels, LABELS[order])
        assert all(np.array_equal(images.image(i), IMAGES[row]) for i, row in enumerate(order))


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_official_batches_packed_anew(form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(f"{form} folder", tmp_path / "given", monkeypatch)
    path = Path(shutil.make_archive(str(tmp_path / "cifar"), kind, tmp_path / "given"))
    source = cifar.open_cifar("cifar10", path, tmp_path)
    assert source.description.startswith(f"{form} batches of cifar.{kind}")
    assert np.array_equal(source.open_split("train").labels, LABELS[:50])
    assert np.array_equal(source.open_split("test").image(3), IMAGES[53])


def test_batches_cut_at_a_record_are_a_partial_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "IMAGES", {"train": 50, "test": 10})
    assert cifar.open_cifar("cifar10", make("binary folder", tmp_path, monkeypatch), tmp_path).notes == ()
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[: 7 * 3073])
    source = cifar.open_cifar("cifar10", tmp_path, tmp_path)
    assert source.notes == ("a partial source: 47 of 50 training images, 10 of 10 test images",)
    assert source.description.endswith("; a partial source: 47 of 50 training images, 10 of 10 test images")


def test_part_of_the_class_folders_is_a_partial_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("class folders", tmp_path, monkeypatch)
    note = "a partial source: 50 of 50,000 training images, 10 of 10,000 test images"
    source = cifar.open_cifar("cifar10", path, tmp_path)
    assert source.notes == (note,)
    assert source.description == f"class folders of {path.name}; {note}"
    monkeypatch.setattr(cifar, "IMAGES", {"train": 50, "test": 10})
    whole = cifar.open_cifar("cifar10", path, tmp_path)
    assert (whole.notes, whole.description) == ((), f"class folders of {path.name}")


def test_a_truncated_pickle_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("python folder", tmp_path, monkeypatch) / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"data_batch_2 is damaged \(pickle data was truncated\)\. Download it again\."):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100_takes_the_fine_label(form: str, tmp_path: Path) -> None:
    names = [f"class_{k:03d}" for k in range(100)]
    labels = np.arange(30) * 37 % 100
    flat = IMAGES[:30].transpose(0, 3, 1, 2).reshape(30, -1)
    for name, rows in (("train", slice(0, 20)), ("test", slice(20, 30))):
        if form == "binary":
            (tmp_path / f"{name}.bin").write_bytes(cifar_binary(labels[rows], IMAGES[:30][rows], coarse=True))
        else:
            batch = {"coarse_labels": [0], "fine_labels": labels[rows].tolist(), "data": flat[rows]}
            (tmp_path / name).write_bytes(python2_pickle(batch))
    if form == "binary":
        (tmp_path / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    else:
        (tmp_path / "meta").write_bytes(python2_pickle({"fine_label_names": names}))
    source = cifar.open_cifar("cifar100", tmp_path, tmp_path)
    assert source.class_names == tuple(names)
    assert source.open_split("train").labels.tolist() == labels[:20].tolist()
    assert np.array_equal(source.open_split("test").image(3), IMAGES[23])


def test_a_wrong_checksum_is_said(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", batches(binary=True))
    with pytest.raises(UserError, match=r"has MD5 [0-9a-f]{32}; the official one is c32a1d4ab5d03f1284b67883e8d87530"):
        cifar.open_cifar("cifar10", path, tmp_path)


def test_missing_and_truncated_files_are_said(tmp_path: Path) -> None:
    for name, data in batches(binary=True).items():
        (tmp_path / Path(name).name).write_bytes(data)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(UserError, match=r"data_batch_3\.bin has 3,000 bytes, no multiple of 3,073"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"lacks data_batch_3\.bin"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)


def test_labels_out_of_range_are_said(tmp_path: Path) -> None:
    for name, data in batches(binary=True).items():
        (tmp_path / Path(name).name).write_bytes(data)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + b"\0" * 3072)
    with pytest.raises(UserError, match=r"test_batch\.bin has labels 10\.\.10 for 10 classes"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)


def test_a_malicious_batch_is_refused(tmp_path: Path) -> None:
    for name, data in batches(binary=False).items():
        (tmp_path / Path(name).name).write_bytes(data)
    (tmp_path / "data_batch_2").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"data_batch_2 is refused: its pickle asks for posix\.system"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)


def test_other_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No images in"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)
    write_class_folders(tmp_path / "train", {"cat": [IMAGES[0]], "dgo": [IMAGES[1]]})
    with pytest.raises(UserError, match=r"has no test/ of class folders. --source takes cifar-10-binary.tar.gz"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)
    write_class_folders(tmp_path / "test", {"cat": [IMAGES[0]]})
    with pytest.raises(UserError, match=r"Unknown class folder 'dgo'. Did you mean 'dog'\?"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)
    with pytest.raises(UserError, match="No such file or folder"):
        cifar.open_cifar("cifar10", tmp_path / "none", tmp_path)
    (tmp_path / "train" / "loose.png").write_bytes(encoded(IMAGES[0]))
    with pytest.raises(UserError, match=r"images outside of class folders \(train/loose\.png\)"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)


CIFAR100 = cifar.CIFAR100_NAMES


def hundred(root: Path) -> Path:
    """Class folders of CIFAR-100, one of whose classes is called "train": two training images and a test image each."""
    images = iter(pixels(300, 8))
    for split, count in (("train", 2), ("test", 1)):
        write_class_folders(root / split, {name: [next(images) for _ in range(count)] for name in CIFAR100})
    return root


@pytest.mark.parametrize("folder", ["", "data/cifar100"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_class_folders(folder: str, packed: bool, tmp_path: Path) -> None:
    root = tmp_path / "given"
    hundred(root / folder)
    source = cifar.open_cifar("cifar100", zipped(root) if packed else root, tmp_path)
    assert source.class_names == CIFAR100
    train, test = source.open_split("train"), source.open_split("test")
    assert train.labels.tolist() == [k for k in range(100) for _ in range(2)]
    assert test.labels.tolist() == [*range(100)]
    originals = pixels(300, 8)
    assert np.array_equal(train.image(2 * CIFAR100.index("train") + 1), originals[2 * CIFAR100.index("train") + 1])
    assert np.array_equal(test.image(CIFAR100.index("train")), originals[200 + CIFAR100.index("train")])


def zipped(root: Path) -> Path:
    return Path(shutil.make_archive(str(root), "zip", root))


def test_the_names_are_those_of_cifar100() -> None:
    assert (len(set(CIFAR100)), sorted(CIFAR100)) == (100, [*CIFAR100])
    # The published order of the fine labels: apple is 0, woman 98, worm 99; these are known places on the way.
    known = {0: "apple", 8: "bicycle", 39: "keyboard", 58: "pickup_truck", 85: "tank", 90: "train", 98: "woman"}
    assert {k: CIFAR100[k] for k in known} == known


@pytest.mark.parametrize(
    ("which", "names", "stranger"), [("cifar100", NAMES, "airplane"), ("cifar10", CIFAR100, "apple")]
)
def test_class_folders_of_the_other_set_are_refused(
    which: str, names: tuple[str, ...], stranger: str, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        write_class_folders(tmp_path / split, {name: [IMAGES[0]] for name in names})
    with pytest.raises(UserError, match=f"Unknown class folder '{stranger}'"):
        cifar.open_cifar(which, tmp_path, tmp_path)


def test_a_pair_of_one_parent_is_taken_before_what_only_has_the_name(tmp_path: Path) -> None:
    hundred(tmp_path / "a" / "b")
    write_class_folders(tmp_path / "test", {"note": [IMAGES[0]]})  # higher, but without a train/ beside it
    assert len(cifar.open_cifar("cifar100", tmp_path, tmp_path).open_split("test")) == 100


def test_a_meta_file_that_names_other_classes_is_said(tmp_path: Path) -> None:
    for name, data in batches(binary=True).items():
        (tmp_path / Path(name).name).write_bytes(data)
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"batches\.meta\.txt does not name 10 classes"):
        cifar.open_cifar("cifar10", tmp_path, tmp_path)
