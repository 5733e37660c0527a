"""What a run has computed, for comparing two of them to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from semi_fast.run.checkpoint import newest_checkpoint

# What a line of the log says of training, not of time.
FIGURES = ("loss/", "pseudo/", "bank/", "eval/", "validation/", "per_class")


def need(backend: str) -> None:
    """Skip the test where the packages of a back end are not installed."""
    module = {"ffcv": "ffcv", "dali": "nvidia.dali"}.get(backend)
    if module is not None:
        pytest.importorskip(module, reason=f"needs the extra {backend}", exc_type=ImportError)


def outcome(folder: Path) -> tuple[Any, ...]:
    """All that a run has computed: tensors, evaluations, and the lines of the log."""
    last = newest_checkpoint(folder / "checkpoints")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k.startswith((*FIGURES, "step", "kind"))} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return last.step, last.tensors, last.values["history"], figures, summary["confusion"]


def assert_same(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    """Of `outcome`s."""
    (step, tensors, *rest), (other_step, other_tensors, *other_rest) = one, two
    assert step == other_step
    assert rest == other_rest
    for group, named in tensors.items():
        assert named.keys() == other_tensors[group].keys()
        wrong = [name for name, tensor in named.items() if not torch.equal(tensor, other_tensors[group][name])]
        assert not wrong, f"{group}: {wrong}"
