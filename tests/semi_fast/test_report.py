"""The report shows what a run left behind, whatever state that is in, and needs nothing but its one file."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.work.builder import build_dataset
from semi_fast.reporting import report_at_end, write_report
from tests.semi_fast.report_page import Page
from tests.semi_fast.trained_runs import (
    ODD_NAMES,
    command,
    copy_of,
    edit_config,
    log_lines,
    odd_images,
    train,
)

SECTIONS = ["overview", "learning", "pseudo-labels", "classes", "confusion", "embeddings", "gallery", "to-label"]
SECTIONS += ["throughput"]


@pytest.fixture(scope="module")
def page(semi_run):
    return Page(write_report([semi_run]))


def test_the_page_has_every_section_and_is_well_formed(page):
    assert page.stack == []
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert page.drawings >= 12
    assert len(set(page.ids)) == len(page.ids), "an id stands twice"


def test_the_page_needs_no_network_and_runs_no_script(page):
    own = re.compile(r"#|data:|report/[\w-]+\.(svg|png|csv)$")
    assert page.addresses
    assert [a for a in page.addresses if not own.match(a)] == []
    assert page.scripts == 0
    assert "@import" not in page.html
    assert "http" not in re.sub(r"data:[^\"')]*", "", page.html)
    assert not re.findall(r"url\((?!#)[^)]*\)", page.html)


def test_references_inside_drawings_lead_somewhere(page):
    wanted = {a[1:] for a in page.addresses if a.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert wanted <= set(page.ids)


def test_colors_are_variables_of_the_style_sheet(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", drawings))
    assert {"ink", "muted", "grid", "c0"} <= used
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    for name in used:
        assert f"--{name}:" in light
        assert f"--{name}:" in dark.split("}")[0]


def test_the_page_tells_the_run_s_own_figures(page, semi_run):
    summary = json.loads((semi_run / "summary.json").read_text())
    assert all(f"{summary[f'accuracy_{name}']:.1f}" in page.text for name in ("last", "best", "mean20", "median20"))
    assert f"{summary['accuracy']:.1f} % {summary['figure']}; balanced head, averaged weights" in page.text
    assert "digits-lt" in page.text
    assert "no numbers" not in page.text
    assert "finished" in page.text


def test_pictures_are_those_of_the_data(page):
    assert len(page.pictures) > 50
    assert all(p.startswith("data:image/png;base64,") for p in page.pictures)


def test_the_bank_s_pictures_are_those_it_holds(semi_run, digits):
    from semi_fast.reporting.gallery import gallery_section, picture
    from semi_fast.reporting.rundata import gather_run

    run = gather_run(semi_run)
    rows, confidences = run.bank
    assert (rows >= 0).any(), "the run has nothing in its bank to show"
    k = int(np.argmax((rows >= 0).sum(1)))
    gallery = next(g for g in gallery_section(run).galleries if g.small and g.title == run.info.class_names[k])
    best = {r: max(confidences[k][rows[k] == r]) for r in set(rows[k][rows[k] >= 0].tolist())}
    ranked = sorted(best.values(), reverse=True)[:12]
    assert [p.lines[0] for p in gallery.pictures] == [f"stored confidence {c:.3f}" for c in ranked]
    images = np.load(digits / "train.npy")
    assert gallery.pictures[0].src in {picture(images[r]) for r, c in best.items() if c == ranked[0]}
    assert len({p.src for p in gallery.pictures}) == len(gallery.pictures), "an image stands once"


def test_every_figure_lies_beside_the_page_with_its_numbers(page, semi_run):
    folder = semi_run / "report"
    names = {path.stem for path in folder.iterdir()}
    assert {
        "accuracy",
        "losses",
        "confusion",
        "class_counts",
        "class_accuracy",
        "tsne_true",
        "method_pseudo_share",
    } <= names
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
        assert len((folder / f"{name}.csv").read_text().splitlines()) > 1
    with (folder / "accuracy.csv").open() as file:
        drawn = [float(row[2]) for row in csv.reader(file) if row[0] == "balanced"]
    assert drawn == [e["eval/ema/balanced/accuracy"] for e in log_lines(semi_run) if e["kind"] == "eval"]
    with (folder / "confusion.csv").open() as file:
        cells = [[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    assert cells == json.loads((semi_run / "summary.json").read_text())["confusion"]


def test_class_names_are_escaped_and_unknown_classes_said(tmp_path, quick):
    images = odd_images(tmp_path / "images")
    places = {"labeled": images / "labeled", "unlabeled": images / "all", "test": images / "test"}
    data = build_dataset("folder", tmp_path / "data", **places, resolution=16, progress=False, say=lambda line: None)
    run = train(tmp_path / "run", data, "eval_every=6", "method.tau=0.34")
    page = Page(write_report([run]))
    assert page.stack == []
    assert page.scripts == 0
    assert "<script" not in page.html
    for name in ODD_NAMES:
        assert name in page.text
    assert "whose class is known" in page.text  # the labeled images are among the unlabeled ones
    assert "true class unknown" in page.html  # of a picture
    assert "the data set has no labels for them" in page.text
    assert "single evaluation" in page.text


def test_an_unfinished_run_says_so_and_shows_what_there_is(semi_run, tmp_path, quick):
    run = copy_of(semi_run, tmp_path / "run")
    (run / "summary.json").unlink()
    lines = (run / "log.jsonl").read_text().splitlines()
    entry = json.loads(lines[0])
    assert entry["kind"] == "train"
    nan = json.dumps({**entry, "loss/total": float("nan")})
    (run / "log.jsonl").write_text("\n".join([nan, *lines[1:], lines[-1][:40]]))
    page = Page(write_report([run]))
    assert "This run is not finished: 6 of 6 steps are logged" in page.text
    assert "last line is cut" in page.text
    assert "no numbers, shown as gaps: loss/total" in page.text
    assert page.drawings >= 12
    assert len(page.pictures) > 50


def test_a_run_without_checkpoints_and_data_still_has_its_curves(semi_run, tmp_path):
    run = copy_of(semi_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    data = re.search(r"path: (.*)", (run / "config.yaml").read_text())[1]
    edit_config(run, data, str(tmp_path / "gone"))
    page = Page(write_report([run]))
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS
    assert "No pictures: No data set at" in page.text
    assert "No embeddings" in page.text
    assert "No confusion matrix" in page.text
    assert "accuracy" in {path.stem for path in (run / "report").iterdir()}
    assert page.pictures == []


def test_a_run_of_another_version_is_shown_without_its_model(semi_run, tmp_path):
    run = copy_of(semi_run, tmp_path / "run")
    edit_config(run, "steps: 6", "steps: 6\nwarp_drive: 9")
    page = Page(write_report([run]))
    assert "of another version of this program" in page.text
    assert {"learning", "confusion"} <= set(page.ids)  # the confusion matrix is in the summary
    assert "warp_drive" in page.text


def test_a_folder_that_is_no_run_is_an_error(semi_run, tmp_path, capsys):
    assert command("report", str(tmp_path)) == 2
    assert "is no run's folder (config.yaml is missing)" in capsys.readouterr().err
    assert command("report", str(semi_run), "--out", str(tmp_path / "report.pdf")) == 2
    assert "A report is an .html file" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least one"):
        write_report([])


def test_a_report_that_fails_does_not_fail_the_run(tmp_path):
    said = []
    report_at_end(tmp_path, "on", 10, said.append)
    assert said[0].startswith("warning: no report (UserError: ")
    assert f"python -m semi_fast report {tmp_path}" in said[0]
    assert "\n" not in said[0]
    report_at_end(tmp_path, "off", 10**6, said.append)
    report_at_end(tmp_path, "auto", 99, said.append)
    assert len(said) == 1
    assert not (tmp_path / "curves.png").exists(), "without an evaluation there is nothing to draw"
    report_at_end(tmp_path, "auto", 100, said.append)
    assert len(said) == 2


def test_training_writes_its_report_at_the_end(tmp_path, digits, quick, capsys):
    run = train(tmp_path / "run", digits, "report=on", method="fixmatch", steps=4)
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    page = Page(run / "report.html")
    assert "finished" in page.text
    assert (run / "curves.png").read_bytes() == (run / "report" / "accuracy.png").read_bytes()


def test_several_runs_are_compared_by_setting_with_mean_and_spread(semi_run, tmp_path, digits):
    other = copy_of(semi_run, tmp_path / "again")
    edit_config(other, "seed: 0", "seed: 1")
    summary = json.loads((other / "summary.json").read_text())
    first = summary["accuracy"]
    summary["accuracy"] = first + 2
    (other / "summary.json").write_text(json.dumps(summary))
    third = train(tmp_path / "plain", digits, method="supervised")
    out = tmp_path / "out" / "compared.html"
    assert command("report", *map(str, (semi_run, other, third)), "--out", str(out)) == 0
    page = Page(out)
    assert page.stack == []
    assert "2 settings compared" in page.text
    assert f"{first + 1:.1f} ± {2**0.5:.1f}" in page.text  # two values that are 2 apart
    with (out.with_suffix("") / "compare_gain.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["class", "supervised"]
    ours = list(json.loads((semi_run / "summary.json").read_text())["per_class"].values())
    theirs = list(json.loads((third / "summary.json").read_text())["per_class"].values())
    assert [float(row[1]) for row in rows[1:]] == pytest.approx([b - a for a, b in zip(ours, theirs, strict=True)])


def test_runs_on_different_data_are_not_compared_by_class(semi_run, tmp_path):
    other = copy_of(semi_run, tmp_path / "other")
    facts = json.loads((other / "data.json").read_text())
    facts["info"]["fingerprint"] = "0" * 64
    (other / "data.json").write_text(json.dumps(facts))
    page = Page(write_report([semi_run, other], tmp_path / "c.html"))
    assert "trained on different data" in page.text
    assert "Classes are not compared" in page.text
