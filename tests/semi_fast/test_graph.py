"""Recorded steps: of every method they are those of the plain run to the bit, and nothing is left to the host."""

from __future__ import annotations

import json
import math
import typing
from contextlib import nullcontext

import pytest
import torch

from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import method_class, method_names
from semi_fast.methods.base import EPOCHS
from semi_fast.parts import blending
from semi_fast.run.run import Run
from semi_fast.train import main
from semi_fast.training.ema import Ema
from semi_fast.training.graph import WARM_UP, HostRecorder, StepGraph, make_recorder
from semi_fast.training.guard import Guard
from semi_fast.training.optim import build_optimizer, optimizer_tensors
from semi_fast.training.stages import Stages
from semi_fast.training.step import Trainer, train_step
from tests.semi_fast import outcome
from tests.semi_fast.recorded import FxRecorder
from tests.semi_fast.tiny import tiny_batch, tiny_method, to_device

REPLAYED = 10  # steps of a stage after the recorded one
STEPS = WARM_UP + 1 + REPLAYED


def eventful_options(name):
    """Options by which a method does within a few steps all that it does in a run: warm-ups end, n steps are few."""
    hints = typing.get_type_hints(method_class(name).__init__, include_extras=True)
    chosen = {}
    for key, hint in hints.items():
        rules = [rule for field in getattr(hint, "__metadata__", ()) for rule in field.metadata]
        if any(getattr(rule, "le", None) == EPOCHS for rule in rules):  # notional epochs
            chosen[key] = EPOCHS // 2
        elif key.endswith("_every"):
            chosen[key] = 4
    return chosen


def make_trainer(method, *, optim=None, device="cpu"):
    optim, method = optim or OptimSettings(lr=0.01, warmup=0.3), method.to(device)
    starts = method.starts()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], 1.0], strict=True)]
    optimizer = build_optimizer(method, optim, method.groups(0))
    ema = Ema(method, EmaSettings(decay=0.85, warmup=True, buffers="averaged"))
    stages = Stages(starts, math.ceil(STEPS / min(lengths)))
    return Trainer(method, optim, stages, optimizer, ema, Guard("skip", method, optimizer))


def run(trainer, recorder=None, said=None, device="cpu"):
    """Some steps of the first two stages and the last, all along: every figure of every step, and what they left."""
    if recorder is not None:
        trainer.graph = StepGraph(trainer, recorder, (said if said is not None else []).append)
    last = trainer.stages.at(10**9).number
    found = []
    for number in sorted({0, min(1, last), last}):
        stage = next(s for step in range(10**9) if (s := trainer.stages.at(step)).number == number)
        trainer.regroup(number)
        for i in range(STEPS):
            batch = to_device(tiny_batch(trainer.method, seed=100 * number + i), device)
            done = train_step(trainer, batch, stage.first + i * stage.steps // STEPS)
            pseudo = [] if done.pseudo is None else done.pseudo.flatten().tolist()
            found.append((done.names, [*done.figures.tolist(), *pseudo]))
    state = {**dict(trainer.method.named_parameters()), **dict(trainer.method.named_buffers())}
    state |= {f"{name}/average": value for name, value in trainer.ema.average.items()}
    return found, state | optimizer_tensors(trainer.method, trainer.optimizer)


def assert_same(one, other):
    for step, ((names, figures), (others, found)) in enumerate(zip(one[0], other[0], strict=True)):
        assert names == others
        assert figures == pytest.approx(found, rel=0, abs=0, nan_ok=True), f"step {step}"
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


@pytest.mark.parametrize("name", method_names())
def test_recorded_steps_are_those_of_the_plain_run_to_the_bit(name, monkeypatch):
    """Traced once a stage, replayed ten times across the end of warm-ups and what is due every n steps."""
    monkeypatch.setattr(blending, "PERIOD", 4)
    options, recorder, said = eventful_options(name), FxRecorder(), []
    plain = run(make_trainer(tiny_method(name, **options)))
    assert_same(run(make_trainer(tiny_method(name, **options)), HostRecorder(), said), plain)
    assert_same(run(make_trainer(tiny_method(name, **options)), recorder, said), plain)
    assert said == []
    assert len(recorder.recordings) == min(3, len(tiny_method(name).starts()))


def test_a_python_counter_within_a_step_is_found_out():
    """The test of the test above: a loss that Python scales by the number of calls."""

    def leaking():
        method = tiny_method("supervised")
        objective, calls = method.objective, iter(range(1, 100))
        method.objective = lambda *step: (out := objective(*step))._replace(loss=out.loss * next(calls))
        return make_trainer(method)

    plain = run(leaking())
    assert_same(run(leaking(), HostRecorder()), plain)
    with pytest.raises(AssertionError, match=f"step {WARM_UP + 1}"):
        assert_same(run(leaking(), FxRecorder()), plain)


def test_a_value_that_goes_to_the_host_within_a_step_is_found_out():
    method = tiny_method("semi")
    update = method.used.update
    method.used.update = lambda counts: update(counts * int(method.used.counts.sum() >= 0))
    said = []
    run(make_trainer(method), FxRecorder(), said)
    assert ["waits for the device" in line for line in said] == [True]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_other_optimizers_are_recorded_as_well(optimizer):
    def trainer():
        return make_trainer(tiny_method("supervised"), optim=OptimSettings(name=optimizer, lr=0.01, shrink=0.5))

    assert_same(run(trainer(), FxRecorder()), run(trainer()))


def test_a_step_that_was_not_finite_leaves_no_trace_in_a_replay_either():
    recorder = FxRecorder()
    trainer = make_trainer(tiny_method("semi"))
    trainer.graph = StepGraph(trainer, recorder, print)
    for step in range(WARM_UP + 2):
        train_step(trainer, tiny_batch(trainer.method, seed=step), step)
    before = {name: value.clone() for name, value in trainer.method.state_dict().items()}
    batch = tiny_batch(trainer.method, seed=9)
    done = train_step(trainer, batch._replace(images=batch.images * math.inf), WARM_UP + 2)
    assert not done.loss.isfinite()
    assert all(torch.equal(before[name], value) for name, value in trainer.method.state_dict().items())
    assert train_step(trainer, batch, WARM_UP + 3).loss.isfinite()
    assert not all(torch.equal(before[name], value) for name, value in trainer.method.state_dict().items())


class DriverError(Exception):
    """As numba's, which is no RuntimeError."""


class Refusing(HostRecorder):
    """Some drivers' way of saying no."""

    def record(self, step):
        raise DriverError("operation not permitted\nwhen stream is capturing")


def test_what_cannot_be_recorded_is_launched_and_said_once():
    said = []
    trainer = make_trainer(tiny_method("supervised"))
    trainer.graph = StepGraph(trainer, HostRecorder(), said.append)
    for step in range(WARM_UP + 3):
        batch = tiny_batch(trainer.method, seed=step, labeled=6 if step <= WARM_UP else 5)
        assert train_step(trainer, batch, step).loss.isfinite()
    assert len(said) == 1
    assert said[0].startswith(
        "warning: graph: off from here on (the batch or what the method takes in has another shape"
    )

    said.clear()
    plain = run(make_trainer(tiny_method("supervised")))
    assert_same(run(make_trainer(tiny_method("supervised")), Refusing(), said), plain)
    assert said == ["warning: graph: off from here on (DriverError: operation not permitted when stream is capturing)"]


def test_what_is_wrong_with_the_step_itself_is_raised():
    trainer = make_trainer(tiny_method("supervised"))
    trainer.graph = StepGraph(trainer, HostRecorder(), print)
    for step in range(WARM_UP):
        train_step(trainer, tiny_batch(trainer.method, seed=step), step)

    def fault(*_):
        raise ZeroDivisionError("of the step")

    trainer.forward = fault
    with pytest.raises(ZeroDivisionError, match="of the step"):
        train_step(trainer, tiny_batch(trainer.method, seed=9), WARM_UP)


@pytest.mark.parametrize(("recorder", "shares"), [(HostRecorder, [0.5, 1.0]), (Refusing, [0.0, 0.0])])
def test_the_share_of_replayed_steps_is_counted_and_parts_are_timed_where_they_are_launched(recorder, shares):
    trainer, found, parts = make_trainer(tiny_method("supervised")), [], []
    trainer.phase = lambda name: parts.append(name) or nullcontext()
    trainer.graph = StepGraph(trainer, recorder(), lambda line: None)
    for step in range(3 * WARM_UP):
        train_step(trainer, tiny_batch(trainer.method, seed=step), step)
        if step + 1 in (2 * WARM_UP, 3 * WARM_UP):
            found.append(trainer.graph.replayed_share())
    assert found == shares
    assert parts.count("optimizer") == (2 * WARM_UP if recorder is Refusing else 0)


def test_what_a_step_leaves_is_overwritten_by_the_next():
    """As a CUDA graph does it: whoever keeps figures must copy them, here too."""
    trainer = make_trainer(tiny_method("semi"))
    trainer.graph = StepGraph(trainer, HostRecorder(), print)
    steps = [train_step(trainer, tiny_batch(trainer.method, seed=i), i) for i in range(WARM_UP + 3)]
    assert len({done.figures.data_ptr() for done in steps[WARM_UP:]}) == 1
    assert len({done.pseudo.data_ptr() for done in steps[WARM_UP:]}) == 1


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_whose_steps_are_recorded_is_the_plain_run_and_goes_on_without(digits, tmp_path, monkeypatch):
    def train(folder, graph):
        settings = ["steps=10", "batch=8", "log_every=2", "eval_every=5", "save_every=5", "wandb=off", "threads=1"]
        main(["digits_lt", f"data={digits}", f"run_dir={folder}", *settings, "report=off", f"compile.graph={graph}"])

    def dies(self, step):
        tick(self, step)
        if step == 7:
            raise KeyboardInterrupt

    train(tmp_path / "plain", "auto")
    tick = Run.tick
    monkeypatch.setattr(Run, "tick", dies)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "recorded", "step")
    monkeypatch.setattr(Run, "tick", tick)
    train(tmp_path / "recorded", "off")
    outcome.assert_same(outcome.outcome(tmp_path / "plain"), outcome.outcome(tmp_path / "recorded"))
    lines = [json.loads(line) for line in (tmp_path / "recorded/log.jsonl").read_text().splitlines()]
    assert [line["graph/replayed"] for line in lines if "graph/replayed" in line][:3] == [0.0, 0.5, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", method_names())
def test_a_cuda_graph_replays_the_plain_run(name, monkeypatch):
    monkeypatch.setattr(blending, "PERIOD", 4)
    options, said = eventful_options(name), []
    plain = run(make_trainer(tiny_method(name, **options), device="cuda"), device="cuda")
    recorder = make_recorder(torch.device("cuda"))
    graph = run(make_trainer(tiny_method(name, **options), device="cuda"), recorder, said, device="cuda")
    assert said == []
    for (_, figures), (_, found) in zip(plain[0], graph[0], strict=True):
        assert figures == pytest.approx(found, rel=1e-3, abs=1e-4, nan_ok=True)  # atomic additions take any order
