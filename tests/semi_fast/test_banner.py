"""What a run says of its settings before it starts, and the help text."""

from __future__ import annotations

import pytest

from semi_fast.config import OptimSettings
from semi_fast.observe.banner import help_text, optimizer_line


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "sgd: lr 0.03 cosine_7_16, Nesterov momentum 0.9, weight decay 0.0005"),
        ({"name": "muon"}, "muon: lr 0.03 cosine_7_16, Nesterov momentum 0.9, weight decay 0.0005"),
        ({"nesterov": False, "weight_decay": 0.0}, "sgd: lr 0.03 cosine_7_16, momentum 0.9, weight decay 0.0"),
        (
            {"name": "adam", "lr": 0.002, "schedule": "constant", "weight_decay": 0.0, "shrink": 0.02},
            "adam: lr 0.002 constant, first beta 0.9, weight decay 0.0, shrink 0.02",
        ),
        (
            {"schedule": "milestones", "milestones": [[0.8, 0.01]], "warmup": 0.025, "decay_all": True},
            "sgd: lr 0.03 milestones [[0.8, 0.01]], warm-up over 2.5% of the steps, Nesterov momentum 0.9, "
            "weight decay 0.0005 on biases and BatchNorm, too",
        ),
    ],
)
def test_the_optimizer_s_line_says_what_has_an_effect(settings, line):
    assert optimizer_line(OptimSettings(**settings)) == line


def test_help_tells_protocols_from_data():
    lines = help_text("").splitlines()
    (files,) = (line for line in lines if line.startswith("Setting files: "))
    (protocols,) = (line for line in lines if line.startswith("Protocols"))
    assert "cifar10_lt" in files
    assert "protocol" not in files
    names = ["acr", "adam", "crest", "daso", "fast", "finetune", "usb"]
    assert ", ".join(f"protocol_{name}" for name in names) in protocols
    assert any(line.startswith("  optim.milestones=[] ") for line in lines)
    assert any(line.startswith("  ema.buffers=copied ") for line in lines)
