"""DASO: blended pseudo-labels, their distribution, prototypes and alignment, against the equations written out."""

from __future__ import annotations

import math

import pytest
import torch

from semi_fast.memory_bank import MemoryBank
from semi_fast.parts import blending
from semi_fast.parts.blending import Blending, blending_weights
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import (
    CLASSES,
    COUNTS,
    FEATURES,
    TinyNet,
    tiny_averaged,
    tiny_batch,
    tiny_context,
    tiny_method,
    tiny_step,
)

TAU = 0.5


@pytest.fixture
def period(monkeypatch):
    """m is renewed every three steps."""
    monkeypatch.setattr(blending, "PERIOD", 3)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(1.5, [1.0, 0.7114, 0.5429]), (0.3, [1.0, 0.1822, 0.0472]), (0.5, [1.0, 0.36, 0.16])],
)
def test_weights_are_the_test_vectors(temperature, expected):
    weights = blending_weights(torch.tensor([50, 30, 20]), temperature)
    torch.testing.assert_close(weights, torch.tensor(expected), atol=5e-5, rtol=0)


def test_nothing_is_blended_before_anything_is_counted():
    assert (blending_weights(torch.zeros(CLASSES, dtype=torch.int64), 0.3) == 0).all()


def test_similarity_to_a_prototype_of_zeros_is_zero():
    features, prototypes = torch.randn(4, FEATURES), torch.randn(3, FEATURES)
    prototypes[1] = 0
    cosines = torch.nn.functional.cosine_similarity(features[:, None], prototypes[None], dim=2)
    torch.testing.assert_close(blending.similarity(features, prototypes, 0.05), cosines / 0.05)
    assert (blending.similarity(features, prototypes, 0.05)[:, 1] == 0).all()


class Slow:
    """The statistics and a step as the equations have them, one image at a time."""

    def __init__(self, size, temperature, prototype_temperature):
        self.stored = [[] for _ in range(CLASSES)]
        self.size, self.temperature, self.prototype_temperature = size, temperature, prototype_temperature
        self.window, self.m = [], None

    def cosines(self, feature):
        prototypes = [torch.stack(own).mean(0) if own else torch.zeros(FEATURES).double() for own in self.stored]
        cosines = [float(feature.double() @ c) / max(float(feature.norm() * c.norm()), 1e-12) for c in prototypes]
        return torch.tensor(cosines, dtype=torch.float64) / self.prototype_temperature

    def step(self, step, live, averaged, labels, joint):
        """The parts of the loss and the final pseudo-labels of a step."""
        for feature, label in zip(averaged, labels, strict=True):
            self.stored[label] = [*self.stored[label], feature.double()][-self.size :]
        labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        unlabeled = align = 0.0
        count, targets = len(weak.features), []
        for u in range(count):
            p = weak.logits["standard"][u].double().softmax(0)
            semantic = self.cosines(weak.features[u]).softmax(0)
            if live and self.m is not None:
                m = [share ** (1 / self.temperature) for share in self.m]
                v = m[int(p.argmax())] / max(m)
                p = (1 - v) * p + v * semantic
            k = int(p.argmax())
            targets.append(k)
            for row in range(u, len(strong.features), count):
                if p[k] >= TAU:
                    unlabeled -= float(strong.logits["standard"][row].double().log_softmax(0)[k])
                if live:
                    align -= float(semantic @ self.cosines(strong.features[row]).log_softmax(0))
        self.window += targets
        if (step + 1) % 3 == 0:
            self.m = [self.window.count(k) / len(self.window) for k in range(CLASSES)]
            self.window = []
        rows = len(strong.features)
        z = labeled.logits["standard"].double()
        first = sum(-float(z[i].log_softmax(0)[y]) for i, y in enumerate(labels)) / len(labels)
        return {"labeled": first, "unlabeled": unlabeled / rows, "align": align / rows}, targets


@pytest.mark.parametrize(("views", "temperature"), [(1, 1.5), (2, 0.3)])
def test_steps_are_those_of_the_slow_version(period, views, temperature):
    """Twelve steps through the end of warm-up, with a bank so small that the oldest go."""
    options = {"distribution_temperature": temperature, "prototype_temperature": 0.5, "warmup_epochs": 5}
    method = tiny_method("daso", tau=TAU, bank_size=2, strong_views=views, **options)
    slow = Slow(2, temperature, 0.5)
    averaged, changed = TinyNet().eval(), 0
    for step in range(12):
        batch = tiny_batch(method, seed=step)
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)
            features = averaged(batch.of("labeled", "weak"))
        linear = joint["unlabeled"]["weak"].logits["standard"].argmax(1).tolist()
        expected, targets = slow.step(step, step >= 5, features, batch.labels["labeled"].tolist(), joint)
        out = tiny_step(method, batch, tiny_context(step), lambda images: averaged(images).detach())
        assert out.pseudo.target.tolist() == targets
        for name, value in expected.items():
            assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), (step, name)
        assert (out.logs["pseudo/mixing"] > 0).item() == (step >= 5)
        changed += targets != linear
    assert changed > 2, "prototypes must have had a say"
    torch.testing.assert_close(method.statistics(6)["pseudo/blended"], torch.tensor(slow.m))
    assert method.blending.bank.counts.tolist() == [len(stored) for stored in slow.stored]


def test_warm_up_is_fixmatch_to_the_bit_while_the_bank_fills():
    method, twin = tiny_method("daso", tau=TAU), tiny_method("fixmatch", tau=TAU)
    twin.load_state_dict(method.state_dict(), strict=False)
    for step in range(3):
        batch = tiny_batch(method, seed=step)
        out, expected = tiny_step(method, batch, tiny_context(step)), tiny_step(twin, batch, tiny_context(step))
        assert torch.equal(out.loss, expected.loss)
        assert out.logs["loss/align"] == 0
    assert method.blending.bank.counts.sum() == 18
    assert method.blending.window.sum() == 30


@pytest.mark.parametrize(("epochs", "epoch", "live"), [(10, 9, False), (10, 10, True), (0, 0, True), (500, 499, False)])
def test_warm_up_ends_with_its_last_epoch(epochs, epoch, live):
    made = Blending(MemoryBank(CLASSES, FEATURES), 0.3, warmup_epochs=epochs).inputs(0, epoch, torch.device("cpu"))
    assert made.live.item() is live


def test_the_distribution_is_of_the_last_hundred_steps_and_renewed_behind_them():
    module = Blending(MemoryBank(CLASSES, FEATURES), 0.3)
    for step in range(250):
        target = torch.full((4,), 0 if step < 100 else 1)
        module.update(target, module.inputs(step, 0, torch.device("cpu")))
        if step == 98:
            assert module.statistics()["pseudo/blended"].isnan().all()
        expected = [0, 0] if step < 99 else [400, 0] if step < 199 else [0, 400]
        assert module.published.tolist() == [*expected, 0, 0, 0]
    assert module.window.sum() == 200


def test_alignment_reaches_the_strong_features_alone():
    method = tiny_method("daso", warmup_epochs=0, tau=1.0, align_weight=2.0)
    batch, ctx = tiny_batch(method), tiny_context(400)
    joint = forward_jointly(method.net, method.heads, batch)
    for group in (joint["labeled"]["weak"], *joint["unlabeled"].values()):
        group.features.retain_grad()
    inputs = method.inputs(batch, ctx)
    weak, strong = joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
    method.blending.learn(tiny_averaged(batch.of("labeled", "weak")), batch.labels["labeled"], batch.rows["labeled"])
    semantic, align = method.blending.semantic(weak, strong, inputs)
    align.backward()
    assert not semantic.requires_grad
    assert strong.features.grad.abs().sum() > 0
    assert weak.features.grad is None
    assert joint["labeled"]["weak"].features.grad is None
    other = tiny_method("daso", warmup_epochs=0, tau=1.0, align_weight=2.0)
    assert tiny_step(other, batch, ctx).logs["loss/align"].item() == pytest.approx(2 * align.item(), rel=1e-5)


def test_logit_adjustment_in_training_changes_the_labeled_loss_alone():
    method, plain = (tiny_method("daso", logit_adjustment=form, warmup_epochs=0) for form in ("train", "off"))
    batch, ctx = tiny_batch(method), tiny_context(400)
    with torch.no_grad():
        logits = forward_jointly(method.net, method.heads, batch)["labeled"]["weak"].logits["standard"]
    adjusted, unadjusted = tiny_step(method, batch, ctx).logs, tiny_step(plain, batch, ctx).logs
    log_prior = torch.tensor([math.log(count / sum(COUNTS)) for count in COUNTS])
    expected = torch.nn.functional.cross_entropy(logits + log_prior, batch.labels["labeled"])
    torch.testing.assert_close(adjusted["loss/labeled"], expected)
    assert all(torch.equal(adjusted[key], unadjusted[key]) for key in adjusted if key != "loss/labeled")


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "daso", bank_size=3)
    assert state["blending.bank.pushed"].max() > 3
    assert state["blending.window"].sum() == 6 * 12
