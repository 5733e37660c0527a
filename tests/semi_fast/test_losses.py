"""Every equation against a scalar reference written out by hand, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from semi_fast.parts import losses

B, V, K, D = 4, 2, 5, 3


def randn(*shape, seed=0, grad=False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def softmax(row) -> list[float]:
    exps = [math.exp(float(x) - max(map(float, row))) for x in row]
    return [e / sum(exps) for e in exps]


def entropy_weight(q, scale):
    return 1 - scale + scale * -sum(float(p) * math.log(float(p)) for p in q if p > 0) / math.log(len(q))


def test_labeled_loss_is_the_mean_cross_entropy():
    logits, labels = randn(B, K), torch.tensor([0, 4, 2, 2])
    expected = -sum(math.log(softmax(logits[i])[labels[i]]) for i in range(B)) / B
    assert losses.labeled_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


def test_unlabeled_loss_divides_by_all_rows_of_all_views():
    logits, target, weight = randn(V * B, K), torch.tensor([0, 1, 4, 4]), torch.tensor([0.0, 1.0, 0.25, 0.0])
    total = 0.0
    for v in range(V):
        for u in range(B):
            total += float(weight[u]) * -math.log(softmax(logits[v * B + u])[target[u]])
    assert losses.unlabeled_loss(logits, target, weight).item() == pytest.approx(total / (V * B), rel=1e-5)


def test_unlabeled_loss_moves_only_the_rows_in_use_and_never_the_weight():
    logits = randn(V * B, K, grad=True)
    weight = torch.tensor([0.0, 1.0, 0.5, 0.0], requires_grad=True)
    losses.unlabeled_loss(logits, torch.zeros(B, dtype=torch.int64), weight).backward()
    assert weight.grad is None
    assert (logits.grad.abs().sum(1) > 0).tolist() == [False, True, True, False] * V


def test_pseudo_labels_take_no_gradient():
    logits, features = randn(B, K, grad=True), randn(B, D, grad=True)
    q = losses.linear_pseudo_label(logits)
    semantic = losses.semantic_pseudo_label(features, randn(K, D), torch.ones(K, dtype=torch.bool), 0.1)
    mixed = losses.mix_pseudo_labels(q, semantic, losses.mixing_weight(q, torch.full((K,), 0.2), torch.tensor(0.3)))
    balanced = losses.balanced_pseudo_labels(logits, logits, torch.full((K,), 0.2), 2.0, 0.7)
    teacher = losses.ea_teacher(features, torch.zeros(D), 0.09)
    outputs = [q, semantic, mixed, losses.hardness_weight(mixed, 0.75), teacher, balanced.confidence]
    assert not any(output.requires_grad for output in outputs)


def test_semantic_pseudo_label_is_the_softmax_of_minus_the_distance():
    e, c, temperature = randn(B, D), randn(K, D, seed=1), 0.1
    got = losses.semantic_pseudo_label(e, c, torch.ones(K, dtype=torch.bool), temperature)
    for u in range(B):
        distances = [math.dist(e[u].tolist(), c[k].tolist()) for k in range(K)]
        assert got[u].tolist() == pytest.approx(softmax([-x / temperature for x in distances]), abs=1e-5)
        assert int(got[u].argmax()) == int(np.argmin(distances))


def test_distances_keep_their_digits_when_embeddings_are_far_from_the_origin():
    e = torch.full((1, 128), 100.0)
    c = e + torch.tensor([0.001, 0.002]).unsqueeze(1)
    got = losses.semantic_pseudo_label(e, c, torch.ones(2, dtype=torch.bool), 0.1)
    step = math.sqrt(128) * 0.001
    assert got[0].tolist() == pytest.approx(softmax([-step / 0.1, -2 * step / 0.1]), abs=1e-3)


def test_an_empty_class_has_probability_zero_and_the_others_still_sum_to_one():
    filled = torch.tensor([True, False, True, False, False])
    got = losses.semantic_pseudo_label(randn(B, D), randn(K, D, seed=1), filled, 0.1)
    assert (got[:, ~filled] == 0).all()
    torch.testing.assert_close(got.sum(1), torch.ones(B))


def test_without_any_prototype_the_semantic_pseudo_label_is_zero_not_nan():
    got = losses.semantic_pseudo_label(randn(B, D), torch.zeros(K, D), torch.zeros(K, dtype=torch.bool), 0.1)
    assert torch.equal(got, torch.zeros(B, K))


def test_mixing_weight_is_one_scalar_a_sample_from_its_predicted_class():
    q = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    share = torch.tensor([0.6, 0.3, 0.1])
    assert losses.mixing_weight(q, share, torch.tensor(0.4)).tolist() == pytest.approx([0.4 * 0.3, 0.4 * 0.6])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0, 1, width=32), scale=st.floats(0, 1))
def test_mixed_pseudo_labels_stay_distributions_and_weights_in_range(seed, gamma, scale):
    q, semantic = randn(B, K, seed=seed).mul(4).softmax(-1), randn(B, K, seed=seed + 1).mul(4).softmax(-1)
    share = randn(K, seed=seed + 2).softmax(-1)
    weight = losses.mixing_weight(q, share, torch.tensor(gamma))
    mixed = losses.mix_pseudo_labels(q, semantic, weight)
    for u in range(B):
        a = float(gamma) * float(share[q[u].argmax()])
        expected = [(1 - a) * float(q[u, k]) + a * float(semantic[u, k]) for k in range(K)]
        assert mixed[u].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(mixed.sum(1), torch.ones(B))
    hardness = losses.hardness_weight(mixed, scale)
    assert hardness.tolist() == pytest.approx([entropy_weight(row, scale) for row in mixed], abs=1e-5)
    assert hardness.min() >= 1 - scale - 1e-6
    assert hardness.max() <= 1 + 1e-6


def test_a_mixing_weight_of_zero_leaves_the_linear_pseudo_label_to_the_bit():
    q, semantic = randn(B, K).softmax(-1), randn(B, K, seed=1).softmax(-1)
    assert torch.equal(losses.mix_pseudo_labels(q, semantic, torch.zeros(B)), q)


def test_the_certain_example_weighs_least_and_the_uniform_one_most():
    q = torch.stack([torch.tensor([1.0, 0, 0, 0, 0]), torch.full((5,), 0.2)])
    assert losses.hardness_weight(q, 0.75).tolist() == pytest.approx([0.25, 1.0])
    assert losses.hardness_weight(q, 0.0).tolist() == [1.0, 1.0]


def test_the_threshold_is_inclusive():
    pseudo = losses.harden(torch.tensor([[0.75, 0.25], [0.26, 0.74]]), 0.75)
    assert pseudo.target.tolist() == [0, 1]
    assert pseudo.confidence.tolist() == pytest.approx([0.75, 0.74])
    assert pseudo.mask.tolist() == [True, False]


def test_ea_loss_is_the_cross_entropy_over_coordinates_of_the_unused_rows():
    weak, strong, center, temperature = randn(B, D), randn(V * B, D, seed=1), randn(D, seed=2) / 10, 0.09
    mask = torch.tensor([True, False, False, True])
    teacher = losses.ea_teacher(weak, center, temperature)
    total = 0.0
    for v in range(V):
        for u in range(B):
            t = softmax([(float(weak[u, j]) - float(center[j])) / (temperature / 5) for j in range(D)])
            log_s = [math.log(p) for p in softmax(strong[v * B + u].double() / temperature)]
            assert teacher[u].tolist() == pytest.approx(t, abs=1e-4)
            if not mask[u]:
                total -= sum(a * b for a, b in zip(t, log_s, strict=True))
    got = losses.ea_loss(teacher, strong, mask, temperature)
    assert got.item() == pytest.approx(total / (V * B), rel=1e-4)


def test_ea_loss_moves_only_the_strong_views_of_unused_images():
    weak, strong = randn(B, D, grad=True), randn(V * B, D, seed=1, grad=True)
    mask = torch.tensor([True, False, False, True])
    losses.ea_loss(losses.ea_teacher(weak, torch.zeros(D), 0.09), strong, mask, 0.09).backward()
    assert weak.grad is None
    assert (strong.grad.abs().sum(1) > 0).tolist() == [False, True, True, False] * V


def test_joint_prior_adds_labels_and_running_pseudo_labels():
    labeled, running = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 4.0, 12.0])
    got = losses.joint_prior(labeled, 8, running)
    weights = [8 * 0.5, 8 * 0.3 + 4, 8 * 0.2 + 12]
    assert got.tolist() == pytest.approx([w / sum(weights) for w in weights])
    assert losses.joint_prior(labeled, 8, torch.zeros(3)).tolist() == pytest.approx(labeled.tolist())


def test_logit_adjustment_floors_empty_classes():
    got = losses.adjust_logits(torch.ones(1, 2), torch.tensor([1.0, 0.0]), 2.0)
    assert got[0].tolist() == pytest.approx([1.0, 1.0 + 2 * math.log(1e-12)])


def test_balanced_pseudo_labels_divide_the_prior_out_and_either_head_may_be_sure():
    prior, tau, strength = torch.tensor([0.7, 0.2, 0.1]), 0.7, 2.0
    weak = torch.tensor([[2.0, 1.0, 0.0], [0.3, 0.2, 4.0], [2.0, 0.5, -1.0]])
    own = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    got = losses.balanced_pseudo_labels(weak, own, prior, strength, tau)
    for u in range(3):
        adjusted = softmax([float(weak[u, k]) - strength * math.log(float(prior[k])) for k in range(3)])
        assert got.target[u] == int(np.argmax(adjusted))
        assert got.confidence[u].item() == pytest.approx(max(adjusted), abs=1e-5)
        assert bool(got.mask[u]) == (max(adjusted) >= tau or max(softmax(own[u])) >= tau)
    assert weak[0].argmax() == 0
    assert got.target[0] == 2, "the prior must change the label here"
    assert got.mask.tolist() == [False, True, True], "the last row only by the balanced head itself"
