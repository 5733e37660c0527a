"""Some steps of a method on features and logits given in advance, by one process or by two with half of each batch.

python -m tests.semi_fast.shared_steps NAME OPTIONS RANK FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semi_fast.parts.forward import Rows
from tests.conftest import ROOT
from tests.semi_fast.tiny import CLASSES, FEATURES, tiny_batch, tiny_context, tiny_method

LABELED, UNLABELED, STEPS = 6, 12, 6


def state_after_steps(name: str, options: dict[str, Any], rank: int, world: int) -> dict[str, Tensor]:
    """A method's buffers, all but the network's, after six late steps on this rank's share of the same batches."""

    def mine(x: Tensor) -> Tensor:
        return x[:, rank * x.shape[1] // world : (rank + 1) * x.shape[1] // world].flatten(0, 1)

    def rows(count: int, views: int) -> Rows:
        features, *logits = (
            mine(torch.randn(views, count, size, generator=generator) * 2)
            for size in (FEATURES, *(CLASSES for _ in method.heads))
        )
        return Rows(features, dict(zip(method.heads, logits, strict=True)))

    method = tiny_method(name, **options)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        joint = {
            stream: {view: rows(count, views.count(view)) for view in dict.fromkeys(views)}
            for stream, count in (("labeled", LABELED), ("unlabeled", UNLABELED))
            for views in (method.streams[stream].views,)
        }
        labels = mine(torch.randint(CLASSES, (1, LABELED), generator=generator))
        numbers = {
            stream: mine(torch.randint(20, (1, count), generator=generator))
            for stream, count in (("labeled", LABELED), ("unlabeled", UNLABELED))
        }
        batch = tiny_batch(method, labeled=LABELED // world, unlabeled=UNLABELED // world)
        averaged = lambda images, rows=joint["labeled"]["weak"]: rows.features  # noqa: E731
        _, prepared = method.prepare(batch, method.inputs(batch, tiny_context(300 + step)), averaged)
        method.objective(joint, {"labeled": labels}, numbers, prepared)
    return {key: value for key, value in method.named_buffers() if not key.startswith("net.")}


def assert_two_processes_keep_the_state_of_one(folder: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Run two processes, and compare both with one: counts equal, floats up to rounding. Returns the state."""
    command = [sys.executable, "-m", "tests.semi_fast.shared_steps", name, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), str(folder)], cwd=ROOT, env=environment) for r in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    first, second = (torch.load(folder / f"{r}.pt") for r in range(2))
    alone = state_after_steps(name, options, 0, 1)
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, msg=key)
    return alone


def main() -> None:
    name, options, rank, folder = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(state_after_steps(name, options, rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
