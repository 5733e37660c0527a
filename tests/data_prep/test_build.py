"""Whole builds: what lands in the folder, and what is said when it cannot."""

import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import build
from data_prep.errors import UserError
from data_prep.folder.manifest import read_manifest
from data_prep.recipes.catalog import CATALOG
from data_prep.recipes.splits import long_tail_counts, parse_gamma
from data_prep.sources.digits import DigitsSource
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import encoded, pixels, write_class_folders

Run = Callable[..., tuple[int, str, str]]
FOLDER = ("folder", "--labeled", "a", "--unlabeled", "b", "--test", "c", "--res")
ARRAYS = ("train.npy", "test.npy", "train_labels.npy", "test_labels.npy", "labeled_rows.npy", "unlabeled_rows.npy")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["build.py", *map(str, arguments)])
        code = build.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / name) for name in ARRAYS}


def own_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog"), side: int = 20) -> list[str]:
    """labeled/, unlabeled/ and test/ of 3, 9 and 2 images; the options that name them."""
    images = iter(pixels(100, side))
    write_class_folders(root / "labeled", {name: [next(images) for _ in range(3)] for name in classes})
    write_class_folders(root / "test", {name: [next(images) for _ in range(2)] for name in classes})
    write_class_folders(root / "unlabeled" / "any" / "depth", {"x": [next(images) for _ in range(9)]})
    return [part for key in ("labeled", "unlabeled", "test") for part in (f"--{key}", str(root / key))]


def test_digits_default(run: Run, tmp_path: Path) -> None:
    assert run("digits-lt") == (0, "data/digits-lt\n", "")
    folder = tmp_path / "data" / "digits-lt"
    manifest = read_manifest(folder)
    assert manifest.labeled_counts == [30, 23, 17, 13, 10, 8, 6, 5, 3, 3]
    assert manifest.unlabeled_counts == [
        30 + 110,
        23 + 85,
        17 + 65,
        13 + 51,
        10 + 39,
        8 + 30,
        6 + 23,
        5 + 18,
        3 + 14,
        3 + 11,
    ]
    assert 350 <= sum(manifest.test_counts) <= 360
    assert sorted(p.name for p in folder.iterdir()) == sorted([*ARRAYS, "manifest.json", "preview.png"])
    got = arrays(folder)
    assert got["train.npy"].shape == (564, 16, 16, 3)
    assert got["train.npy"].dtype == np.uint8
    assert np.bincount(got["train_labels.npy"][got["labeled_rows.npy"]]).tolist() == manifest.labeled_counts
    assert np.bincount(got["train_labels.npy"][got["unlabeled_rows.npy"]]).tolist() == manifest.unlabeled_counts
    assert np.allclose(manifest.mean, (got["train.npy"] / 255).mean((0, 1, 2)))
    assert np.allclose(manifest.std, (got["train.npy"] / 255).std((0, 1, 2)))
    source = DigitsSource()
    train = source.open_split("train")
    assert len(train) + len(source.open_split("test")) == 1797
    keep = np.concatenate([np.flatnonzero(train.labels == k)[:n] for k, n in enumerate(manifest.unlabeled_counts)])
    assert np.array_equal(got["train.npy"], np.stack([train.image(i) for i in np.sort(keep)]))


def test_the_same_request_again_and_another_one(run: Run, tmp_path: Path) -> None:
    run("digits-lt")
    before = (tmp_path / "data/digits-lt/manifest.json").stat().st_mtime_ns
    assert run("digits-lt") == (0, "data/digits-lt\n", "data/digits-lt is there already.\n")
    assert (tmp_path / "data/digits-lt/manifest.json").stat().st_mtime_ns == before
    code, _, err = run("digits-lt", "--n1", 20, "--out", "data/digits-lt")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds another data set: n1 is 30 there, 20 is asked for" in err
    assert run("digits-lt", "--n1", 20, "--out", "data/digits-lt", "--force")[0] == 0
    assert read_manifest(tmp_path / "data/digits-lt").labeled_counts[0] == 20
    assert (
        run("digits-lt", "--n1", 20, "--gamma-u", "1/10", "--disjoint")[1]
        == "data/digits-lt-n20-m110-l10-urev10-disjoint\n"
    )
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "digits-lt",
        "digits-lt-n20-m110-l10-urev10-disjoint",
    ]


@pytest.mark.parametrize(
    ("shape", "more"),
    [("middle", [3, 8, 17, 40, 90, 60, 26, 12, 5, 2]), ("head-tail", [90, 40, 17, 8, 3, 2, 5, 12, 26, 60])],
)
def test_shapes_of_the_unlabeled_set(run: Run, tmp_path: Path, shape: str, more: list[int]) -> None:
    words = ("digits-lt", "--n1", 20, "--m1", 90, "--gamma-l", 1, "--gamma-u", f"{shape}:37.5", "--disjoint")
    folder = f"data/digits-lt-n20-m90-l1-u{shape}75over2-disjoint"
    assert run(*words) == (0, f"{folder}\n", "")
    manifest = read_manifest(tmp_path / folder)
    assert manifest.unlabeled_counts == more
    assert manifest.labeled_counts == [20] * 10
    assert manifest.split["gamma_u"] == f"{shape}:75/2"
    assert run(*words)[2] == f"{folder} is there already.\n"
    assert f"gamma_u {shape}:75/2" in run("info", folder)[1]


def test_a_class_with_too_few_images_is_a_warning(run: Run) -> None:
    code, _, err = run("digits-lt", "--n1", 50, "--m1", 200)
    assert code == 0
    assert "warning: class '0' has 143 images, the split asks for 50 labeled + 200 more unlabeled: took 50 + 93" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar10"], "Unknown data set 'cifar10'. Did you mean 'cifar10-lt'?"),
        (["digits-lt", "--n1", "0"], "--n1, the labeled images of the largest class, must be 1 or more, got 0"),
        (["digits-lt", "--n1", "many"], "Invalid value for '--n1'"),
        (["digits-lt", "--m1", "-1"], "must be 0 or more, got -1"),
        (["digits-lt", "--gamma-l", "1/10"], "--gamma-l must be a number, 1 or more, got '1/10'"),
        (["digits-lt", "--gamma-l", "middle:10"], "Only --gamma-u may be less or a shape."),
        (
            ["digits-lt", "--gamma-u", "middle:1/9"],
            "or a shape with a ratio of 1 or more, such as middle:100 or head-tail:100",
        ),
        (["stl10-lt", "--gamma-u", "middle:10"], "stl10-lt takes no --gamma-u"),
        (["digits-lt", "--gamma-u", "x"], "--gamma-u is a ratio such as 100, 1 or 1/100 (reversed), or a shape"),
        (["digits-lt", "--selection", "randon"], "Unknown --selection 'randon'. Did you mean 'random'?"),
        (["digits-lt", "--seed", "3"], "--seed has no effect on --selection first"),
        (["imagenet127", "--seed", "-1"], "--seed must be 0 or more and below 2^63, got -1"),
        (["imagenet127", "--seed", str(2**63)], f"--seed must be 0 or more and below 2^63, got {2**63}"),
        (["imagenet127", "--labeled-fraction", "0"], "--labeled-fraction must be above 0 and at most 1, got 0.0"),
        (["imagenet127", "--source", "none"], "No such file or folder: none (--source)"),
        (["stl10-lt", "--m1", "3"], "stl10-lt takes no --m1"),
        (["digits-lt", "--shard-images", "0"], "--shard-images must be 1 or more, got 0"),
        (["verify", "data/none"], "No data set at data/none (manifest.json is missing)"),
        (["digits-lt", "--format", "fcv"], "Unknown --format 'fcv'. Did you mean 'ffcv'?"),
        (["digits-lt", "--format", "fcv", "--format", "dali"], "Unknown --format 'fcv'. Did you mean 'ffcv'?"),
        (["digits-lt", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["digits-lt", "--on-bad-image", "ski"], "Unknown --on-bad-image 'ski'. Did you mean 'skip'?"),
        (["digits-lt", "--gama-l", "3"], "No such option: --gama-l"),
        (["digits-lt", "--source", "x"], "takes no --source"),
        (["cifar10-lt", "--source", "missing.tar.gz"], "No such file or folder: missing.tar.gz"),
        (["folder", "--labeled", "a"], "Missing option"),
        ([*FOLDER, "8"], "No such folder or archive: a"),
        (["folder", "--labeled", "a", "--res", "8"], "takes --labeled and --unlabeled, or --csv."),
        ([*FOLDER[:5], "--res", "8"], "takes either --test, folders of test images, or --test-fraction"),
        ([*FOLDER, "8", "--test-fraction", "0.2"], "takes either --test, folders of test images, or --test-fraction"),
        ([*FOLDER[:5], "--res", "8", "--test-fraction", "1"], "--test-fraction must be above 0 and below 1, got 1.0"),
        ([*FOLDER, "8", "--seed", "1"], "--seed has no effect without --test-fraction"),
        ([*FOLDER, "8", "--csv", "d.csv"], "leave out --labeled and --test"),
        (["folder", "--csv", "d.csv", "--res", "8"], "Cannot read --csv d.csv (No such file or directory)"),
        ([*FOLDER, "8", "--fit", "corp"], "Unknown --fit 'corp'. Did you mean 'crop'? Known: squash, crop, pad."),
        ([*FOLDER, "8", "--filter", "cubic"], "Unknown --filter 'cubic'. Did you mean 'bicubic'?"),
        ([*FOLDER, "8", "--exif", "applied"], "Unknown --exif 'applied'. Did you mean 'apply'?"),
        ([*FOLDER, "0"], "--res, the side of the stored images"),
        (["info", "data/none"], "No data set at data/none (manifest.json is missing)"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_list_help_and_info(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert all(name in out for name in CATALOG)
    for name in CATALOG:
        code, out, _ = run(name, "--help")
        assert code == 0
        assert "--out" in out
    folders = "class folders in a folder, zip or tar."
    for name, first in (("svhn-lt", "folder of the .mat files"), ("stl10-lt", "archive, folder of its .bin files")):
        text = " ".join(run(name, "--help")[1].replace("│", " ").split())
        assert f"{first}, or {folders}" in text
        assert "--source" in text
    run("digits-lt")
    code, out, _ = run("info", "data/digits-lt")
    assert code == 0
    assert all(text in out for text in ("imbalance 10 (30 : 3)", "gamma_l 10", "build.py digits-lt", "16×16"))


def test_started_by_path_from_anywhere(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(root / "data_prep" / "build.py"), "digits-lt", "--n1", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --n1")


def test_own_folders(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    assert run("folder", *options, "--res", 16) == (0, "data/mine-16\n", "")
    folder = tmp_path / "data" / "mine-16"
    manifest, got = read_manifest(folder), arrays(folder)
    assert (manifest.class_names, manifest.labeled_counts, manifest.test_counts) == (["cat", "dog"], [3, 3], [2, 2])
    assert manifest.unlabeled_counts is None
    assert got["labeled_rows.npy"].tolist() == [*range(6)]
    assert got["unlabeled_rows.npy"].tolist() == [*range(15)]
    assert got["train_labels.npy"].tolist() == [0, 0, 0, 1, 1, 1, *[-1] * 9]
    with Image.open(tmp_path / "mine" / "labeled" / "dog" / "0001.png") as image:
        assert np.array_equal(got["train.npy"][4], np.asarray(image.resize((16, 16), Image.Resampling.BOX)))
    code, _, err = run("folder", *options, "--res", 8, "--out", folder)
    assert code == 2
    assert "resolution is 16 there, 8 is asked for" in err


def test_hidden_labels_and_shared_files(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    options[3] = options[1]  # the unlabeled folder is the labeled one: each file counts once
    assert run("folder", *options, "--res", 8, "--out", "same")[0] == 0
    assert len(np.load(tmp_path / "same" / "train.npy")) == 6
    options[3] = options[5]  # class folders as the unlabeled tree: their names are kept as hidden labels
    assert run("folder", *options, "--res", 8, "--out", "known", "--disjoint", "--allow-overlap")[0] == 0
    assert read_manifest(tmp_path / "known").unlabeled_counts == [2, 2]
    assert np.load(tmp_path / "known" / "unlabeled_rows.npy").tolist() == [6, 7, 8, 9]


def test_folders_inside_a_zip(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    for name, compression in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            for file in sorted((tmp_path / "mine").rglob("*.png"), reverse=True):
                archive.write(file, file.relative_to(tmp_path))
    assert run("folder", *options, "--res", 8, "--out", "plain")[0] == 0
    for name in ("stored.zip", "packed.zip"):
        inside = [o.replace(str(tmp_path), f"{tmp_path}/{name}") for o in options]
        assert run("folder", *inside, "--res", 8, "--out", name + ".d")[0] == 0
        for array in ARRAYS:
            assert (tmp_path / "plain" / array).read_bytes() == (tmp_path / f"{name}.d" / array).read_bytes()


def test_class_names_and_folders_with_brackets_dollars_and_line_breaks(run: Run, tmp_path: Path) -> None:
    classes = ("[bold", "[red]cat", "$\\frac{$", "two\nlines", "猫", "long " * 40)
    options = own_folders(tmp_path / "[/b] $", classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("folder", *options, "--res", 8, "--out", "d [/i]")[0] == 0
    code, out, _ = run("info", "d [/i]")
    assert code == 0
    assert all(name in out for name in ("in d [/i]", "[bold", "[red]cat", "$\\frac{$", "猫"))


def test_names_that_are_no_text_are_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine", ("cat", os.fsdecode(b"\xff")))
    code, _, err = run("folder", *options, "--res", 8)
    assert (code, r"a class folder's name must be valid UTF-8, got '\udcff'. Rename it" in err) == (2, True)
    code, _, err = run("digits-lt", "--out", os.fsdecode(b"\xff"))
    assert (code, r"--out must be valid UTF-8, which the manifest keeps, got '\udcff'" in err) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "mine"]
    assert not any((tmp_path / "data").iterdir())


def test_bad_folders(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "one", classes=("cat",))
    code, _, err = run("folder", *options, "--res", 8)
    assert (code, "has one class folder only ('cat'); at least 2 are needed" in err) == (2, True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("x")
    code, _, err = run("folder", *options[:2], "--unlabeled", "empty", *options[4:], "--res", 8)
    assert code == 2
    options = own_folders(tmp_path / "two")
    code, _, err = run("folder", *options[:2], "--unlabeled", "empty", *options[4:], "--res", 8)
    assert (code, "No images in empty (found 1 other files: 1 .txt)" in err) == (2, True)
    write_class_folders(tmp_path / "two" / "test", {"cot": [pixels(1)[0]]})
    code, _, err = run("folder", *options, "--res", 8)
    assert (code, "Unknown class folder 'cot'. Did you mean 'cat'?" in err) == (2, True)
    assert not any((tmp_path / "data").glob("*"))


def test_unreadable_images(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    clean = build_dataset("folder", tmp_path / "clean", progress=False, **folder_options(options, 8))
    broken = tmp_path / "mine" / "labeled" / "cat" / "0000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    for number in range(7):
        (tmp_path / "mine" / "unlabeled" / f"bad{number}.png").write_bytes(b"" if number else b"no image")
    code, _, err = run("folder", *options, "--res", 8)
    assert code == 2
    assert err.startswith(f"error: 8 images cannot be used: {broken} (damaged: ")
    assert " and 3 more; all are in data/mine-8.building/bad_images.json." in err
    assert "--on-bad-image skip" in err
    listed = json.loads((tmp_path / "data/mine-8.building/bad_images.json").read_text())
    assert [item["reason"] for item in listed["train"]][1:] == ["not an image of a known format", *["empty file"] * 6]

    code, _, err = run("folder", *options, "--res", 8, "--on-bad-image", "skip")
    assert (code, err) == (0, "warning: left out 8 unreadable images\n")
    folder = tmp_path / "data" / "mine-8"
    manifest = read_manifest(folder)
    assert manifest.labeled_counts == [2, 3]
    assert manifest.split["skipped"] == {"train": 8}
    expected = np.delete(np.load(clean / "train.npy"), 0, axis=0)
    assert np.array_equal(np.load(folder / "train.npy"), expected)
    assert not (tmp_path / "data" / "mine-8.building").exists()

    # Mended images count again.
    broken.write_bytes(whole)
    for number in range(7):
        (tmp_path / "mine" / "unlabeled" / f"bad{number}.png").unlink()
    assert run("folder", *options, "--res", 8, "--force")[0] == 0
    assert np.array_equal(np.load(folder / "train.npy"), np.load(clean / "train.npy"))


def folder_options(options: list[str], resolution: int) -> dict[str, object]:
    places = {options[i].removeprefix("--"): Path(options[i + 1]) for i in range(0, 6, 2)}
    return {**places, "resolution": resolution}


def test_all_of_a_class_unreadable(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    for file in (tmp_path / "mine" / "labeled" / "dog").iterdir():
        file.write_bytes(b"")
    code, _, err = run("folder", *options, "--res", 8, "--on-bad-image", "skip")
    assert (code, "Class 'dog' has no readable labeled image" in err) == (2, True)


def test_odd_names_links_and_folders(run: Run, tmp_path: Path) -> None:
    options = own_folders(tmp_path / "mine")
    tree = tmp_path / "mine" / "unlabeled"
    image = encoded(pixels(1, 9, seed=5)[0])
    (tree / "folder.JPEG").mkdir()
    (tree / "folder.JPEG" / "猫 на окне ñ.PNG").write_bytes(image)
    (tree / "loop").symlink_to(tree)
    (tree / ".hidden.png").write_bytes(b"side file")
    (tree / "__MACOSX").mkdir()
    (tree / "__MACOSX" / "x.png").write_bytes(b"side file")
    with open(bytes(tree) + b"/\xff\xfe.png", "wb") as file:
        file.write(image)
    assert run("folder", *options, "--res", 8)[0] == 0
    assert len(np.load(tmp_path / "data" / "mine-8" / "train.npy")) == 6 + 9 + 2
    (tree / "self.png").symlink_to(tree / "self.png")
    (tree / "gone.png").symlink_to(tree / "nowhere.png")
    code, _, err = run("folder", *options, "--res", 8, "--out", "again")
    assert code == 2
    assert "2 images cannot be used" in err
    assert "cannot be read: No such file or directory" in err


def test_a_folder_that_is_something_else_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    for force in ([], ["--force"]):
        code, _, err = run("digits-lt", "--out", "out", *force)
        assert (code, "out exists and is no data set (no manifest.json)" in err) == (2, True)
        assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize(("out", "message"), [(".", "must name the folder"), ("file/x", "Cannot make file")])
def test_a_place_where_no_folder_can_be_made_is_one_line(run: Run, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "file").touch()
    code, _, err = run("digits-lt", "--out", out)
    assert (code, message in err, err.count("\n")) == (2, True, 1)


def test_a_home_that_the_shell_has_left(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = [option.replace(str(tmp_path), "~") for option in own_folders(tmp_path / "home")]
    options = [option.replace("~/home", "~") for option in options]
    assert run("folder", *options, "--res=8", "--out=~/x")[:2] == (0, f"{tmp_path / 'home/x'}\n")
    for command in ("info", "verify"):
        code, out, _ = run(command, "~/x")
        assert (code, str(tmp_path / "home/x") in out.replace("\n", "")) == (0, True)
    assert not (tmp_path / "~").exists()


def test_an_unreadable_manifest_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "d" / "manifest.json").mkdir(parents=True)
    for command in ("info", "verify"):
        code, out, err = run(command, "d")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(
            "error: Cannot read d/manifest.json (Is a directory). Mend that, or rebuild it with python"
        )


def test_options_in_python(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown option 'n2'. Did you mean 'n1'"):
        build_dataset("digits-lt", tmp_path / "x", n2=3)
    with pytest.raises(UserError, match=r"Unknown data set 'digit-lt'. Did you mean 'digits-lt'"):
        build_dataset("digit-lt", tmp_path / "x")


def test_cifar_from_a_zip_of_real_class_folders(run: Run, tmp_path: Path, shared_data: Path) -> None:
    real = zipfile.ZipFile(shared_data / "cifar10_jpeg.zip")
    with real, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in real.namelist():  # in the archive's own, shuffled order
            if name.endswith(".jpg") and int(name[-8:-4]) < (60 if name.startswith("train") else 4):
                part.writestr(name, real.read(name))
    code, out, err = run("cifar10-lt", "--n1", 20, "--m1", 30, "--gamma-u", "1/100", "--source", "part.zip")
    note = "a partial source: 600 of 50,000 training images, 40 of 10,000 test images"
    assert (code, out, err) == (0, "data/cifar10-lt-n20-m30-l100-urev100\n", f"note: {note}\n")
    folder = tmp_path / "data" / "cifar10-lt-n20-m30-l100-urev100"
    manifest, got = read_manifest(folder), arrays(folder)
    assert manifest.class_names[:3] == ["airplane", "automobile", "bird"]
    assert manifest.labeled_counts == long_tail_counts(20, parse_gamma("100"), 10)
    assert manifest.test_counts == [4] * 10
    truck = np.flatnonzero(got["train_labels.npy"] == 9)
    with zipfile.ZipFile(tmp_path / "part.zip") as archive:
        for name, row in (("train/airplane/0007.jpg", 7), ("train/truck/0029.jpg", truck[29])):
            with archive.open(name) as file, Image.open(file) as image:
                assert np.array_equal(got["train.npy"][row], np.asarray(image.convert("RGB")))


def test_files_that_changed_under_the_same_names_are_other_images(tmp_path: Path) -> None:
    from data_prep.sources.containers import list_members
    from data_prep.sources.images import EncodedImages

    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)

    def digest() -> str:
        return EncodedImages(list_members(tmp_path), np.zeros(2, np.int64)).digest()

    before = digest()
    assert digest() == before
    Image.new("RGB", (5, 4), "red").save(tmp_path / "b.png")
    assert digest() != before
