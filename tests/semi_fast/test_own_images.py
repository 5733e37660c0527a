"""A run on images of one's own: its best checkpoint is chosen by validation images, and it says what to label next."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.folder.manifest import read_manifest, write_manifest
from data_prep.work.builder import build_dataset
from pipelines.reading import normalized, row_names
from semi_fast.observe.metrics import find_figure
from semi_fast.reporting.rundata import gather_run
from semi_fast.reporting.to_label import least_sure, to_label_section
from semi_fast.run.checkpoint import best_checkpoint, list_checkpoints
from semi_fast.run.saved import load_trained
from tests.semi_fast.report_page import Page
from tests.semi_fast.trained_runs import command, copy_of, log_lines, train


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """A data folder of three classes of noise of different color, with held-out images for testing and validation."""
    place, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, counts in (("labeled", (12, 8, 5)), ("all", (20, 15, 10))):
        for k, count in enumerate(counts):
            folder = place / part / ("ant", "bee", "cow")[k] if part == "labeled" else place / part
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = random.normal(90, 60, (14 + i, 24, 3)) + 60 * np.eye(3)[k]
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{k}-{i}.png")
    return build_dataset(
        "folder",
        place / "data",
        labeled=place / "labeled",
        unlabeled=place / "all",
        test_fraction=0.25,
        validation_fraction=0.25,
        fit="crop",
        resolution=8,
        workers=1,
        progress=False,
        say=lambda line: None,
    )


@pytest.fixture(scope="module")
def run(own, tmp_path_factory) -> Path:
    options = ("method.tau=0.4", "eval_every=1", "keep=9", "save_every=1", "figure=best")
    return train(tmp_path_factory.mktemp("runs") / "own", own, *options, method="fixmatch", steps=5)


def test_the_best_is_chosen_by_validation_images(run, own):
    manifest = read_manifest(own)
    assert manifest.validation_counts == [3, 2, 1]
    rows, labels = np.load(own / "validation_rows.npy"), np.load(own / "train_labels.npy")
    evaluations = {line["step"]: line for line in log_lines(run) if line["kind"] == "eval"}
    for path in list_checkpoints(run / "checkpoints"):
        trained = load_trained(run, step=int(path.name[5:]))
        guesses = trained.logits(normalized(np.load(own / "train.npy")[rows], trained.facts.info))
        right = 100 * np.mean(guesses[trained.method.reported].argmax(1).numpy() == labels[rows])
        assert evaluations[trained.step]["validation/accuracy"] == pytest.approx(right)
        assert json.loads((path / "state.json").read_text())["score"] == pytest.approx(right)
    best = max(evaluations.values(), key=lambda line: (line["validation/accuracy"], -line["step"]))
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["chosen_by"], summary["best_step"]) == ("validation", best["step"])
    assert summary["accuracy"] == summary["accuracy_best"] == best["eval/accuracy"]
    assert summary["validation"] == best["validation/accuracy"]
    assert best_checkpoint(run / "checkpoints").name == f"step-{best['step']:09d}"
    assert load_trained(run, step="best").step == best["step"]


def test_figures_on_validation_images_are_in_the_table(run):
    newest = [line for line in log_lines(run) if line["kind"] == "eval"][-1]
    logged = {name: find_figure(name) for name in newest if name.startswith("validation/")}
    assert set(logged) == {f"validation/{name}" for name in ("accuracy", "balanced", "many", "medium", "few")}
    assert None not in logged.values()


def test_no_validation_image_is_trained_on(own):
    validation = np.load(own / "validation_rows.npy")
    for name in ("labeled", "unlabeled"):
        assert not np.isin(validation, np.load(own / f"{name}_rows.npy")).any()
    train_images, test = (np.load(own / f"{part}.npy") for part in ("train", "test"))
    held = {image.tobytes() for image in train_images[validation]}
    rest = {image.tobytes() for image in np.delete(train_images, validation, 0)} | {image.tobytes() for image in test}
    assert len(held) == len(validation)
    assert not held & rest


def test_the_report_says_what_to_label_next(run, own, capsys):
    assert command("report", run, "--to-label", "3") == 0
    page = Page(run / "report.html")
    assert "chosen by validation: " in page.text
    assert "validation images, by which the best is chosen" in page.text
    assert ", 6 validation" in page.text
    names, labeled = row_names(own), set(np.load(own / "labeled_rows.npy").tolist())
    trained, by_class = load_trained(run), {}
    for row in np.load(own / "unlabeled_rows.npy").tolist():
        if row not in labeled:
            x = normalized(np.load(own / "train.npy")[row : row + 1], trained.facts.info)
            confidence, guess = trained.logits(x)[trained.method.reported].softmax(1)[0].max(0)
            by_class.setdefault(int(guess), []).append((float(confidence), row))
    expected = [(*pair, k) for k in sorted(by_class) for pair in sorted(by_class[k])[:3]]
    with (run / "to_label.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert len(listed) > 3
    assert [int(line["row"]) for line in listed] == [row for _, row, _ in expected]
    assert [line["pseudo_label"] for line in listed] == [("ant", "bee", "cow")[k] for _, _, k in expected]
    np.testing.assert_allclose([float(line["confidence"]) for line in listed], [c for c, *_ in expected], atol=2e-6)
    for line in listed:
        assert (line["path"], line["label"]) == (names[int(line["row"])], "")
        with Image.open(line["path"]) as image:
            side = 8 * image.width // image.height if image.width > image.height else 8
            assert side >= 8
        assert Path(line["path"]).parent.name == "all"
    assert f"to_label.csv lists {len(listed)} of 45 unlabeled images" in page.text
    assert command("report", run, run, "--to-label", "3") == 2
    assert "--to-label are for the report of a single run" in capsys.readouterr().err


def test_what_was_labeled_is_read_back(run, own, tmp_path, capsys):
    """The file with its label column filled in is a list that the build takes."""
    assert command("report", run, "--out", tmp_path / "report.html") == 0
    with (tmp_path / "to_label.csv").open() as file:
        lines = list(csv.DictReader(file))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows({**line, "label": "ab"[i % 2]} for i, line in enumerate(lines))
    data = build_dataset(
        "folder",
        tmp_path / "data",
        csv=tmp_path / "labels.csv",
        test_fraction=0.2,
        fit="crop",
        resolution=8,
        progress=False,
        say=str,
    )
    rows, names = np.load(own / "train.npy"), row_names(own)
    again, again_names = np.load(data / "train.npy"), row_names(data)
    for i, name in enumerate(again_names):
        assert np.array_equal(again[i], rows[names.index(name)])


def test_labels_filled_in_by_hand_are_kept(run, tmp_path, capsys):
    seen, file = gather_run(run), tmp_path / "to_label.csv"
    assert to_label_section(seen, tmp_path, 3).missing == []
    first = file.read_text()
    to_label_section(seen, tmp_path, 1)
    assert len(file.read_text()) < len(first), "without labels it is written anew"
    for edited in (first.replace(",,", ",ant,", 1), first.replace(",", ";")):
        file.write_text(edited)
        section = to_label_section(seen, tmp_path, 1)
        assert file.read_text() == edited
        said = f"{file} has labels filled in and is left as it is. For a new list, rename it and report again."
        assert section.missing == [said]
        assert said in capsys.readouterr().out


def test_the_least_sure_are_those_of_a_plain_search():
    random = np.random.default_rng(0)
    for count in (0, 1, 50):
        classes = random.integers(0, 4, count)
        confidences = random.choice([0.3, 0.5, 0.7, 0.9], count).astype(np.float32)
        plain = []
        for k in range(4):
            members = sorted((confidences[i], i) for i in range(count) if classes[i] == k)
            plain += [i for _, i in members[:7]]
        assert least_sure(classes, confidences, 7).tolist() == plain


def test_a_data_folder_without_names_is_named_by_rows(run, own, tmp_path):
    """As folders of an earlier version, and published data sets."""
    data = Path(shutil.copytree(own, tmp_path / "data"))
    manifest = read_manifest(data)
    for part in ("train", "test"):
        (data / f"{part}_names.json").unlink()
        del manifest.files[f"{part}_names.json"]
    write_manifest(data, manifest)
    assert row_names(data) is None
    again = copy_of(run, tmp_path / "run")
    assert command("report", again, "--data", data, "--out", tmp_path / "report.html") == 0
    assert "named by their row of train.npy" in Page(tmp_path / "report.html").text
    with (tmp_path / "to_label.csv").open() as file:
        assert {line["path"] for line in csv.DictReader(file)} == {""}


def test_a_resumed_run_is_that_of_one_go(run, own, tmp_path):
    options = ("method.tau=0.4", "eval_every=1", "keep=9", "save_every=1", "figure=best")
    again = copy_of(run, tmp_path / "own")
    (again / "summary.json").unlink()
    for path in list_checkpoints(again / "checkpoints")[2:]:
        shutil.rmtree(path)
    train(again, own, *options, method="fixmatch", steps=5)
    whole, resumed = (load_trained(folder, step=5) for folder in (run, again))
    for name, tensor in whole.method.state_dict().items():
        assert torch.equal(tensor, resumed.method.state_dict()[name]), name
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (run, again))
    for key in ("accuracy_best", "validation", "best_step", "chosen_by", "confusion"):
        assert one[key] == other[key]
