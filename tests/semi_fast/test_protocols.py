"""Every protocol trains, says its name, and goes on from a checkpoint to the same bits."""

from __future__ import annotations

import shutil

import pytest

from semi_fast.config import CONFIGS, read_run_config
from semi_fast.run.checkpoint import list_checkpoints
from semi_fast.train import main
from tests.semi_fast.outcome import assert_same, outcome

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PROTOCOLS = sorted(path.stem for path in CONFIGS.glob("protocol_*.yaml"))


def arguments(protocol, data, run_dir):
    small = ["steps=8", "batch=2", "net=wrn10_1", "eval_every=4", "save_every=4", "log_every=4", "threads=1"]
    return [protocol, f"data={data}", f"run_dir={run_dir}", "method=fixmatch", *small, "wandb=off", "ceiling=off"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_trains_and_goes_on_to_the_same_bits(protocol, tiny_folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(arguments(protocol, tiny_folder, whole))
    name = f"P-{protocol.removeprefix('protocol_').upper()}"
    assert read_run_config(whole)["protocol"].startswith(f"{name} (changed: batch, ")

    shutil.copytree(whole, parts)  # as if the process had ended after step 4
    (parts / "summary.json").unlink()
    for path in list_checkpoints(parts / "checkpoints"):
        if path.name != "step-000000004":
            shutil.rmtree(path)
    assert len(list_checkpoints(parts / "checkpoints")) == 1
    main(arguments(protocol, tiny_folder, parts))
    assert_same(outcome(parts), outcome(whole))
