"""A long run leaks nothing: memory, threads and file handles stay where they were."""

from typing import NamedTuple

import psutil
import pytest

from semi_fast.run.run import Run
from semi_fast.train import main

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
MB = 1 << 20


class Footprint(NamedTuple):
    """What a process holds of the machine."""

    step: int
    memory: int  # bytes resident
    threads: int
    handles: int


def footprints(monkeypatch, argv, every):
    """Train and measure this process after every so many steps, once what was due is done."""
    found, process, tick = [], psutil.Process(), Run.tick

    def measured(self, step, *rest):
        tick(self, step, *rest)
        if step % every == 0:
            found.append(Footprint(step, process.memory_info().rss, process.num_threads(), process.num_fds()))

    monkeypatch.setattr(Run, "tick", measured)
    main(argv)
    return found


@pytest.mark.parametrize(
    ("steps", "growth"), [pytest.param(20_000, 16 * MB, marks=pytest.mark.slow), pytest.param(500, 16 * MB)]
)
def test_memory_threads_and_handles_stay_flat(tiny_folder, tmp_path, monkeypatch, steps, growth):
    small = ["batch=2", "wandb=off", "threads=1", f"log_every={steps // 100}", f"steps={steps}"]
    often = [f"eval_every={steps // 20}", f"save_every={steps // 20}"]
    argv = ["digits_lt", f"data={tiny_folder}", f"run_dir={tmp_path / 'run'}", "net=wrn10_1", *small, *often]
    found = footprints(monkeypatch, argv, steps // 10)
    for footprint in found:
        print(f"step {footprint.step:>6,}: {footprint.memory / MB:,.1f} MB", *footprint[2:])
    settled = found[1:]  # the first tenth fills the caches
    assert max(f.memory for f in settled) - settled[0].memory < growth
    assert len({f.threads for f in settled}) == 1
    assert len({f.handles for f in settled}) == 1
