"""Figures from one end to the other: what real runs log, what the table says of it, what W&B and its panels get."""

import json
import mmap
import re
from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from semi_fast.commands.dashboard import build_workspace
from semi_fast.methods import method_class, method_names
from semi_fast.observe.meter import Usage, resident_bytes
from semi_fast.observe.metrics import FIGURES, find_figure, symbol, title
from semi_fast.parts.figures import Figure
from semi_fast.train import main

# Need a GPU, steps left out, a hundred steps, or validation images.
ELSEWHERE = ("memory/device_mb", "gpu/utilization", "graph/replayed", "guard/skipped", "pseudo/blended")
ELSEWHERE += ("validation/accuracy", "validation/balanced", "validation/*")
# Options with which a method logs all its figures within a few steps.
EVERYTHING = {
    "semi": ["method.warmup_epochs=0", "method.tau=0.2"],
    "abc": ["method.refine=daso"],
    "bmb": ["method.unlabeled_from=0", "method.tau=0.2"],
}


class FakeRun:
    """What W&B's run is for training, kept in memory."""

    def __init__(self, **arguments):
        self.arguments, self.id, self.url = arguments, "abc", "https://wandb.test/run"
        self.rows, self.metrics, self.summary, self.artifacts, self.closed = [], {}, {}, [], False

    def define_metric(self, name, **options):
        assert name not in self.metrics, "defined once"
        self.metrics[name] = options

    def log(self, data, step, commit):
        assert commit
        assert step == data.get("step", 13), "W&B's step is the run's; the tables come behind the last"
        self.rows.append(data)

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)

    def finish(self):
        self.closed = True

    @property
    def keys(self):
        tables = {f"{name}_table" for row in self.rows for name, value in row.items() if is_chart(value)}
        return {name for row in self.rows for name in row} | set(self.summary) | tables


def reset_accelerator():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def is_chart(value):
    return type(value).__name__ == "CustomChart"


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """A run of each method with everything on: its log, summary and fake W&B run."""
    import wandb

    found = {}
    for method in method_names():
        folder = tmp_path_factory.mktemp(method)
        made = []
        with pytest.MonkeyPatch.context() as patch:
            reset_accelerator()
            patch.setattr(wandb, "init", lambda made=made, **arguments: made.append(FakeRun(**arguments)) or made[-1])
            argv = [
                f"data={digits}",
                f"method={method}",
                f"run_dir={folder}",
                "wandb=offline",
                "report=off",
                "threads=1",
            ]
            options = EVERYTHING.get(method, [])
            summary = main(
                ["digits_lt", *argv, "steps=12", "batch=8", "log_every=3", "eval_every=6", "save_every=6", *options]
            )
            reset_accelerator()
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        (run,) = made
        found[method] = SimpleNamespace(folder=folder, summary=summary, entries=entries, wandb=run)
    return found


def keys(run):
    return {key for entry in run.entries for key in entry} - {"kind", "step", "time", "per_class", "reported"}


def test_every_logged_figure_is_in_the_table_or_declared_by_its_method(runs):
    for method, run in runs.items():
        declared = method_class(method).figures
        assert [key for key in keys(run) if find_figure(key, declared) is None] == []
        assert {figure.name for figure in declared} <= keys(run) | set(ELSEWHERE)
        for figure in declared:
            lists = [isinstance(entry[figure.name], list) for entry in run.entries if figure.name in entry]
            assert set(lists) <= {figure.unit == "distribution"}, figure.name


def test_every_figure_of_the_table_is_logged(runs):
    logged = keys(runs["semi"])
    for figure in FIGURES:
        if figure.name not in ELSEWHERE:
            assert any(fnmatchcase(key, figure.name) for key in logged), figure.name


def test_figures_of_a_window_are_what_they_say(runs):
    windows = [entry for entry in runs["semi"].entries if entry["kind"] == "train"]
    assert [w["step"] for w in windows] == [3, 6, 9, 12]
    for window in windows:
        kinds = [window[f"pseudo/{kind}"] for kind in ("easy", "hard", "ultra_hard")]
        assert sum(kinds) == pytest.approx(1)
        assert kinds[0] + kinds[1] == pytest.approx(window["pseudo/used"], abs=1e-6)
        assert sum(window["prior"]) == pytest.approx(1)
        assert sum(window["pseudo_histogram"]) == pytest.approx(1)
        parts = sum(value for key, value in window.items() if key.startswith("loss/") and key != "loss/total")
        assert parts == pytest.approx(window["loss/total"], rel=1e-5)
        phases = [window[f"time/{name}_ms"] for name in ("forward_backward", "data_wait", "optimizer")]
        assert 0 < sum(phases) <= window["time/step_ms"], "they do not overlap"
        assert window["time/slowest_step_ms"] > 0
        assert window["throughput/images_per_s"] == pytest.approx(2 * window["throughput/samples_per_s"])
        assert window["memory/host_mb"] > 100
        quantiles = [window[f"bank/confidence_q{q}"] for q in (10, 50, 90)]
        assert quantiles == sorted(quantiles)
        assert 0 <= quantiles[0] <= quantiles[2] <= 1
        assert 0 < window["bank/fill"] < 1
    assert [bool("time/evaluation_s" in w) for w in windows] == [False, True, False, True]
    shares = [w.get("time/evaluation_share") for w in windows]
    assert [share is not None for share in shares] == [False, True, False, True]
    assert all(0 < share < 1 for share in shares if share is not None)
    assert ["time/checkpoint_s" in w for w in windows] == [False, False, True, False], "said with the window after"
    assert windows[0]["optim/lr"] > windows[-1]["optim/lr"] > 0


def test_weights_that_are_not_reported_are_measured_at_the_end(runs):
    for method, run in runs.items():
        measured = [
            {key.split("/")[1] for key in entry if key.count("/") == 3}
            for entry in run.entries
            if entry["kind"] == "eval"
        ]
        reported = {"averaged": "ema", "raw": "raw"}[run.summary.weights]
        assert measured == [{reported}, {"ema", "raw"}], method
        assert {name.split("/")[0] for name in run.summary.heads} == {"ema", "raw"}


def test_a_method_without_unlabeled_images_logs_no_pseudo_labels(runs):
    logged = keys(runs["supervised"])
    assert not [key for key in logged if key.startswith(("pseudo", "bank", "prior"))]
    assert {"throughput/ceiling_share", "time/step_ms", "optim/lr"} <= logged


def test_every_panel_shows_what_a_run_logs(runs):
    logged = set().union(*(run.wandb.keys for run in runs.values()))
    assert {"confusion_table", "per_class"} <= logged
    for section in build_workspace("e", "p")._to_model().spec.section.panel_bank_config.sections:
        assert section.panels
        for panel in section.panels:
            config = panel.model_dump(by_alias=True)["config"]
            named = [config.get("metricRegex") or "", *(config.get("metrics") or [])]
            named += [config.get("xAxis") or "", config.get("yAxis") or ""]
            keys = [
                re.escape(re.sub("^summary(_metrics[.]|:)", "", key)) if "^" not in key else key for key in named if key
            ]
            for key in (k for names in keys for k in names.split("|")):
                known = any(re.fullmatch(key, name) for name in (*logged, *ELSEWHERE, "step"))
                assert known, f"{section.name}: {key}"


def test_figures_at_wandb_have_their_step_and_summary(runs):
    run = runs["semi"].wandb
    assert run.metrics.pop("step") == {"hidden": True}
    assert run.metrics["eval/accuracy"] == {"step_metric": "step", "summary": "max,last"}
    assert run.metrics["loss/total"] == {"step_metric": "step", "summary": "min,last"}
    assert run.metrics["time/step_ms"] == {"step_metric": "step", "summary": "last"}
    assert run.metrics["prior"] == {"step_metric": "step", "summary": "none"}
    figures = {key for row in run.rows if "step" in row for key in row} - {"step"}
    assert figures == set(run.metrics)
    assert {row["step"] for row in run.rows if "eval/accuracy" in row} == {6, 12}


def test_a_wandb_run_carries_config_tags_tables_and_files(runs):
    run, folder, summary = runs["semi"].wandb, runs["semi"].folder, runs["semi"].summary.to_json()
    assert run.closed
    assert run.arguments["tags"] == ["digits-lt", "semi", "wrn10_1"]
    assert run.arguments["group"] == "digits-lt-semi"
    assert run.arguments["name"] == folder.name
    assert run.arguments["config"]["method"]["tau"] == 0.2
    assert run.summary["accuracy_best"] == summary["accuracy_best"]
    tables = {name: value for row in run.rows if "step" not in row for name, value in row.items()}
    assert tables.keys() == {"per_class", "confusion"}
    rows = tables["per_class"].data
    assert [row[0] for row in rows] == list(summary["per_class"])
    assert [row[4] for row in rows] == list(summary["per_class"].values())
    assert [row[3] for row in rows] == ["many"] * 3 + ["medium"] * 4 + ["few"] * 3
    cells = tables["confusion"].table.data
    assert len(cells) == 100
    assert sum(cell[2] for cell in cells) == sum(map(sum, summary["confusion"]))
    (artifact,) = run.artifacts
    assert artifact.type == "report"
    assert {"curves.png", "summary.json", "config.yaml"} <= set(artifact.manifest.entries)


def test_a_thousand_classes_are_a_table_of_what_was_counted():
    from semi_fast.observe.tracking import MOST_CELLS, _histogram, confusion_rows

    confusion = torch.diag(torch.arange(1000)).tolist()
    rows = confusion_rows(confusion, [str(k) for k in range(1000)])
    assert len(rows) == 999 < MOST_CELLS
    assert rows[0] == ["1", "1", 1]
    assert _histogram([0.001] * 1000) is None
    assert len(_histogram([0.01] * 100).histogram) == 100


def test_titles_and_units():
    figure = find_figure("eval/ema/balanced/accuracy")
    assert (title(figure), symbol(figure)) == ("Test images that are right", "%")
    assert find_figure("loss/total").meaning != find_figure("loss/labeled").meaning, "an exact name wins"
    assert find_figure("mine/anything") is None
    mine = Figure("mine/anything", "distribution", "Mine.")
    assert find_figure("mine/anything", [mine]) == mine
    assert symbol(mine) == "share"
    declared = {figure for name in method_names() for figure in method_class(name).figures}
    names = [figure.name for figure in (*FIGURES, *declared.difference(FIGURES))]
    assert len(set(names)) == len(names)


def test_memory_of_this_process():
    size = 64 * 2**20
    with mmap.mmap(-1, size) as held:  # pages of its own: an allocation may reuse memory that was freed before
        before = resident_bytes()
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        assert resident_bytes() - before > size // 2
    assert Usage(torch.device("cpu"), print).read().keys() == {"memory/host_mb"}


@pytest.mark.parametrize("error", [ModuleNotFoundError("pynvml does not seem to be installed"), RuntimeError("NVML")])
def test_a_gpu_whose_utilization_is_unknown_is_no_error(monkeypatch, error):
    asked = []

    def utilization(device):
        asked.append(device)
        raise error

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", utilization)
    said = []
    usage = Usage(torch.device("cuda"), said.append)
    for _ in range(3):
        assert usage.read()["memory/device_mb"] == 1024
    assert len(asked) == 1, "asked once"
    assert len(said) == 1
    assert str(error) in said[0]
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    assert Usage(torch.device("cuda"), said.append).read()["gpu/utilization"] == 87
