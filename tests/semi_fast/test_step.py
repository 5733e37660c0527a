"""A whole training step: no operation of it waits for the device, it keeps its dtypes, and it compiles once."""

from __future__ import annotations

import contextlib
import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from data_prep.errors import UserError
from data_prep.work.builder import build_dataset
from semi_fast.methods import method_names
from semi_fast.methods.base import compile_parts
from semi_fast.nets import build_net
from semi_fast.observe.health import Health
from semi_fast.parts.forward import forward_jointly
from semi_fast.run.run import Run
from semi_fast.train import main
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import (
    COUNTS,
    each_stage,
    tiny_batch,
    tiny_context,
    tiny_info,
    tiny_method,
    tiny_prepared,
    to_device,
)
from tests.semi_fast.whole_step import WholeStep

NEEDS = {"resident": None, "ffcv": "ffcv", "dali": "nvidia.dali"}


def endless(method, dtype=torch.float32):
    """Batches of made-up images; the unlabeled ones are rows 0..9."""
    for step in itertools.count():
        batch = tiny_batch(method, seed=step)
        yield batch._replace(images=batch.images.to(dtype))


def train_tiny(name, steps, *, dtype=torch.float32, method_options=None, **options):
    method = tiny_method(name, **(method_options or {}))
    step = WholeStep(method, endless(method), dtype=dtype, **options)
    return step, torch.stack([step(i) for i in range(steps)])


@pytest.fixture(scope="module")
def all_forms(tmp_path_factory):
    """The digits set in every form that some back end here reads."""
    folder = tmp_path_factory.mktemp("forms") / "digits-lt"
    formats = [name for name in ("ffcv", "dali") if available(name)]
    build_dataset("digits-lt", folder, formats=formats, progress=False, say=lambda line: None)
    return folder


def available(backend):
    needed = NEEDS[backend]
    return needed is None or (find_spec(needed.partition(".")[0]) is not None and find_spec(needed) is not None)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        # A back end meets a method in the views alone, of which SeMi has most: the other pairs are seldom news.
        pytest.param(name, backend, marks=[] if backend == "resident" or name == "semi" else pytest.mark.slow)
        for name in method_names()
        for backend in NEEDS
    ],
)
def test_no_step_of_the_trainers_own_loop_waits_for_the_device(all_forms, tmp_path, monkeypatch, name, backend):
    """The trap is set where the loop begins a step and lifted where it logs: all between is inside."""
    if not available(backend):
        pytest.skip(f"{backend} is not installed")
    trap, trapped = contextlib.ExitStack(), []

    def begin_stage(self, step, batches):
        batches = begin(self, step, batches)
        trap.enter_context(SyncTrap())
        trapped.append(step)
        return batches

    def tick(self, step):
        trap.close()
        end(self, step)

    begin, end = Run.begin_stage, Run.tick
    monkeypatch.setattr(Run, "begin_stage", begin_stage)
    monkeypatch.setattr(Run, "tick", tick)
    settings = ["steps=6", "batch=4", "log_every=2", "threads=1", "wandb=off", "ceiling=off", "precision=fp32"]
    try:
        with trap:
            main(["digits_lt", f"data={all_forms}", f"run_dir={tmp_path}/run", f"method={name}", *settings,
                  f"data.backend={backend}"])  # fmt: skip
    except UserError as error:
        if not str(error).startswith(f"The back end {backend} serves"):
            raise
        pytest.skip(str(error))
    assert trapped == list(range(6))


def test_the_trap_holds_over_a_whole_step(monkeypatch):
    """A log that is read within the step, as a careless method would: the trap must see it in this place, too."""
    step, _ = train_tiny("semi", 1)
    add = step.meter.add
    monkeypatch.setattr(step.meter, "add", lambda names, figures: add(names, figures * figures[0].item()))
    with pytest.raises(AssertionError, match="waits for the device"), SyncTrap():
        step(1)


@pytest.mark.parametrize("name", method_names())
def test_a_step_needs_no_value_on_the_host(name, monkeypatch):
    """On the meta device tensors have no values: whatever asks for one fails. All but the loaders, which read files."""
    method = tiny_method(name).to("meta")

    def on_meta():
        for batch in endless(method):
            yield to_device(batch, "meta")

    rows = np.arange(tiny_info().num_unlabeled)
    health = Health(COUNTS, np.zeros_like(rows), rows, torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device
    step = WholeStep(method, on_meta(), health=health, fused=False)
    for i in range(3):
        assert step(i).device.type == "meta"


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_must_be_float32_is_under_autocast(name, dtype):
    step, losses = train_tiny(name, 3, dtype=dtype)
    assert losses.dtype == torch.float32
    seen = []
    step.method.net.linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    objective, joints = step.method.objective, []
    step.method.objective = lambda joint, *rest: joints.append(joint) or objective(joint, *rest)
    step(3)
    assert set(seen) == {dtype}, "the network computes in half precision"
    for rows in (rows for views in joints[0].values() for rows in views.values()):
        assert {rows.features.dtype, *(x.dtype for x in rows.logits.values())} == {torch.float32}
        assert all((x != x.to(dtype).float()).any() for x in rows.logits.values()), "heads multiply in float32"
    assert {x.dtype for x in step.ema.average.values()} == {torch.float32}
    assert {p.dtype for p in step.method.parameters()} == {torch.float32}
    assert {x.dtype for x in step.method.buffers()} <= {torch.float32, torch.int64, torch.uint8}


def test_bank_confidences_are_those_of_a_float32_softmax():
    """bfloat16 has 8 bits: confidences computed in it would be multiples of 2^-8 near 1."""
    method = tiny_method("semi", tau=0.3)
    step = WholeStep(method, endless(method), dtype=torch.bfloat16)
    for i in range(3):
        step(i)
    stored = method.bank.confidences[method.bank.rows >= 0]
    assert len(stored) > 20
    assert ((stored * 256) % 1 != 0).float().mean() > 0.9


# bfloat16 keeps 8 bits: an activation is off by up to 2^-9 of itself, 0.2 %. Seen over 50 steps: a loss off by 0.2 % at
# most where no pseudo-label changes (supervised, FixMatch). Where one does, steps part: by 3 % in SeMi, by 30 % in
# DASO, which divides similarities by 0.05, and by 7 % in the mean over the steps; but the mean loss by 0.8 % at most.
MOST_APART = {"supervised": 0.01, "fixmatch": 0.01, "semi": 0.1}
# Options with which a loss has the same parts from the first step on, so that it falls where something is learned.
ALL_PARTS = {"tras": {"balanced_from": 0}, "bmb": {"unlabeled_from": 0}}


@pytest.mark.parametrize("name", method_names())
def test_bf16_and_fp32_runs_agree_over_50_steps(name):
    options = ALL_PARTS.get(name)
    (_, exact), (_, rounded) = (
        train_tiny(name, 50, dtype=dtype, method_options=options) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact[-10:].mean() < exact[:10].mean(), "it must have learned something"
    assert not torch.equal(rounded, exact)
    assert ((rounded - exact).abs() / exact).max() < MOST_APART.get(name, 1.0)
    assert (rounded - exact).abs().mean() / exact.mean() < 0.1
    assert rounded.mean() == pytest.approx(exact.mean().item(), rel=0.01)


def test_float16_with_loss_scaling_skips_what_overflows_and_goes_on():
    """The scaler starts far too high: the first updates overflow, are left out, and touch nothing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    method = tiny_method("semi")
    step = WholeStep(method, endless(method), dtype=torch.float16, scaler=scaler)
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    with SyncTrap():
        step(0)
    assert all(torch.equal(p, before[key]) for key, p in method.named_parameters())
    assert scaler.get_scale() == 2.0**39
    losses = torch.stack([step(i) for i in range(1, 60)])
    assert torch.isfinite(losses).all()
    assert scaler.get_scale() < 2.0**39
    assert not any(torch.equal(p, before[key]) for key, p in method.named_parameters())
    _, exact = train_tiny("semi", 60)
    assert losses[-20:].mean() == pytest.approx(exact[-20:].mean().item(), rel=0.2)
    assert len(step.trainer.guard.accept(1, step.meter.fetch())) == 60


# Dynamo looks at .grad of every input it wraps; inputs of the objective are results of the network, not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", method_names())
def test_every_objective_compiles_whole_and_never_again_within_a_stage(name):
    method = tiny_method(name)
    torch._dynamo.reset()  # forget what other tests compiled
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(method.objective, fullgraph=True, backend=counter)
    for stage in each_stage(method):
        frames = []
        for step in (0, 1, 2, 19, 20, 21, 300, 499):
            batch = tiny_batch(method, seed=step)
            batch, prepared = tiny_prepared(method, batch, tiny_context(step, stage=stage))
            joint = forward_jointly(method.net, method.heads, batch)
            compiled(joint, batch.labels, batch.rows, prepared).loss.backward()
            frames.append(counter.frame_count)
        assert 1 <= frames[0] <= stage + 1
        assert frames[-1] == frames[0], "it was compiled again"


@pytest.mark.parametrize(
    "name", ["wrn10_1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("wrn28_2", "resnet50"))]
)
def test_every_network_compiles_whole_and_never_again(name):
    net = build_net(name, bn_momentum=0.1, raw_transitions=False)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    frames = []
    for _ in range(4):
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
        compiled(x).sum().backward()
        frames.append(counter.frame_count)
    assert frames == [1] * 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", method_names())
def test_a_run_compiles_network_and_objective_once_each(name, monkeypatch):
    _, expected = train_tiny(name, 4)
    torch._dynamo.reset()
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    modes = []

    def counted(function, *, mode=None, dynamic=None):
        modes.append(mode)
        return compile_(function, backend=counter, fullgraph=True)

    monkeypatch.setattr(torch, "compile", counted)
    method = tiny_method(name)
    compile_parts(method, "max-autotune")
    step = WholeStep(method, endless(method))
    losses, frames = [], []
    for i in range(4):
        losses.append(step(i))
        frames.append(counter.frame_count)
    assert frames == [2] * 4
    assert modes == ["max-autotune", None]
    torch.testing.assert_close(torch.stack(losses), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", method_names())
def test_inductor_makes_the_same_losses(name):
    """The compiler of a real run, over network and objective; a few steps, since rounding grows."""
    _, expected = train_tiny(name, 5)
    method = tiny_method(name)
    torch._dynamo.reset()
    compile_parts(method, "default")
    step = WholeStep(method, endless(method))
    losses = torch.stack([step(i) for i in range(5)])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step(5)
