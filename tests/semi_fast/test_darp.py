"""DARP: cleaning, projection, the table of all predictions, and the estimate of the unlabeled counts."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from data_prep.errors import UserError
from semi_fast.methods import build_method
from semi_fast.parts import darp_solver
from semi_fast.parts.estimation import CountEstimate, confusion, estimate
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.holdout import held_out_counts, hold_out
from semi_fast.parts.row_table import RowTable
from semi_fast.run.checkpoint import list_checkpoints, load_checkpoint
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, TinyNet, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step
from tests.semi_fast.trained_runs import train

TWO = [8, 4, 3, 2, 2]  # labeled counts with two images at least


def table_and_counts(rows=60, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = (2 * torch.randn(rows, classes, generator=generator) + torch.tensor([1.0, 0.5, 0.0, -0.5])).softmax(1)
    return table, torch.tensor([20.0, 16.0, 13.0, 11.0])


def slow_clean(table, counts, alpha):
    rows, classes = table.shape
    kept = [[0.0] * classes for _ in range(rows)]
    for k in range(classes):
        column = table[:, k].tolist()
        order = sorted(range(rows), key=lambda n: (-column[n], n))[: math.floor(alpha * counts[k])]
        scale = (counts[k] + 1e-6) / (sum(column[n] for n in order) + 1e-6)
        for n in order:
            kept[n][k] = column[n] * scale
    return [[(x + 1e-6) / sum(y + 1e-6 for y in row) for x in row] for row in kept]


def slow_projection(cleaned, counts, sweeps=300):
    """The released code's way: coordinate ascent, an exact search for the multiplier of each class, rows rescaled."""
    weights = [1 / -sum(a * math.log(a + 1e-6) for a in row) for row in cleaned]
    classes = range(len(counts))
    nu, rows = [0.0] * len(counts), []
    for _ in range(sweeps):
        for k in classes:
            beta = [
                sum(row[j] * math.exp(-nu[j] / w) for j in classes if j != k)
                for row, w in zip(cleaned, weights, strict=True)
            ]

            def surplus(x, k=k, beta=beta):
                mine = [row[k] * math.exp(-x / w) for row, w in zip(cleaned, weights, strict=True)]
                return sum(m / (m + b) for m, b in zip(mine, beta, strict=True)) - counts[k]

            nu[k] = brentq(surplus, -200, 200, xtol=1e-12)
    for row, w in zip(cleaned, weights, strict=True):
        scaled = [row[k] * math.exp(-nu[k] / w) for k in classes]
        rows.append([x / sum(scaled) for x in scaled])
    return torch.tensor(rows)


def solve(cleaned, counts, multipliers, sweeps):
    return darp_solver.solve(cleaned, counts, multipliers, torch.ones(()), sweeps)[0]


@pytest.mark.parametrize("native", [True, False])
def test_the_vector_of_the_specification(monkeypatch, native):
    monkeypatch.setattr(darp_solver, "has_bf16", lambda _: native)
    table = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    counts = torch.tensor([2.0, 2.0])
    cleaned = darp_solver.clean(table, counts, 2.0)
    assert cleaned[:, 0].tolist() == pytest.approx([0.8289, 0.6829, 0.4468, 0.1875], abs=6e-5)
    entropies = darp_solver.uncertainty(cleaned).flatten().tolist()
    assert entropies == pytest.approx([0.4576, 0.6246, 0.6875, 0.4826], abs=6e-5)
    multipliers = solve(cleaned, counts, torch.zeros(2), 10)
    solution = darp_solver.refined(cleaned, multipliers)
    assert solution[:, 0].tolist() == pytest.approx([0.8066, 0.6370, 0.3919, 0.1645], abs=6e-5)
    alone = darp_solver.clean(table, counts, 1.0)
    assert alone[:, 0].tolist() == pytest.approx([1, 1, 0, 0], abs=1e-5)


@pytest.mark.parametrize("alpha", [0.7, 2.0, 10.0])
def test_cleaning_keeps_the_most_probable_images_of_each_class(alpha):
    table, counts = table_and_counts()
    table[7] = table[3]  # of equal ones the first is kept
    expected = torch.tensor(slow_clean(table, counts.tolist(), alpha))
    torch.testing.assert_close(darp_solver.clean(table, counts, alpha), expected, rtol=1e-4, atol=1e-7)


def test_blocks_and_many_equal_numbers_change_nothing(monkeypatch):
    table, counts = table_and_counts()
    table = (20 * table).round() / 20  # most numbers come more than once, 0 among them
    expected = torch.tensor(slow_clean(table, counts.tolist(), 1.5))
    whole = darp_solver.clean(table, counts, 1.5)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-7)
    multipliers = solve(whole, counts, torch.zeros(4), 6)
    monkeypatch.setattr(darp_solver, "BLOCK", 50)
    assert torch.equal(darp_solver.clean(table, counts, 1.5), whole)
    torch.testing.assert_close(solve(whole, counts, torch.zeros(4), 6), multipliers, rtol=1e-4, atol=1e-5)


def test_the_dual_solution_is_the_plain_projection():
    table, counts = table_and_counts(24)
    counts = counts * 24 / 60
    cleaned = darp_solver.clean(table, counts, 2.0)
    multipliers = solve(cleaned, counts, torch.zeros(4), 12)
    solution = darp_solver.refined(cleaned, multipliers)
    torch.testing.assert_close(solution.sum(1), torch.ones(24))
    torch.testing.assert_close(solution.sum(0), counts, rtol=1e-4, atol=0)
    plain = slow_projection(cleaned.tolist(), counts.tolist())
    torch.testing.assert_close(solution, plain, rtol=0, atol=1e-3)
    assert (solution - cleaned).abs().max() > 0.02, "it must have moved something"
    some = torch.tensor([5, 2, 9])
    torch.testing.assert_close(darp_solver.refined(cleaned[some], multipliers), solution[some])


@pytest.mark.parametrize("native", [True, False])
def test_curvature_is_bfloat16_s_only_where_that_is_native(monkeypatch, native):
    monkeypatch.setattr(darp_solver, "has_bf16", lambda _: native)
    cleaned = darp_solver.clean(*table_and_counts(), 2.0)
    H, zero = darp_solver.uncertainty(cleaned), torch.zeros(4, dtype=torch.float64)
    _, curvature = darp_solver._moments(cleaned.t(), H.flatten(), zero, torch.empty(cleaned.numel()), curved=True)
    X = darp_solver.refined(cleaned, zero.float()).double()
    error = (curvature - (torch.diag((H * X).sum(0)) - (H * X).t() @ X)).abs().max()
    assert 1e-4 < error < 0.1 if native else error < 1e-5


def test_counts_far_from_the_predictions_are_reached_refinement_by_refinement():
    """Images that are certain move last, after the uncertain ones of their class are used up."""
    generator = torch.Generator().manual_seed(0)
    prior = torch.linspace(0, -3, 20).exp()
    table = (3 * torch.randn(2000, 20, generator=generator) + prior.log()).softmax(1)
    counts = prior.flip(0) / prior.sum() * 2000
    cleaned, multipliers, length, worst = darp_solver.clean(table, counts, 2.0), torch.zeros(20), torch.ones(()), []
    for _ in range(10):
        multipliers, length = darp_solver.solve(cleaned, counts, multipliers, length, 5)
        totals = darp_solver.refined(cleaned, multipliers).sum(0)
        worst.append(((totals - counts).abs() / counts).max().item())
    assert worst[-1] < 1e-3 < worst[0]
    assert torch.isfinite(multipliers).all()


def test_certain_rows_stay_and_bad_tables_keep_the_former_multipliers():
    table, counts = table_and_counts()
    table[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    cleaned = darp_solver.clean(table, counts, 2.0)
    multipliers = solve(cleaned, counts, torch.zeros(4), 10)
    torch.testing.assert_close(darp_solver.refined(cleaned, multipliers)[0], cleaned[0], atol=1e-4, rtol=0)
    former = torch.tensor([0.5, -0.5, 0.25, -0.25])
    assert torch.equal(solve(cleaned * math.nan, counts, former, 3), former)


def test_the_uncertainty_of_a_certain_image_may_be_a_little_below_zero():
    table = torch.softmax(torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), 1)
    table[:, 0] *= 1e-3
    table[0] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    counts = torch.tensor([480.0, 50.0, 40.0, 30.0])
    cleaned = darp_solver.clean(table / table.sum(1, keepdim=True), counts, 2.0)
    assert darp_solver.uncertainty(cleaned).min() < 0
    multipliers = solve(cleaned, counts, torch.zeros(4), 10)
    torch.testing.assert_close(darp_solver.refined(cleaned, multipliers).sum(0), counts, rtol=1e-4, atol=0)


@pytest.mark.parametrize("images", [2**15 - 1, 2**15, 2**15 + 1, 2**17])
def test_more_images_are_counted_than_an_int16_holds(images):
    generator = torch.Generator().manual_seed(0)
    columns = torch.rand(2, images, generator=generator)
    columns[1] = (8 * columns[1]).floor() / 8
    number = torch.tensor([[33_000.0], [0.9 * images // 1]]).clamp_max(images)
    order = columns.sort(dim=1, descending=True, stable=True).indices
    for row, wanted in enumerate(number.flatten().int().tolist()):
        expected = torch.zeros(images).index_fill_(0, order[row, :wanted], 1.0)
        assert torch.equal(darp_solver._highest(columns, number)[row], expected)


def test_a_row_table_is_addressed_by_rows_of_the_training_array():
    table = RowTable(num_train=12, rows=5, width=2, fill=0.5)
    table.hold(torch.tensor([11, 3, 4, 8, 0]))
    table.write(torch.tensor([8, 3]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert table.read(torch.tensor([3, 8, 0])).tolist() == [[3.0, 4.0], [1.0, 2.0], [0.5, 0.5]]
    assert table.values[3].tolist() == [1.0, 2.0]
    table.write(torch.tensor([4, 0, 4]), torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]))
    assert table.read(torch.tensor([4, 0])).tolist() == [[3.0, 3.0], [2.0, 2.0]], "the last of the same row is kept"


def test_the_table_takes_raw_predictions_and_frozen_rows_make_the_pseudo_labels():
    method = tiny_method("darp", warmup_epochs=4, refresh_every=3, tau=0.3)
    plain = tiny_method("fixmatch", tau=0.3)
    table = torch.full((20, CLASSES), 1 / CLASSES)
    assert method.counts.tolist() == pytest.approx([20 * count / sum(COUNTS) for count in COUNTS])
    cleaned, multipliers, length, refined_at = None, torch.zeros(CLASSES), torch.ones(()), []
    for step in range(12):
        if step >= 4 and step % 3 == 0:
            cleaned = darp_solver.clean(method.table.values, method.counts, 2.0)
            multipliers, length = darp_solver.solve(cleaned, method.counts, multipliers, length, 5)
            refined_at.append(step)
        batch = tiny_batch(method, seed=step)
        with torch.no_grad():
            unlabeled = forward_jointly(method.net, method.heads, batch)["unlabeled"]
        p = unlabeled["weak"].logits["standard"].softmax(1)
        out, fixmatch = tiny_step(method, batch, tiny_context(step)), tiny_step(plain, batch, tiny_context(step))
        table[:10] = p
        torch.testing.assert_close(method.table.values, table)
        assert int(method.refreshes) == len(refined_at)
        if cleaned is None:
            assert torch.equal(out.loss, fixmatch.loss)
            continue
        confidence, target = darp_solver.refined(cleaned[:10], multipliers).max(1)
        assert torch.equal(out.pseudo.target, target)
        torch.testing.assert_close(out.pseudo.confidence, confidence)
        strong = unlabeled["strong"].logits["standard"].log_softmax(1)
        rows = [float(strong[u, target[u]]) for u in range(10) if confidence[u] >= 0.3]
        assert out.logs["loss/unlabeled"].item() == pytest.approx(-sum(rows) / 10, rel=1e-4)
    assert refined_at == [6, 9]
    other = tiny_method("darp", warmup_epochs=4, refresh_every=3, tau=0.3)
    other.load_state_dict(method.state_dict())
    for step in range(12, 16):
        batch = tiny_batch(method, seed=step)
        assert torch.equal(
            tiny_step(method, batch, tiny_context(step)).loss, tiny_step(other, batch, tiny_context(step)).loss
        )


def test_logit_adjustment_in_training_leaves_table_and_pseudo_labels_alone():
    """The row "FixMatch + LA w/ DARP": the labeled loss sees z + log pi, DARP the raw predictions."""
    options = {"warmup_epochs": 0, "refresh_every": 2, "tau": 0.3}
    method, plain = (tiny_method("darp", logit_adjustment=form, **options) for form in ("train", "off"))
    log_prior = torch.tensor([math.log(count / sum(COUNTS)) for count in COUNTS])
    for step in range(4):
        batch = tiny_batch(method, seed=step)
        with torch.no_grad():
            logits = forward_jointly(method.net, method.heads, batch)["labeled"]["weak"].logits["standard"]
        out, expected = (tiny_step(m, batch, tiny_context(step)) for m in (method, plain))
        labels = batch.labels["labeled"]
        slow = [-float((row + log_prior).log_softmax(0)[k]) for row, k in zip(logits, labels, strict=True)]
        assert out.logs["loss/labeled"].item() == pytest.approx(sum(slow) / len(slow), rel=1e-5)
        assert out.logs["loss/labeled"] != expected.logs["loss/labeled"]
        assert all(torch.equal(out.logs[key], expected.logs[key]) for key in out.logs if key != "loss/labeled")
        assert torch.equal(out.pseudo.target, expected.pseudo.target)
        assert torch.equal(method.table.values, plain.table.values)
        assert torch.equal(method.multipliers, plain.multipliers)
    assert method.multipliers.abs().sum() > 0, "it must have been refined"


class FakeLook:
    """Labeled rows 100, 101, ... and unlabeled 20, 21, ...; logits are those of a classifier of known confusion."""

    unlabeled = torch.arange(20, 40)
    truth = torch.tensor([0] * 2 + [1] * 3 + [2] * 4 + [3] * 5 + [4] * 6)

    def __init__(self, matrix, counts):
        self.labels = torch.repeat_interleave(torch.arange(CLASSES), torch.tensor(counts))
        self.labeled = torch.arange(100, 100 + sum(counts))
        self.matrix, self.relabeled, self.restarts = matrix, [], 0

    def logits(self, rows):
        classes = self.truth[rows - 20] if rows[0] < 100 else self.labels[rows - 100]
        return {"standard": self.matrix.log().t()[classes]}

    def relabel(self, rows, labels):
        self.relabeled.append((rows, labels))

    def restart(self):
        self.restarts += 1


def confused(share):
    return (1 - share) * torch.eye(CLASSES) + share / CLASSES


def test_the_confusion_of_held_out_images_gives_back_the_counts():
    look = FakeLook(confused(0.5), TWO)
    p = look.logits(look.labeled)["standard"].softmax(1)
    torch.testing.assert_close(confusion(p, look.labels, CLASSES), confused(0.5).double(), rtol=1e-5, atol=1e-6)
    counts, trusted = estimate(confused(0.5).double(), look.logits(look.unlabeled)["standard"].softmax(1).sum(0))
    assert trusted
    assert counts.tolist() == pytest.approx([2, 3, 4, 5, 6], rel=1e-4)
    assert not estimate(confused(0.995).double(), torch.ones(CLASSES))[1], "its condition number is 200"
    assert not estimate(confused(0.5).double(), torch.tensor([20.0, 0, 0, 0, 0]))[1], "it would be negative"
    mean = CountEstimate(CLASSES)
    assert mean.read() is None
    for share, matrix in ((0.5, 0.5), (0.995, 0.5), (0.2, 0.5)):
        given = FakeLook(confused(share), TWO)
        mean.take(given.logits(given.labeled)["standard"], given.labels, (confused(matrix).log().t())[given.truth])
    assert int(mean.accepted) == 2


def test_an_estimate_is_accepted_where_all_counts_are_positive_and_the_confusion_is_well_conditioned():
    """Against the rule written out; between a sure and a poor network some are accepted and some are not."""
    labels, estimated = torch.arange(3).repeat(4), CountEstimate(3)
    total, verdicts = np.zeros(3), []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        sure = 0.4 * seed
        held_out = sure * torch.eye(3)[labels] + torch.randn(12, 3, generator=generator)
        unlabeled = sure * torch.eye(3)[torch.tensor([0] * 20 + [1] * 8 + [2] * 2)]
        unlabeled += torch.randn(30, 3, generator=generator)
        estimated.take(held_out, labels, unlabeled)
        p = held_out.double().softmax(1).numpy()
        C = np.array([[np.mean([p[n, j] for n in range(12) if labels[n] == k]) for k in range(3)] for j in range(3)])
        q = np.linalg.inv(C) @ unlabeled.softmax(1).double().sum(0).numpy()
        verdicts.append(bool((q >= 0).all()) and np.linalg.cond(C) < 100)
        total += q if verdicts[-1] else 0
        assert int(estimated.accepted) == sum(verdicts), seed
    assert 3 < sum(verdicts) < 12
    assert verdicts[-1]
    assert estimated.read().tolist() == pytest.approx((total / total.sum()).tolist(), rel=1e-4)


def estimating_method(**options):
    torch.manual_seed(0)
    info = tiny_info()._replace(labeled_counts=tuple(TWO), num_labeled=sum(TWO), num_train=sum(TWO) + 20)
    info = info._replace(num_train=140)
    return build_method("darp", TinyNet(), info, counts_from="estimate", warmup_epochs=0, **options)


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_stage_of_estimation_holds_out_estimates_and_restarts(evaluated):
    method, look = estimating_method(estimate_share=0.25), FakeLook(confused(0.4), TWO)
    assert method.starts() == (0.0, 0.25)
    method.begin(0, look)
    (rows, labels) = look.relabeled[0]
    assert torch.bincount(labels).tolist() == [4, 2, 2, 1, 1]
    assert torch.equal(look.labels[rows - 100], labels)
    batch = tiny_batch(method)
    batch = batch._replace(rows={**batch.rows, "unlabeled": 20 + batch.rows["unlabeled"]})
    out = tiny_step(method, batch, tiny_context(0))
    assert out.logs["loss/unlabeled"] == 0
    assert not method.refreshes
    if evaluated:
        method.measured(tiny_context(3), look)
        method.measured(tiny_context(4), FakeLook(confused(0.999), TWO))  # not to be trusted
        assert int(method.estimate.accepted) == 1
    method.begin(1, look)
    assert method.counts.tolist() == pytest.approx([2, 3, 4, 5, 6], rel=1e-4)
    assert torch.equal(look.relabeled[1][0], look.labeled)
    assert look.restarts == 1
    out = tiny_step(method, batch, tiny_context(0)._replace(stage=1))
    assert int(method.refreshes) == 1


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_estimates_the_counts_of_its_unlabeled_images(tiny_folder, tmp_path):
    """12, 6 and 3 labeled images; of the unlabeled ones these and 20 more of each class; the classes are easy."""
    options = ["method.counts_from=estimate", "method.estimate_share=0.7", "method.warmup_epochs=100", "eval_every=10"]
    run = train(tmp_path / "run", tiny_folder, *options, "save_every=60", "keep=9", method="darp", steps=100)
    last = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors
    assert last["model"]["estimate.accepted"] > 0
    assert last["model"]["counts"].sum().item() == pytest.approx(81, rel=1e-5)
    assert (last["model"]["counts"] - torch.tensor([32, 26, 23])).abs().max() < 6, "not 46, 23 and 12, as labeled"
    assert last["model"]["refreshes"] > 0
    assert len(last["labeled"]["rows"]) == 21, "all labeled images, after a stage without those held out"
    first = load_checkpoint(run / "checkpoints/step-000000060").tensors
    assert len(first["labeled"]["rows"]) == 21 - 6 - 3 - 1


def test_an_estimate_that_is_never_to_be_trusted_ends_the_run():
    method, look = estimating_method(), FakeLook(confused(0.999), TWO)
    method.begin(0, look)
    method.measured(tiny_context(3), look)
    with pytest.raises(UserError, match=r"No estimate of the unlabeled class counts was to be trusted"):
        method.begin(1, look)


def test_held_out_images_are_drawn_by_seed():
    labels = torch.tensor([0, 1] * 10 + [2])
    assert held_out_counts([10, 25, 1]) == [5, 12, 0]
    assert held_out_counts([10, 25, 1], most=10) == [5, 10, 0]
    drawn, rest = hold_out(labels, [3, 5, 0], seed=4)
    assert torch.bincount(labels[drawn], minlength=3).tolist() == [3, 5, 0]
    assert sorted([*drawn.tolist(), *rest.tolist()]) == list(range(21))
    assert torch.equal(hold_out(labels, [3, 5, 0], seed=4)[0], drawn)
    assert not torch.equal(hold_out(labels, [3, 5, 0], seed=5)[0], drawn)


def test_given_counts_are_taken_in_proportion():
    method = tiny_method("darp", counts_from="given", counts=[1.0, 1, 1, 1, 4])
    assert method.counts.tolist() == pytest.approx([2.5, 2.5, 2.5, 2.5, 10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts_from": "given"}, r"method\.counts must be 5 numbers.*got none with method\.counts_from=given"),
        ({"counts": [1.0] * 5}, r"got 5 numbers with method\.counts_from=labeled"),
        ({"counts_from": "given", "counts": [1.0] * 4}, r"got 4 numbers with method\.counts_from=given"),
        ({"counts_from": "given", "counts": [0.0] * 5}, r"method\.counts: .*greater than 0"),
        ({"counts_from": "estimate"}, r"holds out labeled images of every class .* two or more of each, got e \(1\)\."),
    ],
)
def test_what_it_cannot_serve_is_said(options, message):
    with pytest.raises(UserError, match=message):
        tiny_method("darp", **options)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "darp", refresh_every=2)
    assert state["refreshes"] == 3
