"""CReST: generations, what they add, the alignment, and the two forms of logit adjustment."""

import math

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods import build_method
from semi_fast.methods.crest import add_shares, select, target_distribution
from semi_fast.parts.alignment import MeanPrediction, align
from semi_fast.parts.forward import forward_jointly
from semi_fast.run.checkpoint import load_checkpoint
from semi_fast.run.run import Run
from semi_fast.training.look import RunLook
from tests.semi_fast.outcome import assert_same, outcome
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, TinyNet, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step
from tests.semi_fast.trained_runs import train

COUNTS_C10 = (500, 299, 179, 107, 64, 38, 23, 13, 8, 5)


class FakeLook:
    """Twenty unlabeled rows with logits given in advance."""

    labeled = torch.arange(100, 100 + sum(COUNTS))
    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(COUNTS))
    unlabeled = torch.arange(200, 220)

    def __init__(self, seed=0):
        self.given = torch.randn(20, CLASSES, generator=torch.Generator().manual_seed(seed))
        self.relabeled, self.restarts = None, 0

    def logits(self, rows):
        assert torch.equal(rows, self.unlabeled)
        return {"standard": self.given}

    def relabel(self, rows, labels):
        self.relabeled = rows, labels

    def restart(self):
        self.restarts += 1


def test_shares_added_and_targets_are_those_of_the_specification():
    shares = add_shares(COUNTS_C10, 3.0)
    expected = [0.2154, 0.2520, 0.2962, 0.3583, 0.4236, 0.5040, 0.5981, 0.7101, 0.8425, 1]
    assert shares == pytest.approx(expected, abs=6e-5)
    target = target_distribution(torch.tensor(COUNTS_C10), torch.tensor(0.5))
    expected = [0.2457, 0.1900, 0.1470, 0.1137, 0.0879, 0.0677, 0.0527, 0.0396, 0.0311, 0.0246]
    assert target.tolist() == pytest.approx(expected, abs=6e-5)


def test_classes_are_mirrored_by_rank_whatever_their_numbers():
    order = [3, 0, 4, 1, 2]
    sorted_shares = add_shares(COUNTS, 2.0)
    assert add_shares([COUNTS[k] for k in order], 2.0) == [sorted_shares[k] for k in order]


@pytest.mark.parametrize(("generations", "expected"), [(5, [1, 0.875, 0.75, 0.625, 0.5]), (1, [1.0])])
def test_the_exponent_falls_from_1_by_generation(generations, expected):
    method = tiny_method("crest", generations=generations)
    assert method.starts() == tuple(g / generations for g in range(generations))
    stages = [tiny_context(0)._replace(stage=g) for g in range(generations)]
    assert [method.inputs(tiny_batch(method), ctx).item() for ctx in stages] == pytest.approx(expected)


def test_alignment_is_that_of_the_specification():
    p, target, mean = (torch.tensor(x) for x in ([[0.7, 0.2, 0.1]], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]))
    assert align(p, target, mean)[0].tolist() == pytest.approx([0.5932, 0.2034, 0.2034], abs=6e-5)


def test_the_mean_prediction_goes_back_a_window_of_steps():
    mean, generator = MeanPrediction(3, 4), torch.Generator().manual_seed(0)
    history = [torch.full((3,), 1 / 3)] * 4
    for _ in range(7):
        torch.testing.assert_close(mean.read(), sum(history[-4:]) / 4)
        p = torch.rand(5, 3, generator=generator)
        mean.update(p)
        history.append(sum(p) / 5)
    mean.reset()
    assert mean.read().tolist() == pytest.approx([1 / 3] * 3)


def test_selection_takes_the_most_confident_of_each_predicted_class():
    p = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    shares = [0.3, 0.5, 1.0]
    expected = []
    for k in range(3):
        mine = [(float(p[n].max()), n) for n in range(50) if int(p[n].argmax()) == k]
        mine.sort(reverse=True)
        expected += [n for _, n in mine[: math.floor(len(mine) * shares[k])]]
    places, classes = select(p, shares)
    assert places.tolist() == sorted(expected)
    assert 0 < len(expected) < 50
    assert torch.equal(classes, p.argmax(1)[places])


def test_a_generation_joins_the_original_labels_with_the_newest_selection_alone():
    method = tiny_method("crest", logit_adjustment="train")
    tiny_step(method, tiny_batch(method), tiny_context(0))
    before = method.adjustment.prior.clone()
    first, second = FakeLook(0), FakeLook(1)
    method.begin(0, first)
    assert (first.relabeled, first.restarts) == (None, 0)
    assert torch.equal(method.adjustment.prior, before)
    for stage, look in ((1, first), (2, second)):
        method.begin(stage, look)
        places, classes = select(look.given.softmax(1), add_shares(COUNTS, 3.0))
        rows, labels = look.relabeled
        assert rows.tolist() == [*range(100, 118), *(200 + places).tolist()]
        assert labels.tolist() == [*look.labels.tolist(), *classes.tolist()]
        assert look.restarts == 1
        expected = [labels.tolist().count(k) / len(labels) for k in range(CLASSES)]
        assert method.adjustment.prior.tolist() == pytest.approx(expected)
        assert method.selected.tolist() == [classes.tolist().count(k) for k in range(CLASSES)]
        assert method.mean.read().tolist() == pytest.approx([1 / CLASSES] * CLASSES)
    other = tiny_method("crest", logit_adjustment="train")
    other.load_state_dict(method.state_dict())
    batch = tiny_batch(method)
    assert torch.equal(tiny_step(other, batch, tiny_context(9)).loss, tiny_step(method, batch, tiny_context(9)).loss)


def test_pseudo_labels_are_aligned_before_they_are_hardened():
    """Three steps, written out: p (pi^t / q-bar), normalized, with q-bar of the steps before."""
    method = tiny_method("crest", tau=0.4, window=2)
    pi, means = torch.tensor(COUNTS) / sum(COUNTS), [torch.full((CLASSES,), 1 / CLASSES)] * 2
    for step in range(3):
        batch, ctx = tiny_batch(method, seed=step), tiny_context(step)._replace(stage=2)
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)["unlabeled"]
        p = joint["weak"].logits["standard"].softmax(1)
        target, mean = pi**0.75 / (pi**0.75).sum(), (means[-1] + means[-2]) / 2
        aligned = [[float(a * (t + 1e-6) / (q + 1e-6)) for a, t, q in zip(row, target, mean, strict=True)] for row in p]
        total = 0.0
        for row, strong in zip(aligned, joint["strong"].logits["standard"], strict=True):
            if max(row) / sum(row) >= 0.4:
                total -= float(strong.log_softmax(0)[row.index(max(row))])
        out = tiny_step(method, batch, ctx)
        assert total > 0
        assert out.logs["loss/unlabeled"].item() == pytest.approx(total / len(p), rel=1e-4)
        means.append(p.mean(0))


def test_adjustment_in_training_is_by_the_expanded_set_and_alignment_by_the_original_one():
    """The row "FixMatch + LA w/ CReST+"."""
    method, plain = (tiny_method("crest", logit_adjustment=form, tau=0.4) for form in ("train", "off"))
    for one in (method, plain):
        one.begin(1, FakeLook(0))
    places, classes = select(FakeLook(0).given.softmax(1), add_shares(COUNTS, 3.0))
    joined = [count + classes.tolist().count(k) for k, count in enumerate(COUNTS)]
    assert len(places)
    for step in range(3):
        batch, ctx = tiny_batch(method, seed=step), tiny_context(step)._replace(stage=1)
        with torch.no_grad():
            logits = forward_jointly(method.net, method.heads, batch)["labeled"]["weak"].logits["standard"]
        slow = []
        for row, label in zip(logits.tolist(), batch.labels["labeled"].tolist(), strict=True):
            scores = [z + math.log(n / sum(joined)) for z, n in zip(row, joined, strict=True)]
            slow.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
        out, expected = (tiny_step(m, batch, ctx) for m in (method, plain))
        assert out.logs["loss/labeled"].item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)
        assert out.logs["loss/labeled"] != expected.logs["loss/labeled"]
        assert all(torch.equal(out.logs[key], expected.logs[key]) for key in out.logs if key != "loss/labeled")
    assert out.logs["pseudo/used"] > 0


def test_without_alignment_a_generation_is_fixmatch():
    method, fixmatch = tiny_method("crest", alignment=False, tau=0.45), tiny_method("fixmatch", tau=0.45)
    for step in range(3):
        batch = tiny_batch(method, seed=step)
        assert torch.equal(
            tiny_step(method, batch, tiny_context(step)).loss, tiny_step(fixmatch, batch, tiny_context(step)).loss
        )


def test_post_hoc_adjustment_follows_the_expanded_set():
    method = tiny_method("crest", logit_adjustment="posthoc").eval()
    method.begin(1, FakeLook())
    predictions = method.predict(torch.randn(3, 3, 4, 4))
    assert method.reported == "adjusted"
    torch.testing.assert_close(predictions["adjusted"], predictions["standard"] - method.adjustment.prior.log())


def test_a_single_class_is_refused():
    info = tiny_info()._replace(num_classes=1, labeled_counts=(18,))
    with pytest.raises(UserError, match=r"method=crest needs two classes or more, got 1\."):
        build_method("crest", TinyNet(), info)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "crest", window=4)
    assert not torch.equal(state["mean.recent"][-1], state["mean.recent"][0])


class KilledError(Exception):
    pass


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_killed_around_the_change_of_a_generation_goes_on_to_the_bit(digits, tmp_path, monkeypatch):
    options = ["method.generations=3", "method.logit_adjustment=train", "method.tau=0.2", "save_every=2", "keep=9"]

    def killed(name, patched, attribute, replacement):
        with monkeypatch.context() as patch:
            patch.setattr(patched, attribute, replacement)
            with pytest.raises(KilledError):
                train(tmp_path / name, digits, *options, method="crest", steps=9)
        return train(tmp_path / name, digits, *options, method="crest", steps=9)

    whole = train(tmp_path / "whole", digits, *options, method="crest", steps=9)
    labels = [load_checkpoint(whole / f"checkpoints/step-{n:09d}").tensors.get("labeled") for n in (2, 4, 8)]
    assert labels[0] is None
    assert len(labels[1]["rows"]) > 118
    assert not torch.equal(labels[1]["rows"], labels[2]["rows"])

    tick = Run.tick
    for step in (3, 5, 6):  # at the changes, and between them

        def dies_after(self, now, step=step):
            tick(self, now)
            if now == step:
                raise KilledError

        assert_same(outcome(killed(f"after{step}", Run, "tick", dies_after)), outcome(whole))

    def dies(self):
        raise KilledError

    assert_same(outcome(killed("within", RunLook, "restart", dies)), outcome(whole))
