"""ImageNet-127 from real photographs, from the zip to ResNet-50's weights, in every form. Minutes: marked slow."""

import functools
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.folder.beton import compare_beton
from data_prep.folder.manifest import read_manifest
from data_prep.folder.verify import verify_folder
from data_prep.folder.writers import ImageRows
from data_prep.sources.imagenet127 import read_table
from data_prep.work.builder import build_dataset
from semi_fast.methods import method_names
from semi_fast.train import main

RAW, SMALL = "ilsvrc_raw_sample.zip", "imagenet_200wnids_32px.zip"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerator")]
# Options with which a method does within three steps what it is known for.
AT_ONCE = {
    "semi": ["method.warmup_epochs=0", "method.tau=0.1"],
    "tras": ["method.balanced_from=0"],
    "cdmad": ["method.debias_from=0"],
    "bmb": ["method.unlabeled_from=0", "method.tau=0.1"],
    "bem_like": ["method.tau=0.01"],
    "daso": ["method.warmup_epochs=0"],
    "darp": ["method.warmup_epochs=0", "method.refresh_every=1"],
    "crest": ["method.generations=2"],
}


@pytest.fixture(scope="module")
def both_formats() -> None:
    """Skips where FFCV or DALI is missing."""
    for package in ("ffcv", "nvidia.dali"):
        pytest.importorskip(package)


def build(
    source: Path, out: Path, resolution: int, formats: tuple[str, ...] = ("ffcv", "dali"), **options: Any
) -> Path:
    """A folder of all forms, or of the array and those named."""
    return build_dataset(
        "imagenet127",
        out,
        source=source,
        resolution=resolution,
        formats=formats,
        shard_images=5000 if "dali" in formats else None,
        test_from_train=source.name == RAW,
        progress=False,
        say=lambda line: None,
        **options,
    )


def part_of(source: Path, target: Path, train: int, val: int) -> Path:
    """A zip of the first few images of each class."""
    taken: dict[str, int] = {}
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as part:
        for name in sorted(n for n in whole.namelist() if n.endswith(".JPEG")):
            folder = name.rpartition("/")[0]
            taken[folder] = taken.get(folder, 0) + 1
            if taken[folder] <= (train if name.startswith("train") else val):
                part.writestr(name, whole.read(name))
    return target


@pytest.mark.usefixtures("both_formats")
@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize(("name", "images", "classes"), [(RAW, 182, 50), (SMALL, 20_000, 48)])
def test_every_form_holds_pillows_pixels(
    shared_data: Path, tmp_path: Path, name: str, images: int, classes: int, resolution: int
) -> None:
    folder = build(shared_data / name, tmp_path / "d", resolution)
    manifest = read_manifest(folder)
    assert (len(manifest.class_names), sum(manifest.unlabeled_counts or [])) == (classes, images)
    assert manifest.unlabeled_counts == sorted(manifest.unlabeled_counts or [], reverse=True)
    with zipfile.ZipFile(shared_data / name) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("train/") and n.endswith(".JPEG"))
        assert len(names) == images
        with ImageRows(folder / "train.npy") as rows:
            for row in np.random.default_rng(0).integers(0, images, 60).tolist():
                with Image.open(io.BytesIO(archive.read(names[row]))) as image:
                    expected = image.convert("RGB").resize((resolution, resolution), Image.Resampling.BOX)
                assert np.array_equal(rows[row], expected)
    for part in ("train", "test"):
        labels = np.load(folder / f"{part}_labels.npy")
        with ImageRows(folder / f"{part}.npy") as rows:
            compare_beton(folder / f"{part}.beton", rows, labels)
            compare_shards(folder / f"{part}-dali", rows, labels)
    verify_folder(folder)


def compare_shards(folder: Path, rows: ImageRows, labels: np.ndarray) -> None:
    """Every image and label that the shards' indices name against the array's."""
    order, place = np.load(folder / "order.npy"), 0
    for index in sorted(folder.glob("*.idx")):
        data = index.with_suffix(".tar").read_bytes()
        for line in index.read_text().splitlines()[1:]:
            _, start, size, _, _, ids, ids_size, _ = line.split()
            row = int(order[place])
            assert data[int(start) : int(start) + int(size)] == rows[row].tobytes()
            assert np.frombuffer(data, "<i8", int(ids_size) // 8, int(ids)).tolist() == [row, labels[row]]
            place += 1
    assert place == len(labels)


@pytest.mark.usefixtures("both_formats")
@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("name", [RAW, SMALL])
def test_resnet50_trains_on_both_formats(shared_data: Path, tmp_path: Path, name: str, resolution: int) -> None:
    # Few test images: what takes long here is to evaluate, twice, on a CPU.
    source = part_of(shared_data / name, tmp_path / name, train=10, val=1)
    folder = build(source, tmp_path / "d", resolution)
    for backend in ("ffcv", "dali"):
        run = tmp_path / backend
        main(
            [
                f"imagenet127_{resolution}",
                f"data={folder}",
                f"data.backend={backend}",
                f"run_dir={run}",
                *("steps=3", "batch=4", "log_every=1", "eval_every=3", "save_every=3", "wandb=off", "threads=2"),
            ]
        )
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        losses = [entry["loss/total"] for entry in entries if entry["kind"] == "train"]
        assert len(losses) == 3
        assert all(math.isfinite(loss) and loss > 0 for loss in losses)
        assert len(json.loads((run / "summary.json").read_text())["per_class"]) == len(
            read_manifest(folder).class_names
        )


def raw_part(source: Path, target: Path) -> Path:
    """A zip of the raw images of superclasses that have five or more, of which one in ten is for testing."""
    table = read_table()
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w") as part:
        names = sorted(name for name in whole.namelist() if name.endswith(".JPEG"))
        classes = [table.superclass[table.wnids[name.split("/")[1]]] for name in names]
        chosen = [name for name, k in zip(names, classes, strict=True) if classes.count(k) >= 5]
        for i, name in enumerate(chosen):
            part.writestr(name if i % 10 else name.replace("train", "val", 1), whole.read(name))
    return target


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Few images of that resolution, and few to test on; two labeled ones or more in every class.

    32 px: 20 of each of 200 folders. 64 px: raw ones, half of them labeled.
    """

    @functools.cache
    def built(resolution: int) -> Path:
        folder = tmp_path_factory.mktemp("photographs")
        if resolution == 64:
            raw = raw_part(shared_data / RAW, folder / "part.zip")
            return build(raw, folder / "d", 64, formats=(), labeled_fraction=0.5)
        return build(part_of(shared_data / SMALL, folder / SMALL, train=20, val=1), folder / "d", 32, formats=())

    return built


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_resnet50_on_photographs(
    photographs: Callable[[int], Path], tmp_path: Path, name: str, resolution: int
) -> None:
    small = ["steps=3", "batch=4", "log_every=1", "eval_every=3", "wandb=off", "report=off", "threads=1"]
    options = [f"data={photographs(resolution)}", f"method={name}", f"run_dir={tmp_path}/run", "ceiling=off"]
    main([f"imagenet127_{resolution}", *options, *small, *AT_ONCE.get(name, [])])
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    windows = [entry for entry in entries if entry["kind"] == "train"]
    assert len(windows) == 3
    assert all(math.isfinite(value) for window in windows for key, value in window.items() if key.startswith("loss/"))
