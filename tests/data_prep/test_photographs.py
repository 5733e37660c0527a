"""Photographs of one's own: cropped or padded as Pillow does, upright, with test images held out, listed in a CSV."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.errors import UserError
from data_prep.folder.manifest import parse_manifest, read_manifest, write_manifest
from data_prep.folder.show import show_folder
from data_prep.folder.verify import verify_folder
from data_prep.recipes.whole import hold_out
from data_prep.sources.imagenet127 import read_table
from data_prep.sources.resize import FILTERS, Preparation, UnreadableError, decode, fitted, upright
from data_prep.work import filling
from data_prep.work.builder import build_dataset
from data_prep.work.journal import Journal
from pipelines.reading import find_images, read_facts
from tests.data_prep.archives import encoded, pixels, write_class_folders

ARRAYS = ("train.npy", "test.npy", "train_labels.npy", "test_labels.npy", "labeled_rows.npy", "unlabeled_rows.npy")
SIZES = [(40, 24), (24, 40), (33, 32), (31, 64), (16, 16), (7, 90), (90, 7), (5, 3), (300, 1), (1, 300)]
ORIENTATION = 0x0112


def by_pillow(image: Image.Image, side: int, name: str, fit: str, color: tuple[int, ...] = (0, 0, 0)) -> np.ndarray:
    """What Pillow makes of an upright RGB image, through whole calls of its own."""
    resample = Image.Resampling[name.upper()]
    if fit == "squash":
        return np.asarray(image.resize((side, side), resample))
    if fit == "pad":
        if min(image.size) / max(image.size) * side <= 0.5:  # of which ImageOps.pad makes an image without pixels
            size = (side, 1) if image.width > image.height else (1, side)
            canvas, place = Image.new("RGB", (side, side), color), [round((side - n) * 0.5) for n in size]
            canvas.paste(image.resize(size, resample), (place[0], place[1]))
            return np.asarray(canvas)
        return np.asarray(ImageOps.pad(image, (side, side), resample, color=color))
    width, height = image.size
    width, height = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = round((width - side) / 2.0), round((height - side) / 2.0)
    return np.asarray(image.resize((width, height), resample).crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_every_fit_and_filter_is_pillows_to_the_bit(fit: str, name: str) -> None:
    for width, height in SIZES:
        image = Image.fromarray(pixels(1, 300)[0][:height, :width])
        for side in (8, 15, 32):
            rule = Preparation(side, name, fit, color=(9, 200, 31))
            assert np.array_equal(fitted(image, rule), by_pillow(image, side, name, fit, (9, 200, 31)))


def test_an_image_too_long_to_crop_is_named() -> None:
    with pytest.raises(UnreadableError, match="too long to crop: 1 x 20000 pixels"):
        fitted(Image.new("RGB", (1, 20000)), Preparation(1024, fit="crop"))


def oriented(orientation: int, kind: str) -> bytes:
    """An image that EXIF asks to turn; all are different."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = pixels(9, 24, seed=4)[orientation][:, :15]
    if kind == "deep":
        return encoded(Image.fromarray(image[..., 0].astype(np.uint16) << 8), "PNG", exif=exif.tobytes())
    return encoded(image, kind, exif=exif.tobytes())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "deep"])
def test_every_orientation_is_applied_as_pillow_does(kind: str, tmp_path: Path) -> None:
    for orientation in range(1, 9):
        data = oriented(orientation, kind)
        (tmp_path / "image").write_bytes(data)
        with Image.open(tmp_path / "image") as image:
            seen = ImageOps.exif_transpose(image)
            expected = (np.asarray(seen) >> 8)[..., None].repeat(3, 2) if kind == "deep" else seen.convert("RGB")
        assert np.array_equal(upright(decode(data), Preparation(8, exif="apply")), expected)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """labeled/ of cat (10 images), dog (5), owl (2) and fox (1), and unlabeled/ of 12: of all shapes."""
    noise = pixels(30, 60)
    images = iter([image[: 12 + 2 * i, : 60 - i] for i, image in enumerate(noise)])
    counts = {"cat": 10, "dog": 5, "fox": 1, "owl": 2}
    write_class_folders(tmp_path / "labeled", {k: [next(images) for _ in range(n)] for k, n in counts.items()})
    write_class_folders(tmp_path, {"unlabeled": [next(images) for _ in range(12)]})
    return {key: tmp_path / key for key in ("labeled", "unlabeled")}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """preview.png takes longer than all the rest."""
    monkeypatch.setattr("data_prep.folder.preview.write_preview", lambda *_: None)


def build(places: dict[str, Path], out: str = "out", **options: object) -> tuple[Path, list[str]]:
    """The folder, and what was said."""
    said: list[str] = []
    folder = next(iter(places.values())).parent / out
    wanted = {"resolution": 8, "test_fraction": 0.2, **places, **options}
    build_dataset("folder", folder, progress=False, workers=1, say=said.append, command="build", **wanted)  # type: ignore[arg-type]
    return folder, said


HELD_OUT = "note: 4 of 18 labeled images are held out for testing (cat 2, dog 1, fox 0, owl 1)"
UNTESTED = (
    "warning: no test image of class fox: a class of one labeled image, copies not counted, is trained and not tested"
)


def whose(folder: Path, places: dict[str, Path], part: str, fit: str = "squash") -> list[str]:
    """The names of the files whose pixels the rows of a part are."""
    names, root = {}, places["labeled"].parent
    for path in sorted(p for place in places.values() for p in place.rglob("*.png")):
        with Image.open(path) as image:
            names[by_pillow(image, 8, "box", fit).tobytes()] = path.relative_to(root).as_posix()
    return [names[image.tobytes()] for image in np.load(folder / f"{part}.npy")]


def test_the_hold_out_is_of_each_class_and_not_trained_on(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, said = build(places)
    assert said == [HELD_OUT, UNTESTED]
    manifest = read_manifest(folder)
    assert (manifest.labeled_counts, manifest.test_counts) == ([8, 4, 1, 1], [2, 1, 0, 1])
    assert (manifest.split["test_fraction"], manifest.split["seed"]) == (0.2, 0)
    train, test = whose(folder, places, "train"), whose(folder, places, "test")
    assert len(train) == len(set(train)) == 14 + 12
    assert sorted(train + test) == sorted({*train, *test})
    labels = np.load(folder / "test_labels.npy")
    assert [f"labeled/{manifest.class_names[k]}" for k in labels] == [name.rpartition("/")[0] for name in test]
    other, _ = build(places, "other", seed=1)
    assert whose(other, places, "test") != test
    show_folder(folder)
    assert "test_fraction 0.2, seed 0, fit squash, filter box, exif apply" in " ".join(capsys.readouterr().out.split())
    for options, message in (
        ({"seed": 1}, "seed is 0 there, 1 is asked for"),
        ({"test_fraction": 0.3}, "test_fraction is 0.2 there, 0.3 is asked for"),
        ({"fit": "crop", "exif": "stored"}, "fit is 'squash' there, 'crop' .*; exif is 'apply' there, 'stored' is"),
        ({"filter_name": "lanczos"}, "filter is 'box' there, 'lanczos' is asked for"),
    ):
        with pytest.raises(UserError, match=f"out holds another data set: {message}"):
            build(places, **options)
    assert build(places)[1] == [f"{folder} is there already."]


def test_an_unreadable_image_changes_little_of_the_hold_out(places: dict[str, Path]) -> None:
    folder, _ = build(places)
    tested = whose(folder, places, "test")
    broken = next(name for name in tested if "cat" in name)
    (places["labeled"].parent / broken).write_bytes(b"broken")
    folder, _ = build(places, "again", on_bad_image="skip")
    again, before = (np.load(path / "test.npy") for path in (folder, places["labeled"].parent / "out"))
    assert len({image.tobytes() for image in again} & {image.tobytes() for image in before}) == len(before) - 1
    assert read_manifest(folder).test_counts == [2, 1, 0, 1]


def test_the_share_is_rounded_half_up_and_drawn_by_the_seed() -> None:
    labels = np.repeat([0, 1, 2, 3], [10, 5, 2, 1])
    for seed in range(20):
        drawn = hold_out(labels, labels, ("a", "b", "c", "d"), {"test": 0.25}, seed)["test"]
        assert np.bincount(labels[drawn], minlength=4).tolist() == [3, 1, 1, 0]
        assert np.array_equal(drawn, np.unique(drawn))
    draws = [hold_out(labels, labels, ("a", "b", "c", "d"), {"test": 0.25}, seed)["test"] for seed in range(200)]
    assert np.bincount(np.concatenate(draws), minlength=18)[:10].min() > 30  # of 200, 60 are expected


def test_mistakes_of_the_hold_out_are_said(places: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"0\.9 leaves class 'dog' without labels: it would hold out 5 of its 5"):
        build(places, test_fraction=0.9)
    for path in [*places["labeled"].glob("*/000[1-9].png")]:
        path.unlink()
    with pytest.raises(UserError, match="no class has a labeled image to spare"):
        build(places)


def test_copies_of_held_out_images_are_not_trained_on(places: dict[str, Path]) -> None:
    folder, _ = build(places)
    cat, owl = (next(name for name in whose(folder, places, "test") if k in name) for k in ("cat", "owl"))
    root = places["labeled"].parent
    shutil.copy(root / cat, places["unlabeled"] / "copy.png")
    with Image.open(root / owl) as image:
        image.save(root / "labeled" / "owl" / "zz.bmp")
    folder, said = build(places, "again")
    assert said[-2:] == [
        "note: 2 images are copies of held-out images, the same at 8 pixels: they are left out",
        UNTESTED,
    ]
    train, test = ({image.tobytes() for image in np.load(folder / f"{part}.npy")} for part in ("train", "test"))
    assert not train & test
    assert read_manifest(folder).split["copies_left_out"] == 2
    shutil.copy(root / cat, root / "labeled" / "dog" / "zz.png")
    with pytest.raises(
        UserError, match=r"two labels: (\S+zz\.png is 'dog'( and )?|\S+cat/000\d\.png is 'cat'( and )?){2}\."
    ):
        build(places, "third")


def copy_often(original: Path, times: int) -> None:
    for number in range(times):
        shutil.copy(original, original.with_name(f"copy{number}.png"))


@pytest.mark.parametrize("seed", [1, 2, 10])
def test_no_image_is_left_out_but_copies_of_held_out_ones(places: dict[str, Path], seed: int) -> None:
    """Of the two images of owl, one is there 8 times: they count as two, whichever of them is held out."""
    copy_often(places["labeled"] / "owl" / "0001.png", 7)
    copy_often(places["unlabeled"] / "0000.png", 2)
    folder, said = build(places, test_fraction=0.3, seed=seed)
    train, test = ([image.tobytes() for image in np.load(folder / f"{part}.npy")] for part in ("train", "test"))
    assert len(set(test)) == len(test) == 3 + 2 + 0 + 1
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == 18 + 12
    left_out = 25 + 14 - len(train) - len(test)
    owl = whose(folder, places, "test")[-1]
    assert left_out == (0 if owl == "labeled/owl/0000.png" else 7)
    assert read_manifest(folder).labeled_counts == [7, 3, 1, 8 - left_out]
    assert read_manifest(folder).split.get("copies_left_out", 0) == left_out
    assert sum("copies of held-out" in line for line in said) == bool(left_out)


def test_a_class_of_copies_of_one_image_is_trained_and_not_tested(places: dict[str, Path]) -> None:
    copy_often(places["labeled"] / "fox" / "0000.png", 1)
    folder, said = build(places)
    assert said == [HELD_OUT.replace("of 18", "of 19"), UNTESTED]
    assert read_manifest(folder).labeled_counts == [8, 4, 2, 1]


def test_unlabeled_images_that_are_all_copies_of_held_out_ones_are_called_so(places: dict[str, Path]) -> None:
    folder, _ = build(places)
    tested = places["labeled"].parent / whose(folder, places, "test")[0]
    for path in places["unlabeled"].iterdir():
        shutil.copy(tested, path)
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"of the 12 images in .* 11 can be read, and are copies of held-out images"):
        build(places, "again", on_bad_image="skip")


def test_labeled_images_of_two_classes_are_named(places: dict[str, Path]) -> None:
    shutil.copytree(places["labeled"], places["labeled"].parent / "test")
    shutil.copy(places["labeled"] / "fox" / "0000.png", places["labeled"] / "owl")
    shutil.copy(places["labeled"] / "cat" / "0003.png", places["labeled"] / "dog" / "a.png")
    with pytest.raises(UserError, match=r"cat/0003\.png is 'cat' and \S+dog/a\.png is 'dog', and 1 more pairs"):
        build(places, test=places["labeled"].parent / "test", test_fraction=None, allow_overlap=True)


def test_padding_has_the_mean_color_of_the_training_images(places: dict[str, Path]) -> None:
    build(places, fit="pad")
    folder, _ = build(places, "squashed")
    train, total, count = whose(folder, places, "train"), np.zeros(3), 0
    root = places["labeled"].parent
    for name in train:
        with Image.open(root / name) as image:
            inside = np.asarray(ImageOps.contain(image, (8, 8), Image.Resampling.BOX), np.float64)
        total, count = total + inside.sum((0, 1)), count + inside.shape[0] * inside.shape[1]
    color = tuple(int(value + 0.5) for value in total / count)
    facts = read_facts(root / "out")
    assert facts.pad_color == color
    for part in ("train", "test"):
        for name, stored in zip(whose(folder, places, part), np.load(root / "out" / f"{part}.npy"), strict=True):
            with Image.open(root / name) as image:
                assert np.array_equal(stored, by_pillow(image, 8, "box", "pad", color))
            (file,) = find_images([root / name])
            assert np.array_equal(stored, file.pixels(facts.preparation))


@pytest.mark.parametrize("exif", ["apply", "stored"])
def test_orientations_are_equal_through_build_and_predict(
    places: dict[str, Path], exif: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(places["unlabeled"])
    places["unlabeled"].mkdir()
    for orientation in range(1, 9):
        (places["unlabeled"] / f"{orientation}.jpg").write_bytes(oriented(orientation, "JPEG"))
    folder, said = build(places, fit="crop", filter_name="bicubic", exif=exif, resolution=16)
    assert said == [HELD_OUT, "note: 10 images are smaller than 16 pixels and are enlarged", UNTESTED]
    manifest = read_manifest(folder)
    assert manifest.split["exif_rotated"] == {"train": 7}
    assert sum(manifest.split["enlarged"].values()) == 10
    rule = read_facts(folder).preparation
    assert rule == Preparation(16, "bicubic", "crop", exif)
    for file, stored in zip(find_images([places["unlabeled"]]), np.load(folder / "train.npy")[-8:], strict=True):
        with Image.open(file.name) as image:
            seen = ImageOps.exif_transpose(image) if exif == "apply" else image
            assert np.array_equal(stored, by_pillow(seen.convert("RGB"), 16, "bicubic", "crop"))
        assert np.array_equal(stored, file.pixels(rule))
    show_folder(folder)
    how = "turned as EXIF asks" if exif == "apply" else "stored as they are"
    assert f"7 train images, {how}" in capsys.readouterr().out


def test_a_folder_made_before_there_was_a_choice_is_one_of_plain_options(places: dict[str, Path]) -> None:
    test = places["labeled"].parent / "test"
    write_class_folders(test, {name: list(pixels(1, 9, seed=k)) for k, name in enumerate(("cat", "dog", "fox", "owl"))})
    options = {"test": test, "test_fraction": None}
    folder, _ = build(places, exif="stored", **options)
    manifest = parse_manifest(folder)
    for key in ("fit", "filter", "exif", "test_fraction"):
        del manifest.split[key]
    write_manifest(folder, manifest)
    assert read_facts(folder).preparation == Preparation(8)
    assert build(places, exif="stored", **options)[1] == [f"{folder} is there already."]
    with pytest.raises(UserError, match="exif is 'stored' there, 'apply' is asked for"):
        build(places, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_build_goes_on(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """While images are read, copied from an earlier choice of rows, or painted; written and not noted each time."""
    monkeypatch.setattr(filling, "CHUNK", 4)
    shutil.copy(places["labeled"] / "dog" / "0001.png", places["unlabeled"] / "copy.png")
    shutil.copy(places["labeled"] / "dog" / "0003.png", places["unlabeled"] / "copy3.png")
    shutil.copy(places["labeled"] / "dog" / "0002.png", places["unlabeled"] / "copy2.png")
    (places["unlabeled"] / "0001.png").write_bytes(b"broken")
    options = {"fit": "pad", "filter_name": "lanczos", "on_bad_image": "skip"}
    whole, _ = build(places, "whole", **options)
    real, left = Journal.add, 0

    def add(journal: Journal, *values: object) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        real(journal, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "add", add)
    out, interruptions = places["labeled"].parent / "whole2", 0
    while not out.exists():
        left = 5
        try:
            build(places, "whole2", **options)
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < 40
    assert interruptions > 8
    assert contents(out) == contents(whole)


UNVALIDATED = "warning: no validation image of class fox, owl"


def test_validation_images_are_held_out_besides(places: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of each class that has one to spare; test images are drawn alike; copies of both are left out of training."""
    whole, _ = build(places, "whole")
    folder, said = build(places, validation_fraction=0.2)
    validation = "note: 3 of 18 labeled images are held out for validation (cat 2, dog 1, fox 0, owl 0)"
    assert said == [HELD_OUT, validation, UNVALIDATED, UNTESTED]
    manifest = read_manifest(folder)
    assert (manifest.labeled_counts, manifest.validation_counts) == ([6, 3, 1, 1], [2, 1, 0, 0])
    assert (manifest.test_counts, manifest.split["validation_fraction"]) == ([2, 1, 0, 1], 0.2)
    assert (folder / "test.npy").read_bytes() == (whole / "test.npy").read_bytes()
    rows = {name: np.load(folder / f"{name}_rows.npy") for name in ("labeled", "unlabeled", "validation")}
    assert sorted([*rows["unlabeled"], *rows["validation"]]) == list(range(11 + 12 + 3))
    assert set(rows["labeled"]) < set(rows["unlabeled"])
    train = whose(folder, places, "train")
    held = [train[row] for row in rows["validation"]]
    assert [name.split("/")[1] for name in held] == ["cat", "cat", "dog"]
    assert whose(build(places, "other", validation_fraction=0.2, seed=1)[0], places, "train") != train
    verify_folder(folder)
    show_folder(folder)
    assert "validation 3 " in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"validation_fraction is 0\.2 there, 0\.3 is asked for"):
        build(places, validation_fraction=0.3)
    with pytest.raises(UserError, match=r"validation_fraction is 0\.2 there, None is asked for"):
        build(places)
    root = places["labeled"].parent
    shutil.copy(root / held[0], places["unlabeled"] / "copy.png")
    shutil.copy(root / held[1], root / "labeled" / "cat" / "copy.png")
    folder, said = build(places, "copies", validation_fraction=0.2)
    assert "note: 2 images are copies of held-out images, the same at 8 pixels: they are left out" in said
    manifest, images = read_manifest(folder), np.load(folder / "train.npy")
    assert manifest.split["copies_left_out"] == 2
    rest = {image.tobytes() for image in np.delete(images, np.load(folder / "validation_rows.npy"), 0)}
    assert not rest & {image.tobytes() for image in images[np.load(folder / "validation_rows.npy")]}
    shutil.copy(root / held[2], root / "labeled" / "owl" / "copy.png")
    two = r"two labels: (\S+dog/\S+ is 'dog'( and )?|\S+copy\.png is 'owl'( and )?){2}\."
    with pytest.raises(UserError, match=two):
        build(places, "third", validation_fraction=0.2)


def test_validation_images_beside_test_images_of_ones_own(places: dict[str, Path]) -> None:
    test = places["labeled"].parent / "test"
    write_class_folders(test, {name: list(pixels(1, 9, seed=k)) for k, name in enumerate(("cat", "dog", "fox", "owl"))})
    options = {"test": test, "test_fraction": None, "validation_fraction": 0.2, "fit": "pad"}
    folder, said = build(places, **options)
    assert said == [
        "note: 4 of 18 labeled images are held out for validation (cat 2, dog 1, fox 0, owl 1)",
        "warning: no validation image of class fox",
    ]
    assert read_manifest(folder).labeled_counts == [8, 4, 1, 1]
    assert json.loads((folder / "test_names.json").read_text()) == [str(path) for path in sorted(test.rglob("*.png"))]
    names = json.loads((folder / "train_names.json").read_text())
    for image, name in zip(np.load(folder / "train.npy"), names, strict=True):
        (file,) = find_images([Path(name)])
        assert np.array_equal(image, file.pixels(read_facts(folder).preparation))


@pytest.mark.parametrize(
    ("sizes", "test", "validation", "expected"),
    [
        ((10, 5, 2, 1), 0.2, 0.2, ([2, 1, 1, 0], [2, 1, 0, 0])),
        ((10, 3, 3, 2), 0.5, 0.2, ([5, 2, 2, 1], [2, 0, 0, 0])),
        ((4, 2), None, 0.1, ([0, 0], [1, 1])),
        ((10, 6), 0.2, 0.8, "--validation-fraction 0.8 leaves class 'a' without labels: .* 8 of its 10 .* 2 are held"),
        ((10, 1), 0.95, None, "--test-fraction 0.95 leaves class 'a' without labels"),
        ((1, 2), 0.2, 0.2, "--validation-fraction has nothing to hold out: no class has a labeled image to spare"),
    ],
)
def test_what_is_held_out_of_each_class(sizes: tuple[int, ...], test: float, validation: float, expected: Any) -> None:
    labels, names = np.repeat(np.arange(len(sizes)), sizes), tuple("abcd"[: len(sizes)])
    shares = {part: f for part, f in (("test", test), ("validation", validation)) if f is not None}
    for seed in range(10):
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                hold_out(labels, labels, names, shares, seed)
            continue
        none = {"test": np.zeros(0, int), "validation": np.zeros(0, int)}
        held = none | hold_out(labels, labels, names, shares, seed)
        counts = [np.bincount(labels[held[part]], minlength=len(sizes)).tolist() for part in ("test", "validation")]
        assert tuple(counts) == expected
        assert not set(held["test"]) & set(held["validation"])


def test_a_csv_file_names_validation_images(places: dict[str, Path], listed: Path) -> None:
    text = listed.read_text("utf-8-sig").replace("cat/0002.png;x;cat;", "cat/0002.png;x;cat;val")
    listed.write_text(text.replace("cat/0003.png;x;cat;", "cat/0003.png;x;cat;Valid"))
    shutil.copy(places["labeled"] / "cat" / "0002.png", places["unlabeled"] / "0003.png")
    folder, said = build({"csv": listed}, test_fraction=None)
    assert said == [
        "note: 1 images are copies of held-out images, the same at 8 pixels: they are left out",
        "warning: no validation image of class dog, fox, owl",
        "warning: no test image of class fox",
    ]
    manifest = read_manifest(folder)
    assert (manifest.labeled_counts, manifest.validation_counts) == ([7, 4, 1, 1], [2, 0, 0, 0])
    names = json.loads((folder / "train_names.json").read_text())
    chosen = [names[row] for row in np.load(folder / "validation_rows.npy")]
    assert chosen == [str(places["labeled"] / "cat" / f"000{i}.png") for i in (2, 3)]
    whole = listed.read_text()
    listed.write_text(whole.replace("cat/0004.png;x;cat;", "cat/0004.png;x;cat;validation"))
    with pytest.raises(UserError, match="The source changed"):
        build({"csv": listed}, test_fraction=None)
    shutil.copy(places["labeled"] / "owl" / "0000.png", places["labeled"] / "owl" / "copy.png")
    copied = f"\n{places['labeled']}/owl/copy.png;x;owl;train"
    listed.write_text(whole.replace("owl/0000.png;x;owl;", "owl/0000.png;x;owl;validation") + copied)
    with pytest.raises(UserError, match="Class 'owl' has no labeled image to train on: all are copies of validation"):
        build({"csv": listed}, "third", test_fraction=None)
    listed.write_text(whole)
    with pytest.raises(UserError, match="lists 2 validation images: leave out --validation-fraction"):
        build({"csv": listed}, "other", test_fraction=None, validation_fraction=0.2)


def test_listed_validation_images_are_none_to_hold_out(places: dict[str, Path], listed: Path) -> None:
    text = listed.read_text("utf-8-sig").replace("cat/0002.png;x;cat;", "cat/0002.png;x;cat;validation")
    listed.write_text(text.replace(";test", ";").replace("cat/0003.png;x;cat;", "cat/0003.png;x;cat;validation"))
    _, said = build({"csv": listed})
    assert said[0] == "note: 4 of 16 labeled images are held out for testing (cat 2, dog 1, fox 0, owl 1)"


@pytest.fixture
def listed(places: dict[str, Path]) -> Path:
    """A CSV file of the same images: every class has one test image but fox, the unlabeled ones have no label."""
    root, lines = places["labeled"].parent, ["Path;extra;label;split"]
    for path in sorted(root.rglob("*.png"), reverse=True):
        name, label = path.relative_to(root), path.parent.name.replace("unlabeled", "")
        split = "test" if label not in ("", "fox") and path.name == "0001.png" else ""
        lines.append(f"{path if label == 'owl' else name};x;{label};{split}")
    (root / "list.csv").write_text("\ufeff" + "\n".join(lines), "utf-8")
    return root / "list.csv"


def test_a_csv_file_lists_the_images(places: dict[str, Path], listed: Path) -> None:
    folder, said = build({"csv": listed}, test_fraction=None)
    assert said == ["warning: no test image of class fox"]
    manifest = read_manifest(folder)
    assert manifest.class_names == ["cat", "dog", "fox", "owl"]
    assert (manifest.labeled_counts, manifest.test_counts) == ([9, 4, 1, 1], [1, 1, 0, 1])
    assert manifest.origin.places == {"csv": str(listed)}
    assert whose(folder, places, "test") == [f"labeled/{k}/0001.png" for k in ("cat", "dog", "owl")]
    assert [name.split("/")[-2] for name in whose(folder, places, "train")[15:]] == ["unlabeled"] * 12
    header, *lines = listed.read_text("utf-8-sig").splitlines()
    listed.write_text("\n".join([header.replace(";", ","), *(line.replace(";", ",") for line in sorted(lines))]))
    assert build({"csv": listed}, test_fraction=None)[1] == [f"{folder} is there already."]
    (link := listed.parents[1] / f"{listed.parent.name}-link").symlink_to(listed.parent)
    build({"csv": link / "list.csv"}, test_fraction=None)
    listed.write_text(listed.read_text().replace("cat/0000.png,x,cat", "cat/0000.png,x,dog"))
    with pytest.raises(UserError, match=r"The source changed: \S+out was built from images listed in \S+list\.csv"):
        build({"csv": listed}, test_fraction=None)


def test_a_csv_file_with_a_tree_and_a_hold_out_is_as_folders_are(places: dict[str, Path], listed: Path) -> None:
    folder, said = build(places)
    lines = [
        line.rpartition(";")[0] + ";" for line in listed.read_text("utf-8-sig").splitlines() if "unlab" not in line
    ]
    listed.write_text(
        "\n".join([lines[0] + "split", *lines[1:], f"{places['labeled']}/cat/../cat/0000.png;y;cat;train"])
    )
    listed_folder, also_said = build({"csv": listed, "unlabeled": places["unlabeled"]}, "listed")
    assert also_said == [f"note: 1 lines of {listed} list an image again, which counts once", *said]
    for name in ARRAYS:
        assert (folder / name).read_bytes() == (listed_folder / name).read_bytes()


def test_the_names_of_a_list_behind_a_link_lead_to_its_images(places: dict[str, Path], listed: Path) -> None:
    (link := listed.parent / "deep" / "er" / "link").parent.mkdir(parents=True)
    link.symlink_to(listed.parent)
    folder, _ = build({"labeled": listed}, labeled=None, csv=link / "list.csv", test_fraction=None)
    root = listed.parent.resolve()
    for part in ("train", "test"):
        names = json.loads((folder / f"{part}_names.json").read_text())
        assert [Path(name).relative_to(root).as_posix() for name in names] == whose(folder, places, part)


def test_a_csv_file_lists_images_in_archives(places: dict[str, Path], listed: Path) -> None:
    """As the names of a data folder built from archives are: it is the same with the images themselves."""
    plain, _ = build({"csv": listed}, test_fraction=None)
    with zipfile.ZipFile(listed.parent / "u.zip", "w") as archive:
        for path in places["unlabeled"].iterdir():
            archive.write(path, f"in/{path.name}")
    text = listed.read_text("utf-8-sig").replace("unlabeled/", f"{listed.parent}/u.zip/in/")
    listed.write_text(f"{text}\nu.zip/in/0001.png;again;;")
    folder, said = build({"csv": listed}, "packed", test_fraction=None)
    assert said[0] == f"note: 1 lines of {listed} list an image again, which counts once"
    for name in ARRAYS:
        assert (folder / name).read_bytes() == (plain / name).read_bytes()
    names = json.loads((folder / "train_names.json").read_text())
    assert names[15:] == [f"{listed.parent}/u.zip/in/{i:04}.png" for i in range(12)]
    listed.write_text(f"{text}\nu.zip/none.png;;;")
    with pytest.raises(UserError, match=r"list\.csv, line 32: \S+/u\.zip has no file none\.png\. Mend the path"):
        build({"csv": listed}, "other", test_fraction=None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Path;", "file;", r"must have columns path and label, and may have split; got: file, extra, label, split"),
        ("cat/0000.png;x;cat;", ";x;cat;", r"line 31: label 'cat' has no image, path is empty"),
        (
            "cat/0000.png;x;cat;",
            "cat/0000.png;x;cat;valida",
            r"line 31: Unknown split 'valida'\. .*: train, validation, test",
        ),
        ("cat/0000.png;x;cat;", "cat/0000.png;x;cat;;", r"line 31 has more values than columns"),
        ("cat/0001.png;x;cat;test", "cat/0001.png;x;;test", r"line 30: test image \S+ has no label"),
        ("cat/0001.png;x;cat;test", "cat/0001.png;x;;validation", r"line 30: validation image \S+ has no label"),
        (
            "cat/0000.png;x;cat;",
            "cat/0000.png;x;cow;validation",
            r"line 31: no training image has the label of this validation image\. Unknown label 'cow'",
        ),
        ("cat/0001.png;x;cat;test", "cat/0001.png;x;cta;test", r"line 30: .* Unknown label 'cta'. Did you mean 'cat'"),
        (
            "cat/0000.png;x;cat;",
            "cat/0002.png;x;dog;",
            r"0002\.png is 'cat' in line 29 and 'dog' in line 31\. Keep one",
        ),
        (
            "cat/0000.png;x;cat;",
            "cat/0002.png;x;cat;test",
            r"the split of \S+ is 'train' in line 29 and 'test' in line",
        ),
        (";test", ";", r"lists 0 test images: add --test-fraction 0\.2"),
        ("0000.png;x;fox;", "none.png;x;fox;", r"1 images cannot be used: \S+none\.png \(cannot be read: [^;)]+\)"),
        (
            "fox/0000.png;",
            "fox\\0000.png;",
            r"fox\\0000\.png \(cannot be read: No such file or directory; .* by /, not",
        ),
        (
            "fox/0000.png;",
            "fox/00\x0000.png;",
            r"line \d+: the path '\S+fox/00\\x0000\.png' has a NUL byte, .* Remove it",
        ),
    ],
)
def test_mistakes_in_a_csv_file_are_named(listed: Path, old: str, new: str, message: str) -> None:
    text = listed.read_text("utf-8-sig")
    assert old in text
    if old.startswith(("cat", "0")):
        old, new = f"labeled/{old}".replace("labeled/0", "fox/0"), f"labeled/{new}".replace("labeled/n", "fox/n")
        new = new.replace("labeled/;", ";")
    listed.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        build({"csv": listed}, test_fraction=None)
    assert "\n" not in str(caught.value)


def test_a_csv_file_that_is_none(tmp_path: Path, listed: Path) -> None:
    with pytest.raises(UserError, match=r"lists 3 test images: leave out --test-fraction"):
        build({"csv": listed})
    with pytest.raises(UserError, match=r"Cannot read --csv \S+none\.csv \(No such file or directory\)"):
        build({"csv": tmp_path / "none.csv"})
    listed.write_bytes("path,label\nä.png,x".encode("latin-1"))
    with pytest.raises(UserError, match="must be UTF-8 text"):
        build({"csv": listed})
    listed.write_text('path,label\n"a.png,x')
    with pytest.raises(UserError, match=r"line 1: no CSV \(unexpected end of data\)"):
        build({"csv": listed})
    listed.write_text("")
    with pytest.raises(UserError, match="must have columns path and label, and may have split; got: nothing"):
        build({"csv": listed})


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_real_photographs(shared_data: Path, tmp_path: Path, fit: str) -> None:
    """Of all sizes, greyscale among them, by superclass: every row is Pillow's."""
    table, lines, photographs = read_table(), ["path,label"], {}
    with zipfile.ZipFile(shared_data / "ilsvrc_raw_sample.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".JPEG"))[::6]:
            wnid = name.split("/")[1]
            path = tmp_path / Path(name).name
            path.write_bytes(archive.read(name))
            label = table.names[table.superclass[table.wnids[wnid]]]
            lines.append(f'{path.name},"{label}"')
            photographs[path.name] = label
    (tmp_path / "list.csv").write_text("\n".join(lines))
    folder, said = build({"csv": tmp_path / "list.csv"}, fit=fit, filter_name="bicubic", resolution=128)
    assert any("held out for testing" in line for line in said)
    rule, modes, rows = read_facts(folder).preparation, set(), {}
    for part in ("train", "test"):
        rows |= {image.tobytes(): part for image in np.load(folder / f"{part}.npy")}
    for name in photographs:
        with Image.open(tmp_path / name) as image:
            modes.add(image.mode)
            expected = by_pillow(image.convert("RGB"), 128, "bicubic", fit, rule.color or (0, 0, 0))
        assert rows.pop(expected.tobytes()) in ("train", "test")
        (file,) = find_images([tmp_path / name])
        assert np.array_equal(file.pixels(rule), expected)
    assert (rows, modes) == ({}, {"RGB", "L"})
    manifest = read_manifest(folder)
    assert sum(manifest.labeled_counts) + sum(manifest.test_counts) == len(photographs)
