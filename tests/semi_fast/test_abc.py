"""ABC: how often an image of a class is drawn, both losses of the balanced head, several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

from semi_fast.methods import Context
from semi_fast.methods.abc import ABC, Prepared
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_info, tiny_method

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
    progress = method.prepare(tiny_batch(method), tiny_context(250, 500))[1].progress
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
    _, (first, second, _) = method.prepare(batch, ctx._replace(generator=torch.Generator().manual_seed(3)))
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

    out = method(batch, ctx)
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
        _, prepared = method.prepare(batch, tiny_context(step))
        drawn.index_add_(0, labels, (prepared.labeled < method.rates[labels]).float())
    total = torch.bincount(labels, minlength=CLASSES) * steps
    for k in range(CLASSES):
        rate, n = min(COUNTS) / COUNTS[k], int(total[k])
        assert abs(float(drawn[k]) / n - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)


def test_every_part_reaches_the_network_and_targets_take_no_gradient():
    method = tiny_method("abc", tau=TAU)
    batch = tiny_batch(method)
    _, prepared = method.prepare(batch, tiny_context(0))
    joint = forward_jointly(method.net, method.heads, batch)
    weak = joint["unlabeled"]["weak"].logits
    for logits in weak.values():
        logits.retain_grad()
    everything = Prepared(prepared.labeled * 0, prepared.unlabeled * 0, prepared.progress)
    method.objective(joint, batch.labels, batch.rows, everything).loss.backward()
    assert all(logits.grad is None or not logits.grad.any() for logits in weak.values())
    for name in ("balanced", "standard"):
        assert method.heads[name].weight.grad.abs().sum() > 0
    assert method.net.linear.weight.grad.abs().sum() > 0


RANK = """
import sys, torch, torch.distributed as dist
from tests.semi_fast.tiny import tiny_batch, tiny_context, tiny_method
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
method = tiny_method("abc")
batch = tiny_batch(method, labeled=3, unlabeled=5)
torch.save(method.prepare(batch, tiny_context(7))[1], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_draw_what_one_draws(tmp_path, root):
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path)], cwd=root, env=environment) for r in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    with torch.serialization.safe_globals([Prepared]):
        first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    method = tiny_method("abc")
    _, alone = method.prepare(tiny_batch(method, labeled=6, unlabeled=10), tiny_context(7))
    for name in ("labeled", "unlabeled"):
        assert torch.equal(torch.cat([getattr(first, name), getattr(second, name)]), getattr(alone, name)), name
