"""A table of the paper is planned, run by the sweep, gone on with, and says what each of its figures is."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines import read_info
from pipelines.reading import read_facts
from semi_fast.commands import sweep, table_plan
from semi_fast.commands.table import Choice, lay_out, row_of
from semi_fast.methods import method_names
from semi_fast.reporting import paper
from semi_fast.reporting.comparison import class_section, grouped
from semi_fast.reporting.drawing import SERIES
from semi_fast.reporting.rundata import gather_run
from semi_fast.reporting.table import CHANGED, PALE, difference
from semi_fast.run.saved import write_facts
from semi_fast.run.summary import read_summary
from tests.semi_fast.test_sweep import STAND_IN, summary
from tests.semi_fast.trained_runs import command, copy_of, edit_config

DATA = "digits-lt n30 m110 l10 u10"
DATA_VALUES = ("digits-lt", 16, 30, 110, 10, 10, None)
KEYS = "dataset,resolution,n1,m1,gamma_l,gamma_u,labeled_fraction"
ROWS = """\
1,supervised,,Plain,50,0.5
1,crest,alignment=true logit_adjustment=train,Composite,60,
1,nosuch,,Absent,65,
1,,,Unnamed,66,
1,seval,,Twice,70,1
"""
OTHERS = "fixmatch,,Elsewhere,61.5,,Some paper,of its own protocol\nsupervised,,Plain,49.5,0.4,Another paper,\n"
RULES = [
    {"where": {"dataset": "digits-lt"}, "file": "digits_lt", "protocol": "protocol_adam"},
    {"where": {"method": "supervised"}, "protocol": "protocol_acr"},
    {"where": {"method": "fixmatch"}, "protocol": "protocol_daso"},
    {
        "where": {"method": "crest", "options": ["alignment=true logit_adjustment=train"]},
        "settings": ["method.alpha=2"],
    },
    {"where": {"method": "seval"}, "start": "method.replay=seval"},
    {"where": {"table": 1}, "notes": ["What is to be known."]},
    {"where": {"table": 2}, "notes": ["What is not."]},
]


@pytest.fixture
def of_digits(tmp_path, monkeypatch):
    """Tables, figures of other papers and rules on the digits set, for a table of five rows."""
    for name, header, lines in (
        ("TABLES", "table,method,options,name,accuracy,std", ROWS),
        ("OTHERS", "method,options,name,accuracy,std,source,note", OTHERS),
    ):
        path = tmp_path / f"{name}.csv"
        data = "digits-lt,16,30,110,10,10,"
        path.write_text(f"{KEYS},{header}\n" + "".join(f"{data},{line}\n" for line in lines.splitlines()))
        monkeypatch.setattr(paper, name, path)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    monkeypatch.setattr(paper, "RULES", tmp_path / "rules.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["6"], "Unknown table '6'"),
        (["1", "--cells", "cifar10-lt n5000"], "Unknown word of --cells 'n5000'. Did you mean 'n500'"),
        (
            ["1", "--cells", "cifar10-lt n50"],
            "--cells: no data set here is 'cifar10-lt n50'. There are: cifar10-lt",
        ),
        (["1", "--cells", ""], "--cells: no data set here is ''"),
        (["1", "--methods", "FixMatch with DARPP"], "Did you mean 'FixMatch with DARP'"),
        (["1", "--methods", "fixmach"], "Did you mean 'fixmatch'"),
        (["1", "--seeds", "one"], "--seeds takes whole numbers from 0"),
        (["1", "--seeds", "2147483648", "--plan"], "from 0 to 2147483647"),
        (["1", "--seeds", "9" * 5000], "from 0 to 2147483647"),
        (["1", "--protocol", "cifar100_lt"], "got 'cifar100_lt'. There are: protocol_acr"),
        (["1", "cifar100_lt"], "A table takes key=value and protocols' settings files, got 'cifar100_lt'"),
        (["4", "--source", "imagenet127", "--plan"], "Write --source imagenet127=PATH"),
        (["4", "--source", "imagenet127=", "--plan"], "Write --source imagenet127=PATH"),
        (["1", "--cells", "cifar10-lt n500 u100", "--methods", "fixmatch", "method.tua=1"], "Did you mean 'tau'"),
        (["1", "--steps", "0"], "greater than or equal to 1"),
        (["1", "--cells", "cifar10-lt n500 u100", "--protocol", "protocol_acs"], "Did you mean 'protocol_acr'"),
        (["1", "data=somewhere"], "Use --data"),
        (["1", "method.name=semi"], "Use --methods"),
        (["1", "--cells", "cifar10-lt n500 u100", "--source", "cifar=x", "--plan"], "Did you mean 'cifar10-lt'"),
        (["figures", "--methods", "fixmach"], "Did you mean 'fixmatch'"),
        (["figures"], "No finished run of seed 0"),
        (["figures", "--plan"], "--plan is for tables"),
        (["figures", "--steps", "9", "--protocol", "protocol_acr"], "--steps, --protocol are for tables"),
        (["figures", "--source", "cifar10-lt=x"], "--source is for tables"),
        (["figures", "--devices", "cpu"], "--devices is for tables"),
        (["figures", "batch=3"], "further settings are for tables"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_built(arguments, message, tmp_path, capsys):
    assert command("table", *arguments, f"--out={tmp_path / 'out'}", f"--data={tmp_path / 'data'}") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_run_under_their_protocols_on_data_that_fits_them(tmp_path):
    choice = Choice("1", [], tmp_path / "data", tmp_path / "out", [3], "cifar10-lt n500 u100")
    laid_out = lay_out(choice)
    entries = {entry.name: entry for entry in laid_out if entry.setting.label == "cifar10-lt n500 m4000 l100 u100"}
    assert len({entry.setting for entry in laid_out}) == 8, "all columns"
    assert not any(entry.chosen for entry in laid_out if entry not in entries.values())
    with paper.TABLES.open() as file:
        names = [row["name"] for row in csv.DictReader(file) if row["table"] == "1"]
    assert list(entries)[:15] == list(dict.fromkeys(names)), "the paper's rows, in its order"
    assert [e.chosen for e in entries.values()] == [True] * 15 + [False] * (len(entries) - 15)
    assert all(bool(e.runs) == (e.row[0] in method_names()) for e in entries.values())
    (run,) = entries["FixMatch + LA with CReST+"].runs
    assert (run.settings.protocol, run.settings.steps, run.seed) == ("P-DASO", 250_000, 3)
    assert run.settings.method.options["logit_adjustment"] == "train"
    assert run.settings.data.path == str(tmp_path / "data/cifar10-lt-n500-m4000-l100-u100-disjoint")
    (ours,) = entries["FixMatch with SeMi"].runs
    assert ours.settings.protocol == "P-ACR"
    assert ours.settings.data.path == str(tmp_path / "data/cifar10-lt-n500-m4000-l100-u100")
    assert entries["FixMatch with DASO"].runs[0].settings.method.options["distribution_temperature"] == 1.5
    assert [f.accuracy for f in entries["ACR"].others] == [81.6], "published elsewhere"
    assert entries["ACR"].paper is None
    assert entries["FixMatch with BEM"].runs == []
    (whole,) = [e for e in lay_out(choice._replace(table="5", cells="cifar10-lt")) if e.name == "SeMi" and e.chosen]
    assert whole.runs[0].folder == ours.folder, "tables share their runs"
    under = choice._replace(protocol="protocol_acr", methods="FixMatch with DASO,flexmatch", settings=["steps=7"])
    asked = [entry for entry in lay_out(under) if entry.chosen]
    assert [(e.name, e.paper and e.paper.accuracy) for e in asked] == [
        ("FixMatch with DASO", 76.0),
        ("flexmatch", None),
    ]
    assert [e.runs[0].settings.protocol for e in asked] == ["P-ACR (changed: steps)"] * 2
    assert asked[0].usual_steps == 250_000


def laid(tmp_path, table, cells, methods, *settings):
    """The chosen entries of a choice of one column, by method and options."""
    choice = Choice(table, settings, tmp_path / "data", tmp_path / "out", [0], cells, methods)
    return {entry.row: entry for entry in lay_out(choice) if entry.chosen}


def test_rows_take_the_values_of_their_data_set_in_every_table(tmp_path):
    rows = laid(tmp_path, "2", "cifar10-lt n500 u1/100", "darp,seval,remixmatch,daso,ccl,cdmad,bmb,tras,cossl")
    ran = {row[0]: entry.runs[0].settings for row, entry in rows.items()}
    protocols = {name: settings.protocol for name, settings in ran.items()}
    assert {name for name, said in protocols.items() if said == "P-ADAM"} == {"cdmad", "bmb", "tras", "cossl"}
    assert protocols["ccl"] == "P-ACR"
    assert (rows["seval", ""].usual_steps, protocols["seval"]) == (500_000, "P-DASO")
    assert ran["darp"].method.options["counts_from"] == "estimate"
    assert ran["remixmatch"].method.options["alignment"] is False
    assert ran["daso"].method.options["distribution_temperature"] == 0.3
    (cart,) = laid(tmp_path, "4", "imagenet127 32px", "crt", "steps=7", "method.mixup=0.5").values()
    assert (cart.usual_steps, cart.usual[0][-1].settings.protocol) == (10_000, "P-ADAM")
    assert [cell.settings.steps for cell in cart.usual[0]] == [250_000, 10_000]
    tables = [laid(tmp_path, table, "cifar10-lt n500 u100 l100", "daso,darp") for table in ("1", "5")]
    for name in ("daso", "darp"):
        runs = [table[name, ""].runs[0] for table in tables]
        assert runs[0].folder == runs[1].folder
        assert runs[0].settings == runs[1].settings

    assert "mixup" not in cart.cells[0][0].settings.method.options


def test_settings_go_to_the_rows_asked_for_and_others_are_shown_as_they_were_run(of_digits, digits):
    choice = Choice("1", ["net=wrn16_1"], of_digits / "data", of_digits / "out", [0, 1], None, "Plain", "protocol_adam")
    (plain,) = [entry for entry in lay_out(choice) if entry.chosen]
    run = plain.runs[0]
    finish(run.folder, run, 60.0, "")
    write_facts(run.folder, read_facts(digits))
    row = row_of("1", plain)
    assert {"net.name", "optim.name"} <= set(row["changed"].split(", "))
    assert "steps" not in row["changed"].split(", ")
    assert difference(row) == "+9.00\\*"
    other = choice._replace(settings=["method.tau=0.5"], methods="fixmatch", protocol=None)
    entries = {entry.name: entry for entry in lay_out(other)}
    assert [name for name, entry in entries.items() if entry.chosen] == ["Elsewhere"]
    assert entries["Elsewhere"].runs[0].settings.method.options["tau"] == 0.5
    assert entries["Elsewhere"].usual[0][0].settings.method.options["tau"] == 0.95
    assert row_of("1", entries["Plain"]) == row


def test_test_images_out_of_the_training_set_are_refused(of_digits, digits, monkeypatch, capsys):
    facts = read_facts(digits)
    split = dict(zip(KEYS.split(","), DATA_VALUES, strict=True)) | {"test_from_train": True}
    monkeypatch.setattr("semi_fast.commands.table.read_facts", lambda _: facts._replace(split=split))
    (of_digits / "data" / DATA.replace(" ", "-")).mkdir(parents=True)
    line = ["table", "1", "--methods", "supervised", "--devices", "cpu", "--seeds", "0"]
    assert paper.Setting.of(split, str(facts.info.resolution)).label == DATA
    assert command(*line, f"--data={of_digits / 'data'}", f"--out={of_digits / 'out'}") == 2
    assert "does not hold digits-lt n30 m110 l10 u10 with its own test images" in capsys.readouterr().err


def test_files_have_all_columns_and_the_console_those_asked_for(of_digits, digits, monkeypatch, capsys):
    with paper.TABLES.open("a") as file:
        file.write("digits-lt,16,20,110,10,10,,1,supervised,,Plain,40,\n")
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    split = dict(zip(KEYS.split(","), DATA_VALUES, strict=True))
    monkeypatch.setattr("semi_fast.commands.table.read_facts", lambda _: read_facts(digits)._replace(split=split))
    (of_digits / "data" / DATA.replace(" ", "-")).mkdir(parents=True)
    line = ["table", "1", "--methods", "supervised", "--devices", "cpu", "--seeds", "0", "--cells", "n30"]
    assert command(*line, f"--data={of_digits / 'data'}", f"--out={of_digits / 'out'}") == 1
    said, text = capsys.readouterr().out, (of_digits / "out/table1.md").read_text()
    assert "| Plain | not run (50.0 ± 0.50) |\n" in said
    assert "| Plain | not run (50.0 ± 0.50) | not run (40.0) |" in text
    assert ("## digits-lt n20 m110" in said, "## digits-lt n20 m110" in text) == (False, True)
    assert said.count(" starts on the CPU") == 1


def test_a_plan_names_commands_and_hours_and_where_these_come_from(of_digits, digits, capsys):
    out, data = of_digits / "out", of_digits / "data"
    line = ["table", "1", "--plan", f"--out={out}", f"--data={data}", "--seeds", "0,1", "net=wrn10_1", "threads=1"]
    assert command(*line, "--methods", "supervised,seval,fixmatch") == 0
    said = capsys.readouterr().out.splitlines()
    folder = data / DATA.replace(" ", "-")
    build = "python -m data_prep.build digits-lt --n1 30 --m1 110 --gamma-l 10 --gamma-u 10 --res 16"
    assert said[:2] == [
        f"build        {build} --out {folder}",
        f"build        {build} --disjoint --out {folder}-disjoint",
    ]
    runs = [
        re.match(r" *([\d.,]+) h\* python -m semi_fast.train digits_lt protocol_(\w+) ", text) for text in said[2:10]
    ]
    assert [run[2] for run in runs] == ["acr", "adam", "adam", "daso"] * 2
    assert "8 runs to train, 0 finished" in said[10]
    assert re.match(r"8 \(\*\) by the rate of the network alone, .* wrn10_1 at 16 px [\d,]+ images/s", said[11])
    assert not out.exists()
    assert not data.exists()

    run = out / DATA.replace(" ", "-") / "supervised-seed7"
    finish(run, lay_out(Choice("1", ["net=wrn10_1"], data, out, [7], None, "supervised"))[0].runs[0], 50.0, "")
    write_facts(run, read_facts(digits))
    assert command(*line, "--methods", "supervised") == 0
    said = capsys.readouterr().out
    assert f"{250_000 * 0.36 / 3600:9,.2f} h  python" in said, "0.36 s a step"
    assert "2 by the time a step took in finished runs of the same row" in said


def finish(folder, cell, last, fingerprint):
    """What a finished run of a cell leaves."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(cell.settings.model_dump()))
    values = {"protocol": cell.settings.protocol, "steps": 10, "seconds": 3.6, "balanced": last - 5}
    (folder / "summary.json").write_text(json.dumps(summary(last, fingerprint)._replace(**values).to_json()))


def test_a_table_is_built_run_and_gone_on_with(of_digits, capfd, monkeypatch, root):
    """With a stand-in for training that finishes the runs prepared for it and fails with the others."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr(sweep, "COMMAND", [sys.executable, "-c", STAND_IN, str(of_digits / "prepared")])
    out, data, prepared = of_digits / "out", of_digits / "data", of_digits / "prepared"
    line = ["table", "1", "--steps", "1000", f"--out={out}", f"--data={data}", "--seeds", "0,1"]
    assert command(*line) == 1
    said = capfd.readouterr()
    assert said.err.count("error: nothing prepared") == 8
    order = re.findall(r"^\[(\w+)(, first run)?, digits.* seed (\d)\] starts", said.out, flags=re.MULTILINE)
    first = [
        row for seed in "01" for row in (("Plain", "", seed), ("Composite", "", seed), ("Twice", ", first run", seed))
    ]
    assert order == [*first, ("Twice", "", "0"), ("Twice", "", "1")]
    states = {
        "Plain": "not run",
        "Composite": "not run",
        "Absent": "not in this project",
        "Unnamed": "not in this project",
    }
    assert {row["row"]: row["state"] for row in written(out)} == {**states, "Twice": "not run", "Elsewhere": "not run"}

    entries = {e.name: e for e in lay_out(Choice("1", ["steps=1000"], data, out, [0, 1]))}
    figures = {("Plain", 0): 50.0, ("Plain", 1): 53.0, ("Composite", 0): 66.5, ("Twice", 0): 70.0}
    for (name, seed), last in figures.items():
        cell = entries[name].runs[seed]
        finish(prepared / cell.folder.name, cell, last, read_info(cell.settings.data.path).fingerprint)
    assert command(*line) == 1
    said = capfd.readouterr()
    assert said.out.count(" starts on the CPU") == 8
    rows = {row["row"]: row for row in written(out)}
    plain, composite = rows["Plain"], rows["Composite"]
    assert plain["accuracy"] == {"mean": 50.5, "std": pytest.approx(4.5**0.5)}
    assert (plain["difference"], composite["difference"]) == (0.5, 5.5)
    assert (composite["finished"], composite["missing"]) == ([0], [1])
    assert (plain["changed"], rows["Twice"]["changed"]) == ("steps", "first run: steps, steps")
    assert (plain["protocol"], composite["protocol"]) == ("P-ACR (changed: steps)", "P-ADAM (changed: steps)")
    assert composite["settings"]["method.alpha"] == "2.0"
    assert plain["published"] == {"Another paper": "49.5 ± 0.40"}
    assert rows["Elsewhere"]["published"] == {"Some paper": "61.5"}
    assert (rows["Elsewhere"]["paper"], rows["Absent"]["paper"]["accuracy"]) == (None, 65.0)

    text = (out / "table1.md").read_text()
    assert text in said.out
    assert "| Plain | 50.50 ± 2.12 (50.0 ± 0.50, +0.50\\*) |" in text
    cells = (
        "50.50 ± 2.12 (mean20) | 46.50 ± 2.12 | 50.0 ± 0.50 | +0.50\\* | 49.5 ± 0.40 | – | P-ACR (changed: steps) | "
    )
    assert f"| Plain | {cells}1,000 of 250,000 | 0, 1 | abc |" in text
    assert "| Composite | 65.50 (mean20) | 61.50 | 60.0 | +5.50\\* | – | – | P-ADAM (changed: steps) |" in text
    assert "| 1,000 of 250,000 | 0 (1 of 2) | abc |" in text
    assert "| Absent | not in this project | – | 65.0 | – | – | – | – | – | – | – |" in text
    assert "| Elsewhere | not run | – | – | – | – | 61.5 |" in text
    assert all(note in text for note in (CHANGED, "- What is to be known.", "- Some paper: of its own protocol."))
    assert "What is not." not in text
    lines = {row["row"]: row for row in csv.DictReader((out / "table1.csv").read_text().splitlines())}
    for name, row in rows.items():
        assert (lines[name]["accuracy"] and float(lines[name]["accuracy"])) == (row["accuracy"]["mean"] or "")
        assert lines[name]["state"] == row["state"]
    assert (lines["Plain"]["paper"], lines["Plain"]["steps"], lines["Plain"]["Another paper"]) == (
        "50.0",
        "1000",
        "49.5 ± 0.40",
    )
    drawn = np.asarray(Image.open(out / "table1.png").convert("RGB")).reshape(-1, 3)
    bar, mark = (np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in SERIES[:2])
    pale = 255 - PALE * (255 - bar)
    assert (abs(drawn - pale).max(1) < 2).sum() > 2000, "bars of short runs"
    assert not (drawn == bar).all(1).any(), "none has all steps"
    assert (drawn == mark).all(1).sum() > 200, "five marks"

    assert command(*line, "--methods", "Plain,Composite") == 1
    assert capfd.readouterr().out.count(" starts on the CPU") == 1, "the finished ones are kept"
    assert [row["state"] for row in written(out)] == [row["state"] for row in rows.values()], "and shown"
    assert command("table", "1", "--steps", "999", *line[4:]) == 2
    assert "holds a run of other settings (steps: now 999, saved 1000)" in capfd.readouterr().err


def written(out):
    """The rows of the table's JSON file."""
    return json.loads((out / "table1.json").read_text())


def test_figures_3_to_6_of_several_runs_are_one_page(of_digits, semi_run, quick, capsys):
    folder = of_digits / "out" / DATA.replace(" ", "-")
    folder.mkdir(parents=True)
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", read_summary(semi_run).commit)
    copy_of(semi_run, folder / "semi-seed0")
    edit_config(copy_of(semi_run, folder / "semi-ea=false-seed0"), "ea: true", "ea: false")
    copy_of(semi_run, folder / "semi-seed1")
    assert command("table", "figures", "--out", of_digits / "out", "--seeds", "0", "--methods", "semi") == 0
    page = of_digits / "out" / f"figures-{DATA.replace(' ', '-')}.html"
    assert capsys.readouterr().out.split() == [str(page)]
    text = page.read_text()
    assert re.findall(r"<h2>(Figure \d)", text) == [f"Figure {number}" for number in (3, 4, 5, 6)]
    names = {file.stem for file in page.with_suffix("").glob("*.png")}
    assert {"confusion_0", "confusion_1", "tsne_0_true", "tsne_1_true", "class_counts", "compare_classes"} <= names
    assert {"compare_used", "compare_pseudo_accuracy"} <= names
    assert "confusion_2" not in names, "of one seed"
    assert "semi-ea=false" in text

    runs = [gather_run(folder / name, look=False) for name in ("semi-seed0", "semi-ea=false-seed0")]
    facts = runs[1].facts
    kept_apart = facts._replace(info=facts.info._replace(fingerprint="another"), unlabeled_counts=(1,) * 10)
    runs[1] = replace(
        runs[1], facts=kept_apart, config=runs[1].config | {"data": {"path": "somewhere/digits-disjoint"}}
    )
    drawn = [figure for figure in class_section(grouped(runs), same_data=True).figures if "counts" in figure.name]
    assert [figure.name for figure in drawn] == ["class_counts", "class_counts_1"], "once a data set"
    assert drawn[0].title != drawn[1].title == "Images of each class, digits-disjoint"


def test_a_plan_counts_images_of_stages_in_which_some_pass_by_the_network(of_digits, capsys, monkeypatch):
    monkeypatch.setattr(table_plan, "network_rate", lambda *_: 1000.0)
    out, data = of_digits / "out", of_digits / "data"
    line = ["table", "1", "--plan", f"--out={out}", f"--data={data}", "--seeds", "0", "--methods", "semi"]
    hours = {}
    for share in ("0", "0.5"):
        assert command(*line, "steps=1000000", "batch=64", "mu=1", f"method.labeled_share={share}") == 0
        hours[share] = re.search(r"^ *([\d.,]+) h\*", capsys.readouterr().out, re.M)[1]
    # a labeled view, a weak and two strong ones of an unlabeled image; for half of the steps the labeled one alone
    assert hours == {"0": "71.11", "0.5": "44.44"}
