"""ABC: how often an image of a class is drawn, both losses of the balanced head, several processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from semi_fast.methods import Context, abc
from semi_fast.methods.abc import ABC
from semi_fast.parts.forward import forward_jointly
from semi_fast.processes import gather
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import (
    CLASSES,
    COUNTS,
    tiny_averaged,
    tiny_batch,
    tiny_context,
    tiny_info,
    tiny_method,
    tiny_prepared,
    tiny_step,
)

TAU = 0.4  # the untrained tiny network reaches it for some images and misses it for others
LONG_TAIL = (500, 299, 179, 107, 64, 38, 23, 13, 8, 5)


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


def test_rates_are_the_test_vector():
    info = tiny_info()._replace(num_classes=10, labeled_counts=LONG_TAIL)
    method = ABC(tiny_method("abc").net, info)
    expected = torch.tensor([0.01, 0.0167, 0.0279, 0.0467, 0.0781, 0.1316, 0.2174, 0.3846, 0.625, 1.0])
    torch.testing.assert_close(method.rates, expected, atol=5e-5, rtol=0)
    half = torch.tensor([0.505, 0.5084, 0.514, 0.5234, 0.5391, 0.5658, 0.6087, 0.6923, 0.8125, 1.0])
    progress = method.inputs(tiny_batch(method), tiny_context(250, 500)).progress
    torch.testing.assert_close(1 - progress * (1 - method.rates), half, atol=5e-5, rtol=0)


def test_the_smallest_class_need_not_be_the_last():
    info = tiny_info()._replace(num_classes=3, labeled_counts=(4, 1, 2))
    torch.testing.assert_close(ABC(tiny_method("abc").net, info).rates, torch.tensor([0.25, 1.0, 0.5]))


@pytest.mark.parametrize(("views", "epoch"), [(1, 0), (1, 499), (2, 250)])
def test_the_loss_is_the_slow_versions(views, epoch):
    method = tiny_method("abc", tau=TAU, strong_views=views)
    batch = tiny_batch(method)
    with torch.no_grad():
        joint = forward_jointly(method.net, method.heads, batch)
    labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
    ctx = Context(epoch, epoch, epoch / 500, generator=torch.Generator().manual_seed(3))
    first, second, *_ = method.inputs(batch, ctx._replace(generator=torch.Generator().manual_seed(3)))
    expected = dict.fromkeys(("labeled", "unlabeled", "balanced_labeled", "balanced_unlabeled"), 0.0)
    counts = dict.fromkeys(("drawn", "sure", "balanced"), 0)

    labels = batch.labels["labeled"].tolist()
    for i, y in enumerate(labels):
        expected["labeled"] += ce(labeled.logits["standard"][i], y) / len(labels)
        if first[i] < min(COUNTS) / COUNTS[y]:
            counts["drawn"] += 1
            expected["balanced_labeled"] += ce(labeled.logits["balanced"][i], y) / len(labels)
    size = len(second)
    for u in range(size):
        p = weak.logits["standard"][u].softmax(0)
        soft = weak.logits["balanced"][u].softmax(0)
        k = int(soft.argmax())
        if p.max() >= TAU:
            counts["sure"] += 1
        rate = 1 - epoch / 500 * (1 - min(COUNTS) / COUNTS[k])
        drawn = soft.max() >= TAU and second[u] < rate
        counts["balanced"] += int(drawn)
        for v in range(views):
            if p.max() >= TAU:
                row = strong.logits["standard"][v * size + u]
                expected["unlabeled"] += ce(row, int(p.argmax())) / (views * size)
            if drawn:  # a mean over the images, a sum over the views
                row = strong.logits["balanced"][v * size + u]
                expected["balanced_unlabeled"] += sum(float(soft[j]) * ce(row, j) for j in range(CLASSES)) / size

    out = tiny_step(method, batch, ctx)
    assert 0 < counts["drawn"] < len(labels)
    assert 0 < counts["balanced"] < size
    assert 0 < counts["sure"] < size
    for name, value in expected.items():
        assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-5), name
    assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-5)
    assert out.logs["pseudo/used"].item() == pytest.approx(counts["sure"] / size)
    assert out.logs["pseudo/balanced_used"].item() == pytest.approx(counts["balanced"] / size)


def test_an_image_is_drawn_as_often_as_its_class_says():
    """Over many steps each class's share lies within four standard errors of its rate."""
    method = tiny_method("abc")
    batch = tiny_batch(method, labeled=100)
    labels, steps = batch.labels["labeled"], 100
    drawn = torch.zeros(CLASSES)
    for step in range(steps):
        prepared = method.inputs(batch, tiny_context(step))
        drawn.index_add_(0, labels, (prepared.labeled < method.rates[labels]).float())
    total = torch.bincount(labels, minlength=CLASSES) * steps
    for k in range(CLASSES):
        rate, n = min(COUNTS) / COUNTS[k], int(total[k])
        assert abs(float(drawn[k]) / n - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)


def test_every_part_reaches_the_network_and_targets_take_no_gradient():
    method = tiny_method("abc", tau=TAU)
    batch = tiny_batch(method)
    prepared = method.inputs(batch, tiny_context(0))
    joint = forward_jointly(method.net, method.heads, batch)
    weak = joint["unlabeled"]["weak"].logits
    for logits in weak.values():
        logits.retain_grad()
    everything = prepared._replace(labeled=prepared.labeled * 0, unlabeled=prepared.unlabeled * 0)
    method.objective(joint, batch.labels, batch.rows, everything).loss.backward()
    assert all(logits.grad is None or not logits.grad.any() for logits in weak.values())
    for name in ("balanced", "standard"):
        assert method.heads[name].weight.grad.abs().sum() > 0
    assert method.net.linear.weight.grad.abs().sum() > 0


def test_two_processes_draw_what_one_draws(monkeypatch):
    method = tiny_method("abc")
    alone = method.inputs(tiny_batch(method, labeled=6, unlabeled=10), tiny_context(7))
    shares = []
    for rank in range(2):
        for module in (abc, gather):
            monkeypatch.setattr(module, "world_size", lambda: 2)
        monkeypatch.setattr(gather.dist, "get_rank", lambda rank=rank: rank)
        shares.append(method.inputs(tiny_batch(method, labeled=3, unlabeled=5), tiny_context(7)))
    for name in ("labeled", "unlabeled"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(alone, name)), name


class TestBlended:
    """The row "FixMatch + ABC w/ DASO"."""

    def test_both_heads_are_blended_with_one_semantic_label_by_the_standard_heads_distribution(self):
        method = tiny_method("abc", refine="daso", tau=TAU, distribution_temperature=1.5)
        method.blending.published.copy_(torch.tensor([9, 7, 1, 4, 0]))
        batch, ctx = tiny_batch(method), tiny_context(400)
        twin = tiny_method("daso", tau=TAU, distribution_temperature=1.5)
        twin.load_state_dict(method.state_dict(), strict=False)
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)
        weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        averaged = tiny_averaged(batch.of("labeled", "weak"))
        labels = batch.labels["labeled"]
        prototypes = torch.stack(
            [averaged[labels == k].mean(0) if (labels == k).any() else torch.zeros(8) for k in range(CLASSES)]
        )
        cosines = torch.nn.functional.cosine_similarity(weak.features[:, None], prototypes[None], dim=2)
        semantic = (cosines / 0.05).softmax(1)
        v = (torch.tensor([9.0, 7.0, 1.0, 4.0, 0.0]) / 9) ** (1 / 1.5)
        p = weak.logits["balanced"].softmax(1)
        share = v[p.argmax(1)].unsqueeze(1)
        soft = (1 - share) * p + share * semantic
        confidence, target = soft.max(1)
        assert not torch.equal(target, p.argmax(1)), "it must matter"
        expected_twin = tiny_step(twin, batch, ctx)
        prepared = method.inputs(batch, ctx)
        rate = 1 - prepared.progress * (1 - method.rates[target])
        weight = (confidence >= TAU) & (prepared.unlabeled < rate)
        assert 0 < weight.sum() < len(weight)
        per_row = -(soft * strong.logits["balanced"].log_softmax(1)).sum(1)

        out = tiny_step(method, batch, ctx._replace(generator=torch.Generator().manual_seed(400)))
        assert out.logs["loss/balanced_unlabeled"].item() == pytest.approx(float((per_row * weight).mean()), rel=1e-4)
        for name in ("loss/labeled", "loss/unlabeled", "loss/align", "pseudo/mixing", "pseudo/used"):
            torch.testing.assert_close(out.logs[name], expected_twin.logs[name])
        assert torch.equal(method.blending.window, twin.blending.window), "the standard head's alone"

    def test_warm_up_is_plain_abc(self):
        method, plain = tiny_method("abc", refine="daso", tau=TAU), tiny_method("abc", tau=TAU)
        batch = tiny_batch(method)
        out, expected = tiny_step(method, batch, tiny_context(9)), tiny_step(plain, batch, tiny_context(9))
        assert torch.equal(out.loss, expected.loss)
        assert tiny_step(method, batch, tiny_context(10)).logs["loss/align"] > 0

    def test_two_processes_keep_the_state_of_one(self, tmp_path):
        state = assert_two_processes_keep_the_state_of_one(tmp_path, "abc", refine="daso")
        assert state["blending.window"].sum() == 6 * 12

    def test_it_is_resumed_to_the_bit(self):
        method, other = (tiny_method("abc", refine="daso", tau=TAU) for _ in range(2))
        for step in (98, 99, 100):
            tiny_step(method, tiny_batch(method, seed=step), tiny_context(step))
        other.load_state_dict(method.state_dict())
        outs = [tiny_step(m, tiny_batch(m), tiny_context(101)) for m in (method, other)]
        assert torch.equal(outs[0].loss, outs[1].loss)
        for key, value in method.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key

    def test_a_step_never_waits_and_is_compiled_once(self):
        method = tiny_method("abc", refine="daso", tau=TAU)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(method.objective, fullgraph=True, backend=counter)
        for step in (0, 98, 99, 100, 499):
            batch, prepared = tiny_prepared(method, tiny_batch(method, seed=step), tiny_context(step))
            with torch.no_grad():
                joint = forward_jointly(method.net, method.heads, batch)
            compiled(joint, batch.labels, batch.rows, prepared)
        assert counter.frame_count == 1
        with SyncTrap():
            tiny_step(method, tiny_batch(method), tiny_context(400))
