"""The report of a checkpoint, of data that has moved, and of data that lacks what figures need."""

import csv
import json

import pytest

from data_prep.errors import UserError
from pipelines.arrays import open_arrays, read_info
from pipelines.reading import normalized
from semi_fast.reporting import write_report
from semi_fast.run.saved import load_trained
from tests.semi_fast.report_page import Page
from tests.semi_fast.trained_runs import command, copy_of, edit_config, log_lines, train, without_test_images


def test_data_without_test_images(semi_run, digits, tmp_path, quick, capsys):
    data = without_test_images(digits, tmp_path / "untested")
    with pytest.raises(UserError, match="untested has no test images, which every evaluation needs"):
        train(tmp_path / "refused", data)
    assert not (tmp_path / "refused").exists()
    assert command("evaluate", str(semi_run), "--data", str(data)) == 2
    assert "has no test images: there is nothing to measure" in capsys.readouterr().err
    run = copy_of(semi_run, tmp_path / "run")  # as of a program that trains without
    (run / "summary.json").unlink()
    kept = [line for line in log_lines(run) if line["kind"] != "eval"]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, kept)))
    facts = json.loads((run / "data.json").read_text())
    facts["info"] |= {"num_test": 0, "fingerprint": read_info(data).fingerprint}
    (run / "data.json").write_text(json.dumps(facts))
    assert command("report", str(run), "--data", str(data)) == 0
    page = Page(run / "report.html")
    for said in (
        "No accuracy: the data set has no test images with labels.",
        "No confusion matrix: the data set has no test images with labels.",
        "No accuracy of the classes: no evaluation, or no test images with labels.",
        "No embeddings: there are no test images.",
        "No mistakes: there are no test images with labels.",
    ):
        assert said in page.text
    assert len(page.pictures) > 40  # of the unlabeled images


def test_the_report_of_a_checkpoint_and_of_data_that_moved(semi_run, digits, tmp_path, quick, capsys):
    run = copy_of(semi_run, tmp_path / "run")
    edit_config(run, f"path: {digits}", f"path: {tmp_path / 'gone'}")
    assert command("report", str(run)) == 0
    assert "name its folder by --data" in Page(run / "report.html").text
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())
    for step in steps:
        assert command("report", str(run), "--data", str(digits), "--step", str(step)) == 0
        page = Page(run / "report.html")
        assert f"are those of step {step}" in page.text
        trained = load_trained(run, step=step, data=digits)
        counts = len(open_arrays(digits).test_labels)
        images = normalized(open_arrays(digits).test.copy(), trained.facts.info)
        guesses = trained.method.predict(images)[trained.method.reported].argmax(1)
        with (run / "report" / "confusion.csv").open() as file:
            table = [[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
        assert sum(map(sum, table)) == counts
        order = sorted(range(10), key=lambda k: -trained.facts.info.labeled_counts[k])
        assert [sum(column) for column in zip(*table, strict=True)] == [int((guesses == k).sum()) for k in order]
    assert command("report", str(run), "--step", "4") == 2
    assert "has no checkpoint of step 4" in capsys.readouterr().err
    assert command("report", str(run), str(semi_run), "--step", "best") == 2
    assert "are for the report of a single run" in capsys.readouterr().err


def test_captions_say_what_figures_mean(semi_run, tmp_path):
    page = Page(write_report([semi_run], tmp_path / "report.html"))
    assert "All 355 test images." in page.text
    assert (
        "Easy: in use, with a confidence of 0.95 or more. Hard: in use, below that. Ultra-hard: not in use" in page.text
    )


def test_classes_with_equally_many_labels_have_no_rare_ones(semi_run, tmp_path):
    run = copy_of(semi_run, tmp_path / "run")
    facts = json.loads((run / "data.json").read_text())
    facts["info"]["labeled_counts"] = [5] * 10
    (run / "data.json").write_text(json.dumps(facts))
    edit_config(run, "path:", "path: gone #")
    assert "All classes have equally many labeled images" in Page(write_report([run])).text
