"""Measuring the ceiling leaves no trace: weights, buffers, gradients, modes and random numbers stay to the bit."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from semi_fast.config import OptimSettings
from semi_fast.nets import build_net
from semi_fast.observe import ceiling
from semi_fast.observe.ceiling import measure_ceiling
from semi_fast.run.run import Run
from tests.semi_fast.tiny import CLASSES, TinyNet, tiny_method

IMAGES = torch.randn(26, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training):
    method = tiny_method("semi").train(training)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    images, random = IMAGES.clone(), torch.get_rng_state()
    assert measure_ceiling(method.net, CLASSES, IMAGES, OptimSettings(), nullcontext) > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert torch.equal(images, IMAGES)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training is training for module in method.modules())


@pytest.mark.parametrize(("seconds", "timed"), [(20.0, 1), (0.5, 1), (0.1, 5), (0.01, 10)])
def test_a_slow_machine_pays_for_two_steps(monkeypatch, seconds, timed):
    now, forwards = [0.0], []

    class Slow(TinyNet):
        def forward(self, x):
            now[0] += seconds
            forwards.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(ceiling.time, "perf_counter", lambda: now[0])
    rate = measure_ceiling(Slow(), CLASSES, IMAGES, OptimSettings(), nullcontext)
    assert forwards == [26] * (1 + timed), "an untimed step first"
    assert rate == pytest.approx(26 / seconds)


def test_a_compiled_network_is_compiled_for_the_ceiling_too(monkeypatch):
    net, calls = build_net("wrn10_1", bn_momentum=0.1), []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: calls.append((type(self), mode)))
    measure_ceiling(net, CLASSES, torch.randn(6, 3, 16, 16), OptimSettings(), nullcontext, compiled="default")
    assert calls == [(type(net), "default")]


@pytest.mark.parametrize(
    ("kind", "compiled", "evaluations", "wanted"),
    [("cuda", True, 20, True), ("cuda", True, 19, False), ("cuda", False, 20, False), ("cpu", True, 20, False)],
)
def test_a_run_forgets_the_peak_of_the_ceiling_and_compiles_many_evaluations(
    monkeypatch, kind, compiled, evaluations, wanted
):
    done = []
    monkeypatch.setattr("semi_fast.run.run.measure_ceiling", lambda *_, **__: done.append("ceiling") or 1.0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("forgotten"))
    monkeypatch.setattr(torch, "compile", lambda predict, **options: (predict, options))
    method = SimpleNamespace(weights="averaged", net=None, statistics=dict)
    averaged = SimpleNamespace(predict=object())
    run = SimpleNamespace(
        settings=SimpleNamespace(
            ceiling="on", optim=None, compile=SimpleNamespace(mode="default"), steps=7 * evaluations, eval_every=7
        ),
        accel=SimpleNamespace(device=torch.device(kind), autocast=None),
        data=SimpleNamespace(sizes=SimpleNamespace(streams={}, labeled_per_step=1)),
        trainer=SimpleNamespace(method=method),
        meter=SimpleNamespace(restart=lambda: done.append("started")),
        info=SimpleNamespace(num_classes=3),
        predict=None,
        main=False,
        say=lambda line: None,
        _images=lambda: None,
        _weights=lambda: {"averaged": averaged, "raw": method},
    )
    Run.watch(run, compiled)
    assert done == (["ceiling", "forgotten", "started"] if kind == "cuda" else ["ceiling", "started"])
    shapes = (averaged.predict, {"dynamic": False})
    assert run.predict == (shapes if wanted else None)
