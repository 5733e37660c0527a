"""Something is learned: every method on the digits set, and the same losses as ever."""

import json
import statistics
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from semi_fast.methods import method_names
from semi_fast.train import main
from tests.semi_fast.trained_runs import log_lines, train

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

EXPECTED = json.loads((Path(__file__).parent / "expected/losses.json").read_text())["runs"]
CHANCE = 10.0  # percent, of ten classes


@pytest.mark.parametrize("name", method_names())
def test_every_method_learns_within_150_steps(digits, tmp_path, name):
    run = train(
        tmp_path / "run", digits, "batch=16", "ema.decay=0.9", "log_every=10", "eval_every=150", method=name, steps=150
    )
    lines = log_lines(run)
    losses = [line["loss/labeled"] for line in lines if line["kind"] == "train"]
    # Some restart on the way, some change what the loss is divided by.
    share = 0.5 if name in EXPECTED else 0.75
    assert statistics.mean(losses[-2:]) < share * losses[0]
    (evaluation,) = (line for line in lines if line["kind"] == "eval")
    assert evaluation["eval/accuracy"] > 2 * CHANCE


@pytest.mark.parametrize("name", EXPECTED)
def test_a_method_has_the_losses_it_had_before_it_was_ported(digits, tmp_path, name):
    """Recorded at another commit, on one processor: there all 50 steps are equal to the bit.

    Another processor rounds otherwise, and training magnifies that: 1e-6 of the first losses, some per cent of the
    later ones. A change of method, order or random numbers shows in the first ten steps; SeMi's warm-up ends after two.
    """
    recorded = EXPECTED[name]
    small = ["log_every=1", "eval_every=50", "save_every=50", "precision=fp32", "compile=off", "ceiling=off"]
    more = ["report=off", "wandb=off", "threads=1", f"data={digits}", f"run_dir={tmp_path / 'run'}"]
    main([*recorded["settings"], *small, *more])
    losses = [line["loss/total"] for line in log_lines(tmp_path / "run") if line["kind"] == "train"]
    assert len(losses) == 50
    assert losses[:10] == pytest.approx(recorded["losses"][:10], rel=1e-3)
    assert losses == pytest.approx(recorded["losses"], rel=0.3)


@pytest.mark.slow
def test_semi_is_better_than_fixmatch_and_fixmatch_than_supervised(digits, tmp_path):
    """600 steps on the digits set as its settings file has them, the mean of three seeds."""
    accuracy = {}
    for name in ("supervised", "fixmatch", "semi"):
        runs = []
        for seed in range(3):
            AcceleratorState._reset_state(True)
            folder = tmp_path / f"{name}{seed}"
            argv = ["digits_lt", f"data={digits}", f"run_dir={folder}", f"method={name}", f"seed={seed}"]
            runs.append(main([*argv, "wandb=off", "report=off", "ceiling=off"]).figures["last"])
        accuracy[name] = statistics.mean(runs)
    print(accuracy)
    assert accuracy["supervised"] < accuracy["fixmatch"] < accuracy["semi"]
    assert accuracy["semi"] > 80
