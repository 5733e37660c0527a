"""A method as somebody would add it: one file on the methods' path, and not a line changed elsewhere."""

import json
import sys

import pytest
import torch

from semi_fast import methods
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from semi_fast.train import main
from tests.semi_fast.outcome import assert_same, outcome

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

METHOD = '''
"""Self-training: half-way, the images that the averaged network is surest of join the labeled ones, and all restarts."""

import torch
from torch import nn

from pipelines.batch import Stream
from semi_fast.methods.base import Method, Out
from semi_fast.parts import losses
from semi_fast.parts.figures import Figure
from semi_fast.parts.forward import linear_head
from semi_fast.parts.groups import ParamGroup

NOISE = Figure("selftrain/noise", "", "Mean of the numbers drawn for a step.")
CHOSEN = Figure("selftrain/chosen", "distribution", "Share of each class among the images chosen half-way.")


class SelfTrain(Method):
    figures = (NOISE, CHOSEN)

    def __init__(self, net, info, *, keep: int = 5):
        super().__init__()
        self.streams = {
            "labeled": Stream("labeled", ("weak",)),
            "balanced": Stream("labeled", ("strong",), balanced=True, batch=4),
            "every": Stream("all", ("weak",), batch=3),
        }
        self.net, self.keep = net, keep
        self.heads = nn.ModuleDict({name: linear_head(net, info.num_classes) for name in ("second", "first")})
        self.reported, self.weights = "first", "raw"
        self.register_buffer("chosen", torch.zeros(info.num_classes))
        self.register_buffer("evaluations", torch.zeros((), dtype=torch.int64))

    def starts(self):
        return (0.0, 0.5)

    def begin(self, stage, look):
        if stage == 1:
            logits = look.logits(look.unlabeled)["second"]
            confidence, classes = logits.softmax(1).max(1)
            top = confidence.argsort(descending=True, stable=True)[: self.keep]
            rows, labels = look.unlabeled[top.cpu()], classes[top].cpu()
            look.relabel(torch.cat([look.labeled, rows]), torch.cat([look.labels, labels]))
            self.chosen.copy_(torch.bincount(labels, minlength=len(self.chosen)) / len(labels))
            look.restart()

    def measured(self, ctx, look):
        self.evaluations += 1

    def groups(self, stage):
        return (ParamGroup("heads", 0.5), ParamGroup("net.conv1", frozen=True)) if stage == 1 else ()

    def prepare(self, batch, ctx):
        noise = torch.rand(4, 1, generator=ctx.generator, device=batch.images.device)
        target = ctx.averaged(batch.of("every", "weak")) * ctx.progress
        return batch, (noise, target)

    def objective(self, joint, labels, rows, prepared):
        noise, target = prepared
        labeled = losses.labeled_loss(joint["labeled"]["weak"].logits["first"], labels["labeled"])
        strong = joint["balanced"]["strong"].logits
        second = losses.labeled_loss(strong["second"] + noise, labels["balanced"])
        follow = (joint["every"]["weak"].features - target).square().mean()
        logs = {"loss/labeled": labeled, "loss/second": second, "loss/follow": follow, NOISE.name: noise.mean()}
        return Out(labeled + second + follow, {name: value.detach() for name, value in logs.items()})

    def statistics(self, labeled_rows):
        return {CHOSEN.name: self.chosen.clone()}
'''


@pytest.fixture
def selftrain(tmp_path, monkeypatch):
    folder = tmp_path / "more_methods"
    folder.mkdir()
    (folder / "selftrain.py").write_text(METHOD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    yield "selftrain"
    sys.modules.pop("semi_fast.methods.selftrain", None)


def arguments(data, run_dir, *more):
    small = ["steps=12", "batch=4", "log_every=3", "eval_every=4", "save_every=3", "wandb=off", "threads=1", "keep=9"]
    return ["digits_lt", f"data={data}", f"run_dir={run_dir}", "method=selftrain", "ceiling=off", *small, *more]


class KilledError(Exception):
    pass


def train_until(monkeypatch, step, argv, *, within=False):
    """Die after `step` steps and what is due then, or within the beginning of the stage that follows."""

    def tick(self, now):
        original(self, now)
        if now == step and not within:
            raise KilledError

    def restart(self):
        raise KilledError

    original = Run.tick
    with monkeypatch.context() as patch:
        patch.setattr(Run, "tick", tick)
        if within:
            patch.setattr("semi_fast.training.look.RunLook.restart", restart)
        with pytest.raises(KilledError):
            main(argv)


def test_it_trains_relabels_restarts_and_goes_on_to_the_bit_from_anywhere(digits, tmp_path, monkeypatch, selftrain):
    main(arguments(digits, tmp_path / "whole"))
    expected = outcome(tmp_path / "whole")
    for name, step, within in (("before", 5, False), ("at", 6, False), ("within", 6, True), ("behind", 10, False)):
        argv = arguments(digits, tmp_path / name)
        train_until(monkeypatch, step, argv, within=within)
        main(argv)
        assert_same(outcome(tmp_path / name), expected)


def test_what_its_stage_did_is_in_the_checkpoints(digits, tmp_path, selftrain):
    main(arguments(digits, tmp_path / "run"))
    start, before, after = (
        load_checkpoint(tmp_path / f"run/checkpoints/step-{step:09d}") for step in (3, 6, 9)
    )
    assert "labeled" not in before.tensors
    assert len(after.tensors["labeled"]["rows"]) == 118 + 5
    assert after.values["restarted"] == 6
    assert after.tensors["model"]["evaluations"] == 2
    assert after.tensors["model"]["chosen"].sum() == pytest.approx(1.0)
    frozen = "net.conv1.weight"
    assert not torch.equal(start.tensors["model"][frozen], before.tensors["model"][frozen])
    last = load_checkpoint(tmp_path / "run/checkpoints/step-000000012")
    assert torch.equal(after.tensors["model"][frozen], last.tensors["model"][frozen]), "frozen since the restart"
    assert not torch.equal(after.tensors["model"]["heads.first.weight"], last.tensors["model"]["heads.first.weight"])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert next(iter(summary["heads"])) == "raw/first"


def test_report_and_dashboard_show_its_figures(digits, tmp_path, selftrain):
    from semi_fast.commands.dashboard import as_json, build_workspace
    from semi_fast.reporting import write_report

    main(arguments(digits, tmp_path / "run"))
    page = write_report([tmp_path / "run"]).read_text()
    for text in ("Mean of the numbers drawn for a step.", "Share of each class among the images chosen half-way."):
        assert text in page
    assert "selftrain/noise" in as_json(build_workspace("entity", "project"))
