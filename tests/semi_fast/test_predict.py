"""A trained run put to use: images of any kind, all figures of a checkpoint, and the model as ONNX."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_prep.errors import UserError
from data_prep.work.builder import build_dataset
from pipelines.reading import normalized, read_facts
from semi_fast.commands import export
from semi_fast.run.saved import load_trained, run_facts
from tests.semi_fast.trained_runs import command, copy_of, edit_config, log_lines, train


@pytest.fixture(scope="module")
def images(tmp_path_factory, digits):
    """The first test images as files of their own."""
    folder = tmp_path_factory.mktemp("images")
    for i, pixels in enumerate(np.load(digits / "test.npy")[:7]):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predictions_are_those_of_the_model(semi_run, images, digits, capsys):
    assert command("predict", str(semi_run), str(images), "--batch", "3") == 0
    out = capsys.readouterr()
    rows = rows_of(out.out)
    trained = load_trained(semi_run)
    with torch.no_grad():
        x = normalized(np.load(digits / "test.npy")[:7], trained.facts.info)
        shares = trained.method.predict(x)["balanced"].softmax(1)
    assert [row["image"] for row in rows] == [str(images / f"{i}.png") for i in range(7)]
    assert [int(row["class"]) for row in rows] == shares.argmax(1).tolist()
    np.testing.assert_allclose([float(row["confidence"]) for row in rows], shares.amax(1), atol=2e-6)
    fifth = shares.sort(1, descending=True).values[:, 4]
    np.testing.assert_allclose([float(row["confidence5"]) for row in rows], fifth, atol=2e-6)
    assert "7 images in" in out.err
    assert "images/s" in out.err


def test_images_of_any_size_mode_and_container(semi_run, images, tmp_path, capsys):
    source = Image.open(images / "0.png")
    folder = tmp_path / "odd" / "deeper"
    folder.mkdir(parents=True)
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        source.convert(mode).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    source.resize((333, 51)).save(folder / "wide.webp")
    Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) << 8).save(folder / "deep.tif")
    (folder / "broken.png").write_bytes((images / "0.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(images / "1.png", "in/1.png")
    out = tmp_path / "results" / "p.json"
    arguments = [str(semi_run), str(tmp_path / "odd"), str(tmp_path / "more.zip"), str(images / "2.png")]
    assert command("predict", *arguments, "--out", str(out)) == 1  # two could not be read
    found = json.loads(out.read_text())
    assert len(found["predictions"]) == 7 + 2
    assert {item["image"].rsplit("/", 1)[1] for item in found["unreadable"]} == {"broken.png", "empty.jpg"}
    said = capsys.readouterr().err
    assert "unreadable: " in said
    assert "empty file" in said
    by_name = {p["image"].rsplit("/", 1)[1]: p for p in found["predictions"]}
    assert by_name["deep.tif"]["top"] == by_name["L.png"]["top"]  # the high byte is what an 8-bit file holds
    assert all(len(p["top"]) == 5 and p["class"] == p["top"][0]["class"] for p in found["predictions"])
    assert found["model"]["step"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "nowhere"], "No such folder or archive: nowhere"),
        (["RUN", "EMPTY"], "has no images"),
        (["EMPTY", "EMPTY"], "is no run's folder"),
        (["RUN", "IMAGES", "--out", "p.txt"], "--out must end in .csv or .json"),
        (["RUN", "IMAGES", "--weights", "avaraged"], "Did you mean 'averaged'?"),
        (["RUN", "IMAGES", "--step", "5"], "has no checkpoint of step 5"),
        (["RUN", "IMAGES", "--step", "bets"], "--step must be a number of steps or 'best', got 'bets'."),
        (["RUN", "IMAGES", "--batch", "0"], "--batch"),
    ],
)
def test_mistakes_are_one_line(semi_run, images, tmp_path, arguments, message, capsys):
    places = {"RUN": str(semi_run), "IMAGES": str(images), "EMPTY": str(tmp_path)}
    assert command("predict", *(places.get(a, a) for a in arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_run_is_of_use_without_its_data(semi_run, images, tmp_path, capsys):
    run = copy_of(semi_run, tmp_path / "run")
    path = next(line for line in (run / "config.yaml").read_text().splitlines() if "path:" in line)
    edit_config(run, path, "  path: /gone")
    assert command("predict", str(run), str(images)) == 0
    assert command("evaluate", str(run)) == 2
    assert "No data set at /gone" in capsys.readouterr().err
    (run / "data.json").write_text("{}")
    assert command("predict", str(run), str(images)) == 2
    assert "data.json is damaged or of another version" in capsys.readouterr().err
    (run / "data.json").unlink()
    assert command("predict", str(run), str(images)) == 2
    assert "No data set at /gone" in capsys.readouterr().err


def test_facts_survive_the_file(semi_run, digits):
    assert run_facts(semi_run, "nowhere") == read_facts(digits)


def test_a_checkpoint_of_another_shape_is_refused(semi_run, tmp_path):
    run = copy_of(semi_run, tmp_path / "run")
    edit_config(run, "name: wrn10_1", "name: wrn10_2")
    with pytest.raises(UserError, match="does not fit this version of the method"):
        load_trained(run)


def test_evaluation_repeats_the_summary_s_figures(semi_run, capsys):
    summary = json.loads((semi_run / "summary.json").read_text())
    assert command("evaluate", str(semi_run), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: f["accuracy"] for name, f in found["figures"].items()} == pytest.approx(summary["heads"])
    assert found["reported"] == "ema/balanced"
    reported = found["figures"][found["reported"]]
    assert reported["confusion"] == summary["confusion"]
    assert reported["per_class"] == pytest.approx(summary["per_class"])
    assert reported["groups"] == pytest.approx(summary["groups"])
    assert command("evaluate", str(semi_run)) == 0
    table = capsys.readouterr().out
    assert "ema/balanced" in table
    assert f"{summary['balanced']:.2f}" in table


def test_the_best_checkpoint_is_that_of_the_highest_accuracy(semi_run, images, tmp_path, capsys):
    run = copy_of(semi_run, tmp_path / "run")
    oldest, *_, newest = sorted((run / "checkpoints").iterdir())
    assert oldest != newest
    for state, score in ((oldest / "state.json", 99.0), (newest / "state.json", 98.0)):
        state.write_text(json.dumps({**json.loads(state.read_text()), "score": score}))
    assert load_trained(run).step == 6
    assert load_trained(run, step="best").step == 3
    assert command("predict", str(run), str(images), "--step", "best") == 0
    assert "semi, step 3, averaged weights" in capsys.readouterr().err
    assert command("evaluate", str(run), "--step", "best", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 3
    (logged,) = [line for line in log_lines(run) if line["kind"] == "eval" and line["step"] == 3]
    assert found["figures"]["ema/balanced"]["accuracy"] == pytest.approx(logged["eval/accuracy"])
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "score": None}))
    with pytest.raises(UserError, match="no checkpoint of an evaluated step yet"):
        load_trained(run, step="best")


def test_evaluation_refuses_data_of_other_classes(semi_run, tiny_folder, capsys):
    assert command("evaluate", str(semi_run), "--data", str(tiny_folder)) == 2
    assert "has other classes (class0, class1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(semi_run, tmp_path_factory):
    """The run's model as ONNX."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "out" / "model.onnx"
    assert command("export", str(semi_run), "--onnx", str(path)) == 0
    return path


def test_the_exported_model_classifies_as_predict_does(semi_run, images, exported, digits, capsys):
    import onnxruntime

    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    pixels = np.load(digits / "test.npy")[:7]
    logits, shares = session.run(None, {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
    assert command("predict", str(semi_run), str(images)) == 0
    rows = rows_of(capsys.readouterr().out)
    assert shares.argmax(1).tolist() == [int(row["class"]) for row in rows]
    np.testing.assert_allclose(shares.max(1), [float(row["confidence"]) for row in rows], atol=1e-4)
    assert logits.shape == (7, 10)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["class_names"]) == [str(k) for k in range(10)]
    assert (facts["resolution"], facts["resize_filter"], facts["step"]) == ("16", "box", "6")


def test_photographs_are_prepared_as_the_manifest_says(tmp_path, capsys):
    """Turned as EXIF asks, and padded: by predict, and by who reads the exported file's metadata."""
    onnxruntime = pytest.importorskip("onnxruntime")
    random = np.random.default_rng(0)
    for i in range(1, 17):
        exif = Image.Exif()
        exif[0x0112] = (i - 1) % 8 + 1
        folder = tmp_path / "labeled" / ("ab"[i % 2] if i > 8 else "../all")
        folder.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(random.integers(0, 256, (3, 3, 3), np.uint8)).resize(
            (40, 25), Image.Resampling.BICUBIC
        )
        smooth.save(folder / f"{i}.jpg", exif=exif.tobytes())
    rule = {"fit": "pad", "filter_name": "lanczos", "exif": "apply"}
    places = {"labeled": tmp_path / "labeled", "unlabeled": tmp_path / "all", "test_fraction": 0.25}
    data = build_dataset("folder", tmp_path / "data", resolution=16, progress=False, say=str, **places, **rule)
    run = train(tmp_path / "run", data, "batch=2", method="supervised", steps=1)
    assert command("export", str(run), "--onnx", str(tmp_path / "model.onnx")) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    said = [facts[key] for key in ("resolution", "resize_filter", "fit", "exif")]
    assert said == ["16", "lanczos", "pad", "apply"]
    color, pixels = tuple(json.loads(facts["pad_color"])), []
    for i in range(1, 9):
        with Image.open(tmp_path / "all" / f"{i}.jpg") as image:
            upright = ImageOps.exif_transpose(image)
            pixels.append(np.asarray(ImageOps.pad(upright, (16, 16), Image.Resampling.LANCZOS, color=color)))
    assert np.array_equal(np.stack(pixels), np.load(data / "train.npy")[-8:])
    _, shares = session.run(None, {"images": np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))})
    capsys.readouterr()
    assert command("predict", str(run), str(tmp_path / "all")) == 0
    rows = rows_of(capsys.readouterr().out)
    assert ["ab"[k] for k in shares.argmax(1)] == [row["class"] for row in rows]
    np.testing.assert_allclose(shares.max(1), [float(row["confidence"]) for row in rows], atol=1e-5)
    other = build_dataset("folder", tmp_path / "other", resolution=16, progress=False, say=str, **places)
    assert command("evaluate", str(run), "--data", str(other)) == 0
    assert capsys.readouterr().err == (
        f"note: {other} was made with fit squash, the run's data with pad.\n"
        f"note: {other} was made with resize_filter box, the run's data with lanczos.\n"
    )


def test_export_checks_what_it_wrote(semi_run, exported, tmp_path, monkeypatch, capsys):
    assert command("export", str(semi_run), "--onnx", str(tmp_path / "model.pt")) == 2
    assert "--onnx must end in .onnx" in capsys.readouterr().err
    other = export.Classifier(load_trained(semi_run, weights="raw").method, load_trained(semi_run).facts.info)
    monkeypatch.setattr(export, "_convert", lambda *_: exported.read_bytes())
    monkeypatch.setattr(export, "Classifier", lambda *_: other)  # the file is of other weights
    with pytest.raises(ArithmeticError, match="differ from torch's"):
        export.export_onnx(load_trained(semi_run), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
