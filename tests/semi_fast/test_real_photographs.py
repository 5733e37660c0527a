"""Real photographs, of all sizes, grey among them: data folder, training, report, predictions, ONNX and back."""

import csv
import json
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from data_prep.folder.manifest import read_manifest
from data_prep.sources.imagenet127 import read_table
from data_prep.work.builder import build_dataset
from pipelines.reading import row_names
from semi_fast.run.checkpoint import list_checkpoints
from semi_fast.run.saved import load_trained
from tests.semi_fast.report_page import Page
from tests.semi_fast.trained_runs import command, copy_of, train

SIDE, LARGEST, STEPS = 128, 6, 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def places(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The largest superclasses as folders of labeled images, a third of their photographs; all of them unlabeled."""
    table, root, members = read_table(), tmp_path_factory.mktemp("photographs"), defaultdict(list)
    with zipfile.ZipFile(shared_data / "ilsvrc_raw_sample.zip") as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".JPEG")):
            label = table.names[table.superclass[table.wnids[name.split("/")[1]]]]
            members[label.replace("/", " ")].append(name)
        largest = sorted(members, key=lambda label: (-len(members[label]), label))[:LARGEST]
        for label in largest:
            for i, name in enumerate(members[label]):
                folder = root / "labeled" / label if i % 3 == 0 else root / "all"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(name).name).write_bytes(archive.read(name))
    return {"labeled": root / "labeled", "unlabeled": root / "all"}


@pytest.fixture(scope="module")
def data(places: dict[str, Path]) -> Path:
    out, options = places["labeled"].parent / "data", {"fit": "crop", "test_fraction": 0.2, "workers": 1}
    return build_dataset("folder", out, **places, resolution=SIDE, progress=False, say=str, **options)


@pytest.fixture(scope="module", params=["own", "timm"])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Views for photographs; a network of ours, and timm's with weights of the user's own."""
    views = ["views.weak=weak_photo", "views.strong=strong_photo"]
    shared = ["batch=4", "eval_every=1", "save_every=1", "keep=9", "method.tau=0.3", *views]
    if request.param == "own":
        return shared
    timm = pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("resnet18", pretrained=False).state_dict(), path)
    return [*shared, "net=timm/resnet18", f"net.weights={path}"]


@pytest.fixture(scope="module")
def run(data: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run", data, *options, method="fixmatch", steps=STEPS)


def test_the_data_are_the_photographs(places: dict[str, Path], data: Path) -> None:
    manifest, names, sizes, modes = read_manifest(data), row_names(data) or [], set(), set()
    files = [path for place in places.values() for path in place.rglob("*.JPEG")]
    assert len(manifest.class_names) == LARGEST
    sizes_of = [a + b for a, b in zip(manifest.test_counts, manifest.labeled_counts, strict=True)]
    assert manifest.test_counts == [max(1, int(0.2 * n + 0.5)) for n in sizes_of]
    assert len(names) + sum(manifest.test_counts) == len(files)
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
            modes.add(image.mode)
    assert len(sizes) > 10
    assert modes == {"RGB", "L"}
    for row in range(0, len(names), 7):
        with Image.open(names[row]) as image:
            width, height = image.size
            short = min(width, height)
            resized = image.convert("RGB").resize((SIDE * width // short, SIDE * height // short), Image.Resampling.BOX)
        left, top = (round((length - SIDE) / 2) for length in resized.size)
        expected = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))
        assert np.array_equal(np.load(data / "train.npy", mmap_mode="r")[row], expected)


def test_report_predictions_onnx_and_back(
    places: dict[str, Path], data: Path, run: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert command("report", run) == 0
    assert Page(run / "report.html").stack == []
    with (run / "to_label.csv").open() as file:
        assert {Path(line["path"]).parent for line in csv.DictReader(file)} == {places["unlabeled"]}
    assert command("predict", run, places["unlabeled"], "--out", tmp_path / "p.csv", "--batch", "16") == 0
    assert command("export", run, "--onnx", tmp_path / "model.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert [facts[key] for key in ("fit", "resolution", "exif")] == ["crop", str(SIDE), "apply"]
    names, pixels = row_names(data) or [], np.load(data / "train.npy", mmap_mode="r")
    rows = {name: row for row, name in enumerate(names)}
    with (tmp_path / "p.csv").open() as file:
        lines = list(csv.DictReader(file))[::5]
    for line in lines:
        _, shares = session.run(None, {"images": pixels[rows[line["image"]]].transpose(2, 0, 1)[None]})
        assert json.loads(facts["class_names"])[int(shares.argmax())] == line["class"]
        assert float(line["confidence"]) == pytest.approx(float(shares.max()), abs=1e-4)


def test_a_resumed_run_is_equal_to_the_bit(data: Path, run: Path, options: list[str], tmp_path: Path) -> None:
    again = copy_of(run, tmp_path / "run")
    (again / "summary.json").unlink()
    for path in list_checkpoints(again / "checkpoints")[1:]:
        shutil.rmtree(path)
    train(again, data, *options, method="fixmatch", steps=STEPS)
    for weights in ("averaged", "raw"):
        whole, resumed = (load_trained(folder, weights=weights).method.state_dict() for folder in (run, again))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
