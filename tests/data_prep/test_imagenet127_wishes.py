"""ImageNet-127: what is left out, what is asked for again, and what has no effect."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.folder.manifest import read_manifest
from data_prep.work.builder import build_dataset
from tests.data_prep.archives import encoded, pixels, write_class_folders
from tests.data_prep.small_imagenet import (
    PHOTOS,
    SUPER_COUNTS,
    WNIDS,
    as_folders,
    as_unpacked_devkit,
    box,
    flat,
    npz_batches,
)


def class_folder(source: Path, wnid: str) -> list[Path]:
    return sorted((source / "train" / wnid).iterdir())


def test_order_and_counts_are_of_the_usable_images(tmp_path: Path) -> None:
    source = as_folders(tmp_path / "raw")
    for path in class_folder(source, "n01440764")[:4]:  # fish: 13 - 4, fewer than the 11 sharks
        path.write_bytes(b"")
    said: list[str] = []
    out = build_dataset(
        "imagenet127", tmp_path / "d", source=source, resolution=8, on_bad_image="skip", progress=False, say=said.append
    )
    manifest = read_manifest(out)
    assert manifest.class_names == ["shark", "soft-finned fish", "ray", "bird"]
    assert manifest.unlabeled_counts == [11, 9, 3, 1]
    assert manifest.labeled_counts == [1, 1, 1, 1]
    assert manifest.test_counts == [2, 4, 2, 2]
    assert "warning: left out 4 unreadable images" in said
    labels = np.load(out / "train_labels.npy")
    kept = [name for name in sorted(PHOTOS["train"]) if (source / "train" / name).stat().st_size]
    supers = {"n01440764": 1, "n01443537": 1, "n01484850": 0, "n01496331": 2, "n01514668": 3}
    assert labels.tolist() == [supers[name[:9]] for name in kept]


def test_a_superclass_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    source = as_folders(tmp_path / "raw")
    for path in class_folder(source, "n01496331"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"Superclass 'ray' has no usable training image: all 3 of it are unreadable"):
        build_dataset(
            "imagenet127", tmp_path / "d", source=source, resolution=8, on_bad_image="skip", progress=False, say=str
        )


def test_options_without_effect_are_said(tmp_path: Path) -> None:
    source = as_folders(tmp_path / "raw")
    labels = tmp_path / "map.txt"
    labels.write_text("x")
    for message, options in (
        ("--val-labels is for a flat val/; .* has class folders there", {"val_labels": labels}),
        ("--verify checks the official tars; .* has no ILSVRC2012_img_train.tar", {"verify": True}),
        ("has val images to test on; --test-from-train is for sources without", {"test_from_train": True}),
    ):
        with pytest.raises(UserError, match=message):
            build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, **options)
    npz_batches(tmp_path)
    with pytest.raises(UserError, match="--val-labels has no effect on downsampled ImageNet"):
        build_dataset("imagenet127", tmp_path / "d", source=tmp_path, resolution=8, val_labels=labels)


def test_images_of_something_else_are_said_at_once(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "raw" / "train", {"cat": [pixels(1)[0]], "dog": [pixels(1)[0]]})
    with pytest.raises(UserError, match=r"None of the 2 training images of .*raw is of a class of ILSVRC2012\. .*wnid"):
        build_dataset("imagenet127", tmp_path / "d", source=tmp_path / "raw", resolution=8)


def test_classes_that_cannot_be_tested_are_said(tmp_path: Path) -> None:
    source = as_folders(tmp_path / "raw")
    shutil.rmtree(source / "val" / "n01496331")
    said: list[str] = []
    out = build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, progress=False, say=said.append)
    assert "note: 1 of the 4 superclasses have no val image to test on: ray" in said
    assert read_manifest(out).test_counts == [4, 2, 0, 2]
    for wnid in WNIDS:
        shutil.rmtree(source / "val" / wnid, ignore_errors=True)
    write_class_folders(source / "val", {"n02119789": [pixels(1)[0]]})
    with pytest.raises(UserError, match="No usable image is left for the test set: each is unreadable, or of a class "):
        build_dataset("imagenet127", tmp_path / "e", source=source, resolution=8, progress=False, say=str)


def test_other_validation_labels_are_another_data_set(tmp_path: Path) -> None:
    source = as_unpacked_devkit(tmp_path / "raw")
    labels = tmp_path / "map.txt"
    lines = sorted(f"{flat(name)} {name[:9]}" for name in PHOTOS["val"])
    labels.write_text("\n".join(lines))
    options = {"source": source, "resolution": 8, "progress": False}
    out = build_dataset("imagenet127", tmp_path / "d", val_labels=labels, **options)
    said: list[str] = []
    build_dataset("imagenet127", out, val_labels=labels, say=said.append, **options)
    assert said[-1] == f"{out} is there already."
    labels.write_text("\n".join(lines[::-1]))
    for given in (labels, None):
        with pytest.raises(UserError, match=r"holds another data set: val_labels is '\w+' there, .* is asked for"):
            build_dataset("imagenet127", out, val_labels=given, **options)


def test_without_a_source_the_usual_place_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGENET_DIR", str(as_folders(tmp_path / "raw")))
    out = build_dataset("imagenet127", tmp_path / "d", resolution=8, progress=False)
    (tmp_path / "raw" / "train" / "n01440764" / "more.JPEG").write_bytes(encoded(pixels(1)[0], "JPEG"))
    with pytest.raises(UserError, match="The source changed"):
        build_dataset("imagenet127", out, resolution=8, progress=False, say=str)
    shutil.rmtree(tmp_path / "raw")
    said: list[str] = []
    build_dataset("imagenet127", out, resolution=8, progress=False, say=said.append)
    assert said == [f"{out} is there already."]


def test_a_variable_that_leads_nowhere_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than another place be read in its stead."""
    monkeypatch.setenv("IMAGENET_DIR", f"{tmp_path}/typo/")
    monkeypatch.setenv("IMAGENET_ROOT", str(as_folders(tmp_path / "raw")))
    with pytest.raises(UserError, match=r"No such file or folder: .*typo \(\$IMAGENET_DIR\)\. Mend the variable"):
        build_dataset("imagenet127", tmp_path / "d", resolution=8)


def test_validation_batches_of_another_size_are_refused(tmp_path: Path) -> None:
    npz_batches(tmp_path)
    np.savez(tmp_path / "val_data.npz", data=np.zeros((3, 3 * 16 * 16), np.uint8), labels=np.array([1, 2, 3]))
    message = r"mixes batches of different image sizes \(train_data_batch_10\.npz has 8 px, val_data\.npz has 16 px\)"
    with pytest.raises(UserError, match=message):
        build_dataset("imagenet127", tmp_path / "d", source=tmp_path, resolution=8)


def test_every_kind_of_image_by_the_name_of_a_jpeg(tmp_path: Path) -> None:
    """Whatever Pillow can read is converted, whatever the name says; the rest is named, and may be left out."""
    source = as_folders(tmp_path / "raw")
    rgb = pixels(1, 40)[0][:, :24]
    picture, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    good = {
        "png": encoded(rgb),
        "bmp": encoded(rgb, "BMP"),
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "grey": encoded(rgb[..., 0], "JPEG"),
        "palette": encoded(picture.quantize(16), "PNG", transparency=3),
        "gif": encoded(picture.quantize(8), "GIF", save_all=True, append_images=[picture.quantize(4)]),
        "rotated": encoded(rgb, "JPEG", exif=exif.tobytes()),
        "one": encoded(rgb[:1, :1]),
        "wide": encoded(np.resize(rgb, (1, 20000, 3)), "JPEG"),
        "猫 ñ": encoded(rgb, "JPEG"),
    }
    bad = {
        "cut": (encoded(rgb, "JPEG")[:-200], "damaged: .*truncated"),
        "empty": (b"", "empty file"),
        "text": (b"hello", "not an image of a known format"),
        "float": (encoded(Image.fromarray(rgb[..., 0].astype(np.float32)), "TIFF"), "pixels are floating-point"),
        "bomb": (encoded(Image.new("1", (10_000, 10_000))), "too large"),
    }
    folder = source / "train" / WNIDS[0]
    for name, data in {**good, "deep": encoded(Image.fromarray(deep)), **{k: v[0] for k, v in bad.items()}}.items():
        (folder / f"{name}.JPEG").write_bytes(data)
    (folder / "folder.JPEG").mkdir()
    (folder / "loop").symlink_to(folder)
    (folder / "self.JPEG").symlink_to(folder / "self.JPEG")
    bad["self"] = (b"", "cannot be read: ")
    with pytest.raises(
        UserError, match=r"6 images cannot be used: .*; all are in .*bad_images\.json.*--on-bad-image skip"
    ):
        build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, progress=False)
    listed = json.loads((tmp_path / "d.building" / "bad_images.json").read_text())["train"]
    reasons = {Path(item["name"]).stem: item["reason"] for item in listed}
    assert reasons.keys() == bad.keys()
    assert all(re.match(bad[name][1], reason) for name, reason in reasons.items())
    out = build_dataset(
        "imagenet127", tmp_path / "d", source=source, resolution=8, on_bad_image="skip", progress=False, say=str
    )
    assert read_manifest(out).unlabeled_counts[0] == SUPER_COUNTS[0] + len(good) + 1
    pictures = {image.tobytes() for image in np.load(out / "train.npy")}
    assert all(box(data, 8).tobytes() in pictures for data in good.values())
    high = Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB").resize((8, 8), Image.Resampling.BOX)
    assert np.asarray(high).tobytes() in pictures


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    source = as_folders(tmp_path / "raw")
    (source / "train" / "n02119789").mkdir()
    with pytest.raises(UserError, match=r"train/n02119789 holds no image that is read \(found nothing\)"):
        build_dataset("imagenet127", tmp_path / "d", source=source, resolution=8, progress=False)
