"""SEVAL: the fits of offsets and thresholds, how they enter the pseudo-labels, and the replay of a finished run."""

import math
import shutil

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from data_prep.errors import UserError
from semi_fast.methods import build_method
from semi_fast.methods.base import EPOCHS
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.seval_fit import fit_offsets, fit_thresholds, group_of_class
from semi_fast.run.checkpoint import list_checkpoints, load_checkpoint
from tests.semi_fast.tiny import CLASSES, TinyNet, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step
from tests.semi_fast.trained_runs import copy_of, train

COUNTS = (60, 40, 30, 24, 20)


def balanced_loss(logits, labels, offsets):
    """(1/K) sum_k mean over class k of CE(z - ln o, k), image by image."""
    of_class = [[] for _ in range(logits.shape[1])]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scores = [z - math.log(o) for z, o in zip(row, offsets, strict=True)]
        of_class[label].append(math.log(sum(math.exp(s) for s in scores)) - scores[label])
    return sum(sum(values) / len(values) for values in of_class) / len(of_class)


def held_out(seed=0, n=120, classes=4, bias=(1.5, 0.5, -0.5, -1.5), strength=1.5):
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), generator.integers(0, classes, n - classes)])
    logits = generator.normal(0, 1, (n, classes)) + np.array(bias)
    logits[np.arange(n), labels] += strength
    return logits, labels


@pytest.mark.parametrize("bias", [(0.6, 0.2, -0.2, -0.6), (1.5, 0.5, -0.5, -1.5)])
def test_offsets_minimize_the_class_balanced_loss(bias):
    logits, labels = held_out(bias=bias)
    offsets = fit_offsets(logits, labels)
    slow = minimize(
        lambda b: balanced_loss(logits, labels, np.exp(b)), np.zeros(4), method="Nelder-Mead",
        options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 4000, "maxfev": 4000},
    )  # fmt: skip
    assert balanced_loss(logits, labels, offsets) == pytest.approx(slow.fun, abs=1e-6)
    logarithms, expected = np.log(offsets), slow.x - slow.x.mean()
    assert logarithms - logarithms.mean() == pytest.approx(expected, abs=2e-3)
    # Of mean 0 where that leaves all below 3.
    assert logarithms.mean() == pytest.approx(min(0.0, math.log(3) - expected.max()), abs=2e-3)
    assert (offsets.max() == 3.0) == (bias[0] == 1.5)
    assert offsets[0] > offsets[-1], "classes that the network favours are taken back"


def test_offsets_keep_their_bounds_where_the_held_out_images_say_nothing_else():
    labels = np.array([0, 0, 1, 1])
    logits = np.array([[9.0, 0.0], [8.0, 0.0], [9.0, 0.0], [9.0, 1.0]])  # class 1 is never seen to be it
    offsets = fit_offsets(np.concatenate([logits, logits]), np.concatenate([labels, labels]))
    assert 0.001 <= offsets.min() < offsets.max() <= 3.0


def slow_thresholds(logits, labels, weights, groups, precision):
    classes = logits.shape[1]
    size = math.ceil(classes / groups)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted, confidence = p.argmax(1), p.max(1)
    thresholds, rare = [], []

    def reached(group, tau):
        mine = [i for i in range(len(labels)) if predicted[i] // size == group and confidence[i] > tau]
        right = sum(weights[i] for i in mine if predicted[i] == labels[i])
        return right / sum(weights[i] for i in mine) if mine else math.nan

    for k in range(classes):
        g = k // size
        weight = sum(weights[i] for i in range(len(labels)) if predicted[i] // size == g)
        few = sum(label // size == g for label in labels) < 10
        rare.append(bool(few or weight <= sum(weights) / (10 * groups)))
        if rare[-1] or reached(g, 0.0) >= precision:
            thresholds.append(0.0)
            continue
        tried = sorted({0.0, *(confidence[i] for i in range(len(labels)) if predicted[i] // size == g)})
        distance = {tau: abs(reached(g, tau) - precision) for tau in tried if not math.isnan(reached(g, tau))}
        thresholds.append(min(distance, key=lambda tau: (round(distance[tau], 12), tau)))
    return thresholds, rare


@pytest.mark.parametrize(("groups", "precision"), [(4, 0.8), (2, 0.75), (2, 0.3), (3, 0.9)])
def test_thresholds_are_those_of_the_plain_search(groups, precision):
    for seed in range(4):
        logits, labels = held_out(seed, bias=(1.0, 0.4, -0.2, -4.0), strength=0.8)
        logits = logits.round(1)  # so that some confidences are equal
        weights = np.array([1.0, 2.0, 3.0, 5.0])[labels]
        thresholds, rare = fit_thresholds(logits, labels, weights, groups, precision)
        expected, expected_rare = slow_thresholds(logits, labels, weights.tolist(), groups, precision)
        assert thresholds == pytest.approx(expected, abs=1e-12)
        assert rare.tolist() == expected_rare


def test_a_group_that_is_hardly_predicted_or_hardly_there_is_rare():
    logits, labels = held_out(bias=(1.0, 0.4, -0.2, -9.0))
    _, rare = fit_thresholds(logits, labels, np.ones(len(labels)), 4, 0.8)
    assert rare.tolist() == [False, False, False, True]
    few = labels != 1
    few[:4] = True
    _, rare = fit_thresholds(logits[few], labels[few], np.ones(few.sum()), 4, 0.8)
    assert rare[1]


def test_groups_of_classes_follow_one_another():
    assert group_of_class(10, 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert np.bincount(group_of_class(127, 10)).tolist() == [13] * 9 + [10]
    assert group_of_class(3, 5).tolist() == [0, 1, 2]


class FakeLook:
    """Labeled rows 0..173, whose logits favour their class and the head."""

    labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(COUNTS))
    labeled = torch.arange(500, 500 + sum(COUNTS))
    unlabeled = torch.arange(20)

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.given = torch.randn(sum(COUNTS), CLASSES, generator=generator) + torch.tensor([2.0, 1, 0, -1, -2])
        self.given += 1.5 * torch.nn.functional.one_hot(self.labels, CLASSES)
        self.relabeled, self.restarts = [], 0

    def restart(self):
        self.restarts += 1

    def logits(self, rows):
        return {"standard": self.given[rows - 500]}

    def relabel(self, rows, labels):
        self.relabeled.append((rows, labels))


def method_of(**options):
    torch.manual_seed(0)
    info = tiny_info()._replace(labeled_counts=COUNTS, num_labeled=sum(COUNTS))
    return build_method("seval", TinyNet(), info, **options)


def test_half_of_each_class_is_held_out_and_fitted_to_at_every_evaluation():
    method, look = method_of(offset_decay=0.6, threshold_decay=0.7, groups=5, precision=0.6), FakeLook()
    method.begin(0, look)
    ((rows, labels),) = look.relabeled
    assert torch.bincount(labels).tolist() == [30, 20, 15, 12, 10]
    held = torch.ones(sum(COUNTS), dtype=torch.bool)
    held[rows - 500] = False
    logits, held_labels = look.given[held].double().numpy(), look.labels[held].numpy()
    offsets, thresholds = np.ones(CLASSES), np.full(CLASSES, 0.95)
    weights = np.array([sum(COUNTS) / COUNTS[k] for k in held_labels])
    for epoch in (0, 3, 3):
        before = method.curves.clone()
        method.measured(tiny_context(epoch, EPOCHS), look)
        offsets = 0.6 * offsets + 0.4 * fit_offsets(logits, held_labels)
        fitted, rare = fit_thresholds(logits - np.log(offsets), held_labels, weights, 5, 0.6)
        offsets[rare] = offsets.min()
        thresholds = 0.7 * thresholds + 0.3 * fitted
        assert method.curves[-1, 0].tolist() == pytest.approx(offsets.tolist(), rel=1e-4)
        assert method.curves[-1, 1].tolist() == pytest.approx(thresholds.tolist(), rel=1e-4)
        assert torch.equal(method.curves[: epoch + 1], before[: epoch + 1]), "what has been in use stays"
        assert (method.curves[epoch + 1 :] == method.curves[-1]).all()
        offsets, thresholds = method.curves[-1].double().numpy()


def test_the_second_stage_replays_the_first_with_all_labels_and_learns_no_more():
    method, look = method_of(estimate_share=0.4, offset_decay=0.5, threshold_decay=0.5), FakeLook()
    assert method.starts() == (0.0, 0.4)
    assert method_of(estimate_share=1.0).starts() == method_of(replay="runs/first").starts() == (0.0,)
    method.begin(0, look)
    used = []
    for epoch in range(4):
        used.append(method.inputs(tiny_batch(method), tiny_context(epoch, EPOCHS)))
        method.measured(tiny_context(epoch, EPOCHS), look)
    assert len(torch.stack(used).unique(dim=0)) == 4, "each epoch has its own"
    curves = method.curves.clone()
    method.begin(1, look)
    assert look.restarts == 1
    assert torch.equal(look.relabeled[1][0], look.labeled)
    assert torch.equal(look.relabeled[1][1], look.labels)
    for epoch in range(4):
        ctx = tiny_context(epoch, EPOCHS)._replace(stage=1)
        assert torch.equal(method.inputs(tiny_batch(method), ctx), used[epoch])
        method.measured(ctx, look)
    assert torch.equal(method.curves, curves)


def test_a_restored_method_holds_out_the_same_images():
    method, look, other_look = method_of(), FakeLook(), FakeLook()
    method.begin(0, look)
    torch.manual_seed(5)
    other = build_method("seval", TinyNet(), tiny_info()._replace(labeled_counts=COUNTS, num_labeled=sum(COUNTS)))
    other.load_state_dict(method.state_dict())
    other.begin(0, other_look)
    assert torch.equal(look.relabeled[0][0], other_look.relabeled[0][0])
    for one, given in ((method, look), (other, other_look)):
        one.measured(tiny_context(10), given)
    assert torch.equal(method.curves, other.curves)


def test_pseudo_labels_and_masks_are_those_of_the_epoch():
    method = tiny_method("seval")
    offsets, thresholds = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2]), torch.tensor([0.9, 0.2, 0.5, 0.4, 0.3])
    method.curves[7] = torch.stack([offsets, thresholds])
    batch = tiny_batch(method)
    with torch.no_grad():
        unlabeled = forward_jointly(method.net, method.heads, batch)["unlabeled"]
    total, used = 0.0, 0
    for weak, strong in zip(*(unlabeled[v].logits["standard"] for v in ("weak", "strong")), strict=True):
        p = (weak - offsets.log()).softmax(0)
        k = int(p.argmax())
        if p[k] >= thresholds[k]:
            total, used = total - float(strong.log_softmax(0)[k]), used + 1
    out = tiny_step(method, batch, tiny_context(7, EPOCHS))
    assert 0 < used < 10
    assert out.logs["pseudo/used"].item() == pytest.approx(used / 10)
    assert out.logs["loss/unlabeled"].item() == pytest.approx(total / 10, rel=1e-4)
    later = tiny_step(method, batch, tiny_context(8, EPOCHS))
    assert later.logs["pseudo/used"] != out.logs["pseudo/used"]


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_second_run_replays_the_first(digits, tmp_path):
    options = ["method.offset_decay=0.5", "method.threshold_decay=0.5", "eval_every=2"]
    first = train(tmp_path / "first", digits, *options, "method.estimate_share=1.0", method="seval")
    second = train(tmp_path / "second", digits, *options, f"method.replay={first}", method="seval")
    curves = [
        load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors["model"]["curves"] for run in (first, second)
    ]
    assert torch.equal(curves[0], curves[1])
    assert len(curves[0].unique(dim=0)) == 4, "the start and three evaluations"
    chosen = [
        load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors.get("labeled") for run in (first, second)
    ]
    assert len(chosen[0]["rows"]) == 118 - sum(count // 2 for count in (30, 23, 17, 13, 10, 8, 6, 5, 3, 3))
    assert chosen[1] is None, "the second learns from all labeled images"


@pytest.mark.usefixtures("fresh_accelerator")
def test_one_run_does_both_and_is_resumed_to_the_bit_on_either_side_of_the_change(digits, tmp_path):
    """Eight steps, the last four of them with what the first four have learned."""
    options = ["method.offset_decay=0.5", "method.threshold_decay=0.5", "eval_every=1", "save_every=1", "keep=9"]
    whole = train(tmp_path / "whole", digits, *options, method="seval", steps=8)
    saved = {step: load_checkpoint(whole / f"checkpoints/step-{step:09d}").tensors for step in range(1, 9)}
    held_out = sum(count // 2 for count in (30, 23, 17, 13, 10, 8, 6, 5, 3, 3))
    assert [len(saved[step]["labeled"]["rows"]) for step in (1, 4, 5, 8)] == [118 - held_out] * 2 + [118] * 2
    curves = {step: saved[step]["model"]["curves"] for step in saved}
    assert len(curves[4].unique(dim=0)) == 5, "the start and four evaluations"
    assert all(torch.equal(curves[step], curves[4]) for step in (5, 6, 7, 8))
    for step in (3, 4, 5):
        again = copy_of(whole, tmp_path / f"again{step}")
        for other in range(step + 1, 9):
            shutil.rmtree(again / f"checkpoints/step-{other:09d}")
        (again / "summary.json").unlink()
        train(again, digits, *options, method="seval", steps=8)
        tensors = load_checkpoint(again / "checkpoints/step-000000008").tensors
        assert tensors.keys() == saved[8].keys()
        for group, values in saved[8].items():
            assert all(torch.equal(tensors[group][name], value) for name, value in values.items()), (step, group)


def test_what_it_cannot_serve_is_said(tmp_path):
    method = tiny_method("seval")
    with pytest.raises(UserError, match=r"needs two or more of each, got e \(1\)\."):
        method.begin(0, FakeLook())
    with pytest.raises(UserError, match=r"method\.replay must be the folder of a finished run of method=seval"):
        tiny_method("seval", replay=str(tmp_path)).begin(0, FakeLook())
