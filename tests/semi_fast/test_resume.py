"""Which checkpoints are kept, and what is allowed, said and refused when a run goes on."""

import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from data_prep.work.builder import build_dataset
from semi_fast.run import resume
from semi_fast.run.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from semi_fast.run.run import Run
from semi_fast.train import cli, main
from tests.semi_fast.outcome import assert_same, need, outcome

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def arguments(data, run_dir, *more):
    small = ["steps=12", "batch=2", "log_every=4", "eval_every=4", "save_every=4", "wandb=off", "threads=1"]
    return ["digits_lt", f"data={data}", f"run_dir={run_dir}", "method=supervised", *small, *more]


def steps_of(folder):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


class KilledError(Exception):
    pass


@pytest.fixture
def until(monkeypatch):
    """Train until after `step` steps and what is due then, as if the process ended there."""

    def train(step, argv):
        original = Run.tick

        def tick(self, now, *rest):
            original(self, now, *rest)
            if now == step:
                raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(Run, "tick", tick)
            with pytest.raises(KilledError):
                main(argv)

    return train


@pytest.mark.parametrize("backend", ["resident", "ffcv", "dali"])
def test_every_back_end_goes_on_to_the_same_bits(tiny_folder, tmp_path, until, backend):
    need(backend)
    more = [f"data.backend={backend}", "method=semi", "log_every=3"]
    main(arguments(tiny_folder, tmp_path / "whole", *more))
    until(5, arguments(tiny_folder, tmp_path / "parts", *more))  # between two saves
    until(8, arguments(tiny_folder, tmp_path / "parts", *more))  # after one
    main(arguments(tiny_folder, tmp_path / "parts", *more))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))


def test_a_run_goes_on_within_and_between_stages_to_the_same_bits_and_counts_the_images_of_each(
    tiny_folder, tmp_path, until
):
    """Eight steps of 2 labeled images, then four of 8: 2 labeled, 2 weak and 4 strong ones."""
    options = ["labeled_share=0.66", "joint_rate=0.2", "teacher=averaged", "pseudo_labels=balanced", "tau=0.3"]
    more = ["method=semi", *(f"method.{option}" for option in options), "mu=1"]
    main(arguments(tiny_folder, tmp_path / "whole", *more))
    until(5, arguments(tiny_folder, tmp_path / "parts", *more))  # within the first
    until(9, arguments(tiny_folder, tmp_path / "parts", *more))  # goes on with the second
    main(arguments(tiny_folder, tmp_path / "parts", *more))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    last = {name: newest_checkpoint(tmp_path / name / "checkpoints").values for name in ("whole", "parts")}
    # Timed steps and their images: of each session all but the first.
    assert last["whole"]["timed"][::2] == [11, 7 * 2 + 4 * 8]
    assert last["parts"]["timed"][::2] == [9, 3 * 2 + 3 * 2 + 3 * 8]


def test_the_newest_and_the_best_are_kept(tmp_path):
    model = {"model": {"w": torch.ones(2)}}
    kept = []
    for step, score in enumerate([10.0, 30.0, None, 20.0, 30.0, None, 31.0, 5.0, None, None]):
        save_checkpoint(tmp_path, step, model, {}, score=score, keep=2)
        kept.append(steps_of(tmp_path))
    assert kept == [
        [0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9],
    ]  # fmt: skip
    assert best_checkpoint(tmp_path).name == "step-000000006"
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


def test_a_damaged_state_is_never_the_best_and_no_scores_give_none(tmp_path):
    model = {"model": {"w": torch.ones(2)}}
    path = save_checkpoint(tmp_path, 1, model, {}, score=99.0)
    save_checkpoint(tmp_path, 2, model, {}, score=1.0)
    (path / "state.json").write_text("{")
    assert best_checkpoint(tmp_path).name == "step-000000002"
    (tmp_path / "step-000000002/state.json").write_text("[]")
    assert best_checkpoint(tmp_path) is None


def test_checkpoints_of_an_abandoned_future_go_and_never_push_out_good_ones(tmp_path):
    for step in (4, 8):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {}, keep=1)
    save_checkpoint(tmp_path, 4, {"model": {"w": torch.ones(2)}}, {}, keep=3)
    (tmp_path / "step-000000004").rename(tmp_path / "step-000000009")
    (tmp_path / "step-000000009/model.safetensors").write_bytes(b"junk")
    save_checkpoint(tmp_path, 6, {"model": {"w": torch.ones(2)}}, {}, keep=1)
    assert newest_checkpoint(tmp_path).step == 6
    assert steps_of(tmp_path) == [6]


def test_a_run_saves_its_best_evaluation_even_between_two_saves(tiny_folder, tmp_path, monkeypatch):
    scores = iter([50.0, 70.0, 60.0, 65.0, 40.0, 30.0])
    original = Run._evaluate

    def scored(self, *rest, **more):
        better = original(self, *rest, **more)
        before = [entry["eval/accuracy"] for entry in self.history[:-1]]
        self.history[-1]["eval/accuracy"] = next(scores)
        assert isinstance(better, bool)
        return all(self.history[-1]["eval/accuracy"] > old for old in before)

    monkeypatch.setattr(Run, "_evaluate", scored)
    main(arguments(tiny_folder, tmp_path / "run", "eval_every=2", "save_every=5", "keep=1"))
    folder = tmp_path / "run/checkpoints"
    assert steps_of(folder) == [4, 12]
    assert best_checkpoint(folder).name == "step-000000004"
    state = json.loads((folder / "step-000000012/state.json").read_text())
    assert state["score"] == 30.0
    assert state["values"]["environment"].keys() >= {"torch", "numba", "numpy", "semi-fast", "threads", "processes"}


def test_what_has_changed_since_is_said(tiny_folder, tmp_path, monkeypatch, capsys, until):
    until(4, arguments(tiny_folder, tmp_path / "run"))
    true = resume.version
    monkeypatch.setattr(resume, "version", lambda name: "9.9" if name == "numba" else true(name))
    monkeypatch.setattr(resume, "VERSIONS", ("torch", "numba"))
    capsys.readouterr()
    main(arguments(tiny_folder, tmp_path / "run", "keep=3"))
    out = capsys.readouterr().out
    assert "changed since the checkpoint: numba 9.9, saved with 0." in out
    assert "; torch" not in out
    assert "not to the same bits" in out


def pretend_processes(folder, count):
    state = newest_checkpoint(folder / "checkpoints")
    path = list_checkpoints(folder / "checkpoints")[-1] / "state.json"
    content = json.loads(path.read_text())
    content["values"]["environment"]["processes"] = count
    path.write_text(json.dumps(content))
    assert load_checkpoint(path.parent).step == state.step


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "warning: a step now has 2 labeled images over all processes, and had 6 (3 x 2)"),
        (["batch=6"], ""),
    ],
)
def test_another_number_of_processes_is_allowed_and_said(tiny_folder, tmp_path, capsys, until, more, said):
    (tmp_path / "six.yaml").write_text("protocol: P-SIX\nbatch: 6\n")  # followed by one of the two runs alone
    more = [str(tmp_path / "six.yaml"), *more]
    until(4, arguments(tiny_folder, tmp_path / "run", more[0]))
    pretend_processes(tmp_path / "run", 3)
    capsys.readouterr()
    main(arguments(tiny_folder, tmp_path / "run", *more))
    out = capsys.readouterr().out
    assert "changed since the checkpoint: processes 1, saved with 3" in out
    assert said in out
    assert ("batch=6 keeps them" in out) == bool(said)
    assert "resumed at step 4" in out


def test_another_batch_with_as_many_processes_is_another_run(tiny_folder, tmp_path, until):
    until(4, arguments(tiny_folder, tmp_path / "run"))
    with pytest.raises(UserError, match="batch: now 6, saved 2"):
        main(arguments(tiny_folder, tmp_path / "run", "batch=6"))


def test_a_checkpoint_of_another_version_of_the_method_is_refused_in_one_line(tiny_folder, tmp_path, capsys, until):
    until(4, arguments(tiny_folder, tmp_path / "run"))
    found = newest_checkpoint(tmp_path / "run/checkpoints")
    found.tensors["model"].pop("heads.standard.bias")
    save_checkpoint(tmp_path / "run/checkpoints", 5, found.tensors, found.values)
    assert cli(arguments(tiny_folder, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: The checkpoint of step 5 does not fit this version of the method")
    assert "heads.standard.bias" in error
    assert error.count("\n") == 1


def test_data_that_changed_under_a_run_is_noticed_at_its_next_start(tmp_path, until):
    data, argv = tmp_path / "digits", arguments(tmp_path / "digits", tmp_path / "run")
    build_dataset("digits-lt", data, progress=False, say=lambda line: None)
    until(4, argv)
    shutil.rmtree(data)
    build_dataset("digits-lt", data, gamma_l="5", progress=False, say=lambda line: None)
    with pytest.raises(UserError, match=r"data\.path: .*digits does not hold the data the run was started with"):
        main(argv)
    with open(data / "train.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"train\.npy has .* bytes, the manifest says"):
        main(argv)
