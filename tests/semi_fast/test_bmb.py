"""BMB: the weighted losses, what enters the pool and what is learned from it, against the equations written out."""

from __future__ import annotations

import pytest
import torch

from data_prep.errors import UserError
from semi_fast.methods import Context
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.test_stores import SlowPool
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_prepared, tiny_step

TAU = 0.4  # the untrained tiny network reaches it for some images and misses it for others
SIZE = 8


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


def phi(counts, power):
    weights = [max(count, 1) ** -power for count in counts]
    return [weight / max(weights) for weight in weights]


def test_steps_are_those_of_the_slow_version():
    """Six steps of the epochs 18 to 23: the unlabeled losses, and the counts, begin with epoch 20."""
    options = {"weight_power": 1.25, "draw_power": 0.6, "enter_power": 2.0, "pool_weight": 0.7}
    method = tiny_method("bmb", tau=TAU, pool_size=SIZE, pool_draws=3, **options)
    pool, counted, entered, drawn = SlowPool(SIZE, 2.0), [0] * CLASSES, 0, []
    pool.rates = lambda: phi([sum(p is not None and p[1] == k for p in pool.places) for k in range(CLASSES)], 2.0)
    for epoch in range(18, 24):
        batch = tiny_batch(method, seed=epoch)
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)
        labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        ctx = Context(epoch, epoch, epoch / 500, generator=torch.Generator().manual_seed(epoch))
        prepared = method.inputs(batch, ctx._replace(generator=torch.Generator().manual_seed(epoch)))
        names = ("labeled", "unlabeled", "balanced_labeled", "balanced_unlabeled", "pool")
        expected, live = dict.fromkeys(names, 0.0), epoch >= 20
        labels, size = batch.labels["labeled"].tolist(), len(weak.features)
        for i, y in enumerate(labels):
            expected["labeled"] += ce(labeled.logits["standard"][i], y) / len(labels)
            weight = phi(COUNTS, 1.25)[y]
            expected["balanced_labeled"] += weight * ce(labeled.logits["balanced"][i], y) / len(labels)
        targets, sure = [], []
        for u in range(size):
            p, soft = (weak.logits[head][u].softmax(0) for head in ("standard", "balanced"))
            targets.append(int(soft.argmax()))
            sure.append(bool(soft.max() >= TAU))
            for v in range(2 * live):
                row = v * size + u
                if p.max() >= TAU:
                    expected["unlabeled"] += ce(strong.logits["standard"][row], int(p.argmax())) / (2 * size)
                if sure[u]:
                    terms = sum(float(soft[j]) * ce(strong.logits["balanced"][row], j) for j in range(CLASSES))
                    expected["balanced_unlabeled"] += phi(counted, 1.25)[targets[u]] * terms / (2 * size)
        features, classes, there = method.pool.draw(torch.tensor(phi(counted, 0.6)), 3, prepared.drawn)
        rows = [(f, int(k)) for f, k, t in zip(features, classes, there, strict=True) if t]
        head = method.heads["balanced"]
        for feature, k in rows:
            expected["pool"] += 0.7 * ce(head.weight.detach() @ feature + head.bias.detach(), k) / len(rows)
        drawn.append(len(rows))
        given = (weak.features.tolist(), targets, sure, prepared.entering.tolist(), prepared.leaving.tolist())
        entered += pool.put(*given)
        for k in (targets[u] for u in range(size) if sure[u] and live):
            counted[k] += 1

        out = tiny_step(method, batch, ctx)
        for name, value in expected.items():
            assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), (epoch, name)
        assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)
        assert method.counted.tolist() == counted
        assert method.pool.classes.tolist() == [-1 if place is None else place[1] for place in pool.places]
        for i, place in enumerate(pool.places):
            if place is not None:
                torch.testing.assert_close(method.pool.features[i], torch.tensor(place[0]))
    assert drawn[0] == 0
    assert drawn[-1] == 3
    assert entered > SIZE
    assert 0 < sum(counted) < 4 * 10
    shown = method.statistics(6)
    torch.testing.assert_close(shown["bmb/counted"], torch.tensor(counted) / sum(counted))
    assert shown["bmb/fill"] == 1
    torch.testing.assert_close(shown["bmb/pool"], method.pool.counts() / SIZE)


def test_what_is_stored_trains_the_balanced_head_alone():
    method = tiny_method("bmb", tau=0.01, pool_size=SIZE, pool_draws=4)
    tiny_step(method, tiny_batch(method), tiny_context(400))
    _, prepared = tiny_prepared(method, tiny_batch(method, seed=1), tiny_context(401))
    assert not method.pool.features.requires_grad
    loss = method._pool_loss(torch.ones(CLASSES), prepared.drawn)
    loss.backward()
    assert {key for key, p in method.named_parameters() if p.grad is not None} == {
        "heads.balanced.weight",
        "heads.balanced.bias",
    }


def test_more_draws_than_places_are_refused():
    with pytest.raises(UserError, match=r"method\.pool_draws must be at most method\.pool_size, got 9 of 8"):
        tiny_method("bmb", pool_size=8, pool_draws=9)


def test_it_is_resumed_to_the_bit():
    method, other = (tiny_method("bmb", tau=TAU, pool_size=SIZE, pool_draws=4) for _ in range(2))
    for step in range(3):
        tiny_step(method, tiny_batch(method, seed=step), tiny_context(400 + step))
    other.load_state_dict(method.state_dict())
    outs = [tiny_step(m, tiny_batch(m), tiny_context(403)) for m in (method, other)]
    assert torch.equal(outs[0].loss, outs[1].loss)
    for key, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "bmb", tau=0.7, pool_size=16, pool_draws=8)
    assert (state["pool.classes"] >= 0).all()
    assert state["counted"].sum() > 16
