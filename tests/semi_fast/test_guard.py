"""The guard: what is not finite ends the run or costs one step that leaves no trace; nothing waits for the device."""

import pytest
import torch

from semi_fast.config import EmaSettings, OptimSettings
from semi_fast.methods import method_names
from semi_fast.observe.meter import Meter
from semi_fast.observe.stopwatch import Stopwatch
from semi_fast.training.ema import Ema
from semi_fast.training.guard import MOST_IN_A_ROW, DivergedError, Guard, first_of, not_finite
from semi_fast.training.optim import build_optimizer
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import tiny_batch, tiny_context, tiny_method, tiny_step
from tests.semi_fast.whole_step import add

GOOD, NAN, INF = torch.tensor(1.0), float("nan"), float("inf")


class Loop:
    """The training loop around a tiny method, with a fault put in where asked."""

    def __init__(self, policy, name="semi", optimizer=lambda method: build_optimizer(method, OptimSettings(lr=0.1))):
        self.method = tiny_method(name)
        self.optimizer = optimizer(self.method)
        self.guard = Guard(policy, self.method, self.optimizer)
        self.meter = Meter(Stopwatch(torch.device("cpu")), 1, 1)

    def step(self, number, loss_fault=None, gradient_fault=None):
        self.guard.begin_step()
        out = tiny_step(self.method, tiny_batch(self.method, seed=number), tiny_context(300 + number))
        loss = out.loss if loss_fault is None else out.loss * loss_fault
        loss.backward()
        if gradient_fault is not None:
            self.method.heads.standard.weight.grad.view(-1)[3] = gradient_fault
        logs = self.guard.judge(loss, out.logs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        add(self.meter, loss, logs)

    def read(self):
        return self.meter.close(self.guard.accept(self.meter.step + 1, self.meter.fetch()))

    def state(self):
        state = {name: tensor.clone() for name, tensor in self.method.state_dict().items()}
        for name, parameter in self.method.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                state[f"{key} of {name}"] = value.clone()
        return state


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_first_tensor_with_a_fault_is_found_and_large_values_are_none():
    tensors = [torch.full((4,), 3e38), torch.tensor(-1e-40), torch.ones(2, 3)]
    assert first_of(not_finite(tensors)).item() == -1
    for value in (NAN, INF, -INF):
        tensors[1:] = [torch.tensor([0.0, value, 1.0]), torch.tensor([value])]
        assert first_of(not_finite(tensors)).item() == 1


@pytest.mark.parametrize("fault", [NAN, INF])
def test_a_diverged_loss_names_step_and_part(fault):
    loop = Loop("stop")
    loop.meter.step = 10
    for value in (1.0, fault):
        part, total = torch.tensor(value), GOOD + value
        add(loop.meter, total, loop.guard.judge(total, {"loss/labeled": GOOD, "loss/ea": part}))
    with pytest.raises(DivergedError, match=r"loss is not finite at step 12: loss/ea = (nan|inf)\.") as caught:
        loop.read()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [NAN, INF, -INF])
def test_a_diverged_gradient_names_step_and_parameter(fault):
    loop = Loop("stop")
    loop.step(0)
    loop.step(1, gradient_fault=fault)
    with pytest.raises(
        DivergedError, match=r"gradient of heads\.standard\.weight is not finite at step 2 \(the loss is\)"
    ):
        loop.read()


def test_other_figures_may_be_infinite_and_verdicts_are_not_logged():
    loop = Loop("stop")
    add(loop.meter, GOOD, loop.guard.judge(GOOD, {"bank/lowest": torch.tensor(INF)}))
    figures = loop.read()
    assert (figures["loss/total"], figures["bank/lowest"]) == (1.0, INF)
    assert not [name for name in figures if name.startswith("guard/")]


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("fault", [{"loss_fault": NAN}, {"loss_fault": INF}, {"gradient_fault": NAN}])
@pytest.mark.parametrize("at", [0, 2])
def test_a_skipped_step_leaves_no_trace(name, fault, at):
    loop = Loop("skip", name)
    for number in range(at):
        loop.step(number)
    before = loop.state()
    loop.step(at, **fault)
    assert same(loop.state(), before)
    loop.step(at + 1)
    assert not same(loop.state(), before)
    assert all(x.isfinite().all() for x in loop.state().values())
    figures = loop.read()
    assert loop.guard.skipped == 1
    assert loop.meter.step == at + 2
    means = [value for name, value in figures.items() if name.startswith(("loss/", "pseudo/"))]
    assert means
    assert all(-1 < value < 100 for value in means), "over the steps that counted"


OPTIMIZERS = {
    "sgd": lambda method: torch.optim.SGD(method.parameters(), 0.1, 0.9, fused=True),
    "adam": lambda method: torch.optim.Adam(method.parameters(), 0.01, fused=True),
    "adamw": lambda method: torch.optim.AdamW(method.parameters(), 0.01, fused=True, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_fused_optimizer_leaves_a_step_out(name):
    one, two = (Loop(policy, "fixmatch", OPTIMIZERS[name]) for policy in ("skip", "stop"))
    for number in range(3):
        one.step(number)
        two.step(number)
        if number == 1:
            before = one.state()
            one.step(17, gradient_fault=INF)
            assert same(one.state(), before), "moments and step numbers too"
    assert same(one.state(), two.state())


def test_what_changed_between_two_steps_outlives_a_skipped_one():
    loop = Loop("skip", "supervised")
    loop.step(0)
    loop.method.net.norm.running_var.mul_(0.5)  # as an optimizer does that shrinks statistics, or a new stage
    before = loop.state()
    loop.step(1, loss_fault=NAN)
    assert same(loop.state(), before)


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_frozen_parameters_have_no_gradient_to_judge(policy):
    loop = Loop(policy, "fixmatch")
    loop.method.net.requires_grad_(False)
    before = loop.method.net.linear.weight.clone()
    loop.step(0)
    assert loop.read()["loss/total"] > 0
    assert torch.equal(loop.method.net.linear.weight, before)
    loop.guard.check_weights(1, Ema(loop.method, EmaSettings(decay=0.9)))
    loop.step(1, gradient_fault=NAN)
    if policy == "stop":
        with pytest.raises(DivergedError, match=r"gradient of heads\.standard\.weight is not finite at step 2"):
            loop.read()
    else:
        assert loop.read().keys() >= {"throughput/images_per_s"}
        assert loop.guard.skipped == 1


def test_going_on_after_a_skipped_step_is_as_if_it_had_not_been():
    one, two = Loop("skip"), Loop("stop")
    for number in (0, 1, 2, 3):
        one.step(number)
        if number == 1:
            one.step(17, loss_fault=NAN)
        two.step(number)
    assert same(one.state(), two.state())


def test_skipping_without_end_is_an_error():
    loop = Loop("skip", "supervised")
    loop.step(0)
    for number in range(1, MOST_IN_A_ROW):
        loop.step(number, loss_fault=NAN)
    loop.read()
    loop.step(MOST_IN_A_ROW)  # a good one: the count begins anew
    for number in range(MOST_IN_A_ROW):
        loop.step(number, loss_fault=NAN)
    with pytest.raises(DivergedError, match=rf"{MOST_IN_A_ROW} steps in a row were skipped, 199 in all"):
        loop.read()


def test_an_overflowing_scaled_gradient_is_the_scalers_business_but_not_for_ever():
    loop = Loop("stop")
    guard = Guard("stop", loop.method, loop.optimizer, scaled=True)
    row = {"loss/total": 1.0, "guard/loss": 0.0, "guard/gradient": 2.0}
    assert guard.accept(1, [row]) == [{"loss/total": 1.0}]
    assert guard.skipped == 1
    guard.accept(2, [row] * (MOST_IN_A_ROW - 2))
    with pytest.raises(DivergedError, match="100 steps in a row were skipped"):
        guard.accept(MOST_IN_A_ROW, [row])
    with pytest.raises(DivergedError, match="loss is not finite"):
        guard.accept(1, [{"loss/total": NAN, "guard/loss": 1.0, "guard/gradient": 2.0}])


@pytest.mark.parametrize("where", ["parameter", "average", "statistic"])
def test_weights_that_are_not_finite_are_not_kept(where):
    loop = Loop("stop")
    ema = Ema(loop.method, EmaSettings(decay=0.9))
    loop.guard.check_weights(5, ema)
    target, name = {
        "parameter": (loop.method.net.linear.weight.data, "net.linear.weight"),
        "average": (ema.average["heads.standard.bias"], "the average of heads.standard.bias"),
        "statistic": (loop.method.net.norm.running_var, "net.norm.running_var"),
    }[where]
    target.view(-1)[0] = INF
    with pytest.raises(DivergedError, match=f"weights are not finite after step 5: {name}"):
        loop.guard.check_weights(5, ema)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("name", method_names())
def test_judging_never_waits_for_the_device(policy, name):
    loop = Loop(policy, name)
    loop.step(0)
    out = tiny_step(loop.method, tiny_batch(loop.method, seed=1), tiny_context(301))
    out.loss.backward()
    with SyncTrap():
        loop.guard.begin_step()
        loop.guard.judge(out.loss, out.logs)
        loop.optimizer.step()


def test_an_optimizer_that_cannot_mask_its_step_is_refused():
    method = tiny_method("supervised")
    with pytest.raises(TypeError, match="needs a fused optimizer, got SGD"):
        Guard("skip", method, torch.optim.SGD(method.parameters(), lr=0.1, fused=False))


def test_a_first_step_that_is_skipped_leaves_the_momentum_zero():
    loop = Loop("skip", "supervised")
    loop.step(0, loss_fault=NAN)
    assert all(not state["momentum_buffer"].any() for state in loop.optimizer.state.values())
