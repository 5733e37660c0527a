"""A run's result has one definition, and comes back from its file as it was."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from data_prep.errors import UserError
from semi_fast.config import load_settings
from semi_fast.run.saved import fit_start, load_start, load_trained
from semi_fast.run.summary import FIGURES, Summary, closing_figures, closing_rows, read_summary, summarize
from semi_fast.training.evaluate import metrics
from tests.semi_fast.tiny import tiny_info
from tests.semi_fast.trained_runs import copy_of, log_lines


def evaluations(*accuracies: float) -> list[dict]:
    return [{"step": i, "eval/accuracy": accuracy} for i, accuracy in enumerate(accuracies, 1)]


def summary(**changes) -> Summary:
    """A summary of 25 evaluations, accuracies 1, ..., 25."""
    settings = load_settings(["steps=1000", f"figure={changes.pop('figure', 'last')}"])
    settings = settings.model_copy(update={"protocol": "P-TEST"})
    confusion = torch.eye(5, dtype=torch.int64).numpy() * 3
    history = changes.pop("history", evaluations(*map(float, range(1, 26))))
    measured = {f"{weights}/{head}": metrics(confusion, (5, 4, 3, 2, 1)) for weights in ("ema", "raw") for head in "ab"}
    options = {"head": "b", "weights": "raw", "seconds": 65.0, "images_per_s": 1234.0, "ceiling_share": 1234 / 1259}
    return summarize(settings, tiny_info(), history, measured, **{**options, **changes})


def test_the_four_figures_and_the_reported_one():
    last = [float(i) for i in range(6, 26)]
    expected = {"last": 25.0, "best": 25.0, "mean20": statistics.mean(last), "median20": statistics.median(last)}
    assert closing_figures(evaluations(*map(float, range(1, 26)))) == expected
    assert closing_figures(evaluations(3.0, 7.0, 4.0)) == {"last": 4.0, "best": 7.0, "mean20": 14 / 3, "median20": 4.0}
    for figure in FIGURES:
        s = summary(figure=figure)
        assert (s.figures, s.figure, s.accuracy) == (expected, figure, expected[figure])
    assert (s.protocol, s.head, s.weights, s.evaluations_in_mean) == ("P-TEST", "b", "raw", 20)


def test_the_best_is_chosen_by_validation_images_where_there_are_some():
    history = evaluations(9.0, 5.0, 7.0, 8.0)
    for entry, accuracy in zip(history, (1.0, 6.0, 3.0, 6.0), strict=True):
        entry["validation/accuracy"] = accuracy
    assert closing_figures(history) == {"last": 8.0, "best": 5.0, "mean20": 29 / 4, "median20": 7.5}
    s = summary(history=history, figure="best")
    assert (s.accuracy, s.chosen_by, s.validation, s.best_step) == (5.0, "validation", 6.0, 2)
    assert "best by validation images 5.00" in dict(closing_rows(s, Path("run")))["accuracy"]
    s = summary()
    assert (s.chosen_by, s.validation, s.best_step) == ("test", None, 25)
    assert "best by test images 25.00" in dict(closing_rows(s, Path("run")))["accuracy"]


def test_a_summary_comes_back_from_its_file(tmp_path):
    path = tmp_path / "summary.json"
    assert read_summary(tmp_path) is None
    path.write_text(json.dumps(summary().to_json()))
    assert read_summary(tmp_path) == summary()
    for damaged in ("{", "[]", json.dumps({"accuracy": 1.0})):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is damaged or of another version"):
            read_summary(tmp_path)


def test_the_closing_rows_name_what_is_there(tmp_path):
    folder = tmp_path / "my runs" / "a"
    folder.mkdir(parents=True)
    rows = dict(closing_rows(summary(), folder))
    assert rows["result"] == "P-TEST: 25.00 (last, b, raw weights)"
    assert rows["speed"] == "1,000 steps in 1m05s, 1,234 images/s, 98% of the model-only ceiling"
    assert "written" not in rows
    assert rows["next"] == f"python -m semi_fast predict '{folder}' IMAGES"
    for name in ("summary.json", "report.html"):
        (folder / name).touch()
    rows = dict(closing_rows(summary(ceiling_share=None), folder))
    assert rows["speed"].endswith("1,234 images/s")
    assert rows["written"] == f"{folder}/summary.json"
    assert rows["report"] == f"{folder}/report.html"


def test_a_run_reports_what_its_method_says(semi_run):
    s = read_summary(semi_run)
    assert s is not None
    evaluations = [line for line in log_lines(semi_run) if line["kind"] == "eval"]
    assert {line["reported"] for line in evaluations} == {"ema/balanced"}
    assert s.accuracy == s.figures[s.figure]
    assert s.figures["last"] == evaluations[-1]["eval/ema/balanced/accuracy"]
    assert evaluations[-1]["eval/accuracy"] == s.figures["last"]


class Parts(nn.Module):
    """What of a method `fit_start` sees."""

    def __init__(self, *heads: str, width: int = 4, classes: int = 3, more: bool = False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        if more:
            self.net.append(nn.Linear(width, width))
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name in heads})
        self.register_buffer("counts", torch.rand(3))


def test_a_start_fills_the_network_and_the_heads_that_both_have():
    method, other = Parts("standard", "balanced"), Parts("standard", "old")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    said = fit_start(method, other.state_dict())
    assert said == "start_from: as initialized: counts, heads.balanced; not taken over: counts, heads.old"
    for name, tensor in method.state_dict().items():
        source = other.state_dict() if name.startswith(("net.", "heads.standard.")) else before
        assert torch.equal(tensor, source[name]), name


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Parts("standard", more=True), r"do not fit: unexpected: net\.2\.bias, net\.2\.weight\. Name a run"),
        (Parts("standard", width=5), r"of another shape: heads\.standard\.weight is \(3, 5\), needed \(3, 4\), .* and"),
        (Parts("standard", classes=2), r"heads\.standard\.bias is \(2,\), needed \(3,\)"),
        (nn.Module(), r"missing: net\.0\.bias, .* and 3 more"),
    ],
)
def test_a_start_that_does_not_fit_changes_nothing(other, message):
    method = Parts("standard")
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        fit_start(method, other.state_dict())
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())


def test_a_start_is_the_last_step_of_a_finished_run(semi_run, tmp_path):
    averaged, raw = (load_start(semi_run, weights) for weights in ("averaged", "raw"))
    for weights, tensors in (("averaged", averaged), ("raw", raw)):
        state = load_trained(semi_run, weights=weights).method.state_dict()
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)
    run = copy_of(semi_run, tmp_path / "run")
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"is not finished \(summary.json is missing\)"):
        load_start(run, "raw")
    with pytest.raises(UserError, match="is no run's folder"):
        load_start(tmp_path, "raw")
