"""Stages of a run, and the trainer between two of them."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipelines.batch import Sizes, Stream
from semi_fast.observe.meter import Eta
from semi_fast.parts.groups import ParamGroup
from semi_fast.run.run import Run
from semi_fast.training.look import RunLook
from semi_fast.training.stages import Stage, Stages, images_left
from tests.semi_fast.tiny import tiny_batch, tiny_method
from tests.semi_fast.whole_step import WholeStep


def test_every_step_belongs_to_one_stage():
    stages = Stages((0.0, 0.5, 0.75), 100)
    assert [stages.at(step) for step in (0, 49, 50, 74, 75, 99, 100)] == [
        *[Stage(0, 0, 50)] * 2, *[Stage(1, 50, 25)] * 2, *[Stage(2, 75, 25)] * 3,
    ]  # fmt: skip
    assert Stages((0.0,), 7).at(3) == Stage(0, 0, 7)


def test_the_steps_and_images_that_are_left():
    stages = Stages((0.0, 0.5, 0.75), 100)
    left = {0: (50, 25, 25), 49: (1, 25, 25), 50: (0, 25, 25), 60: (0, 15, 25), 99: (0, 0, 1), 100: (0, 0, 0)}
    assert {step: tuple(stages.left(step).values()) for step in left} == left
    method = SimpleNamespace(idle=lambda stage: ("unlabeled",) if stage == 0 else ())
    streams = {"labeled": Stream("labeled", ("weak",)), "unlabeled": Stream("unlabeled", ("weak", "strong"))}
    sizes = Sizes(streams, batch=4, mu=2, world=2)
    assert images_left(method, sizes, stages, 0) == 50 * 8 + 50 * 40
    assert images_left(method, sizes, stages, 60) == 40 * 40
    run = SimpleNamespace(
        trainer=SimpleNamespace(method=method, stages=stages),
        data=SimpleNamespace(sizes=sizes),
        meter=SimpleNamespace(seconds_per_image=0.5),
        eta=Eta(100, {}),
    )
    assert Run._seconds_left(run, 40) == (10 * 8 + 50 * 40) * 0.5
    run.meter.seconds_per_image = None
    assert Run._seconds_left(run, 40) is None


def test_each_stage_of_a_short_run_has_a_step():
    stages = Stages((0.0, 0.78, 0.8), 6)
    assert [stages.at(step).number for step in range(6)] == [0, 0, 0, 0, 1, 2]
    stages = Stages((0.0, 0.01, 0.02), 6)
    assert [stages.at(step).number for step in range(6)] == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("starts", [(), (0.1,), (0.0, 0.5, 0.5), (0.0, 0.7, 0.3), (0.0, 1.0)])
def test_stages_that_do_not_ascend_from_0_are_a_mistake_of_the_method(starts):
    with pytest.raises(ValueError, match="must start at 0 and ascend below 1"):
        Stages(starts, 100)


def test_a_run_too_short_for_its_stages_is_said_in_one_line():
    with pytest.raises(UserError, match=r"steps=3 is too few for the 4 stages of the method\."):
        Stages((0.0, 0.25, 0.5, 0.75), 3)


def endless(method):
    while True:
        yield tiny_batch(method)


def test_step_epoch_and_progress_are_those_of_the_stage_and_draws_are_of_the_run():
    method = tiny_method("fixmatch")
    method.starts = lambda: (0.0, 0.5)
    trainer = WholeStep(method, endless(method)).trainer
    first = trainer.context(10)
    draws = torch.rand(3, generator=first.generator)
    assert (first.step, first.epoch, first.progress, first.stage) == (10, 100, 0.2, 0)
    second = trainer.context(60)
    assert (second.step, second.epoch, second.progress, second.stage) == (10, 100, 0.2, 1)
    assert not torch.equal(torch.rand(3, generator=second.generator), draws)
    assert torch.equal(torch.rand(3, generator=trainer.context(10).generator), draws)
    assert trainer.learning_rate(60) == trainer.learning_rate(10) < trainer.learning_rate(50)


def test_the_averaged_network_takes_no_gradient_and_changes_nothing():
    method = tiny_method("fixmatch")
    step = WholeStep(method, endless(method))
    for i in range(3):
        step(i)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    features = step.trainer.averaged(tiny_batch(method).images)
    assert not features.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    averaged = step.ema.state_dict()
    mean, var = method.net.norm.running_mean, method.net.norm.running_var
    hidden = tiny_batch(method).images.flatten(1) @ averaged["net.linear.weight"].T + averaged["net.linear.bias"]
    expected = (hidden - mean) / (var + 1e-5).sqrt() * averaged["net.norm.weight"] + averaged["net.norm.bias"]
    torch.testing.assert_close(features, expected)


def test_a_restart_puts_weights_averages_and_optimizer_back():
    method = tiny_method("semi")
    step = WholeStep(method, endless(method))
    for i in range(5):
        step(i)
    pushed = method.bank.pushed.clone()
    fresh = tiny_method("semi")
    step.trainer.restart(5, fresh)
    state = method.state_dict()
    for key, value in fresh.state_dict().items():
        if key.startswith(("net.", "heads.")):
            assert torch.equal(state[key], value), key
    assert all(torch.equal(step.ema.average[key], value) for key, value in fresh.named_parameters())
    assert all(not x.any() for states in step.optim.state.values() for x in states.values())
    assert torch.equal(method.bank.pushed, pushed), "statistics are the method's to reset"
    assert step.trainer.restarted == 5


def staged(*groups, **options):
    """A trainer of a method with these groups in its stages."""
    method = tiny_method("fixmatch")
    method.starts = lambda: tuple(i / len(groups) for i in range(len(groups)))
    method.groups = lambda stage: groups[stage]
    return WholeStep(method, endless(method), **options)


def frozen(step):
    return {name for name, parameter in step.method.named_parameters() if not parameter.requires_grad}


def test_what_is_frozen_in_one_stage_trains_in_the_next_with_and_without_a_restart():
    for restarts in (False, True):
        step = staged((ParamGroup("net", frozen=True),), (), (ParamGroup("heads", frozen=True),), ())
        seen = []
        for stage in range(4):
            if restarts:
                step.trainer.restart(25 * stage, tiny_method("fixmatch"))
            step.trainer.regroup(stage)
            step(25 * stage)
            seen.append({name.partition(".")[0] for name in frozen(step)})
        assert seen == [{"net"}, set(), {"heads"}, set()]


def test_the_longest_prefix_decides_about_the_mode_of_a_batchnorm_too():
    step = staged((ParamGroup("net", frozen=True), ParamGroup("net.norm"), ParamGroup("net.linear.bias", 0.5)))
    step.trainer.regroup(0)
    assert frozen(step) == {"net.linear.weight"}
    assert step.method.net.norm.training
    assert not step.method.net.linear.training
    step = staged((ParamGroup("net.norm", frozen=True),))
    step.trainer.regroup(0)
    before = step.method.net.norm.running_var.clone()
    step(0)
    assert torch.equal(step.method.net.norm.running_var, before)


def test_a_method_may_change_labels_and_weights_at_the_beginning_of_a_stage_alone():
    step = staged(())
    data = SimpleNamespace(labeled=(np.arange(3), np.arange(3)), unlabeled_rows=np.arange(4), relabel=lambda *_: None)
    look = RunLook(step.trainer, data, 0, lambda: tiny_method("fixmatch"), nullcontext)
    for change in (look.restart, lambda: look.relabel(torch.arange(2), torch.arange(2))):
        with pytest.raises(RuntimeError, match="belongs to the beginning of a stage"):
            change()
    look.step = 7
    look.relabel(torch.arange(2), torch.arange(2))
    look.restart()
    assert look.relabeled
    assert step.trainer.restarted == 7
