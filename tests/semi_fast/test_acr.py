"""ACR: anchors and the strength that follows from them, the estimate, both heads, against the equations written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from semi_fast.methods import Context
from semi_fast.methods.acr import ACR, anchor_distributions, divergences
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.priors import class_prior
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step

TAU = 0.45  # the untrained tiny network reaches it for some images and misses it for others
LONG_TAIL = (500, 299, 179, 107, 64, 38, 23, 13, 8, 5)


@pytest.mark.parametrize(
    ("which", "distances", "strength"),
    [(0, (0.0, 0.793, 3.164), 0.0744), (1, (0.793, 0.0, 0.793), 0.8154), (2, (3.164, 0.793, 0.0), 1.7613)],
)
def test_strengths_are_the_test_vectors(which, distances, strength):
    """An estimate that is one of the anchors throughout an epoch."""
    method = ACR(tiny_method("acr").net, tiny_info()._replace(num_classes=10, labeled_counts=LONG_TAIL))
    distance = divergences(method.anchors[which], method.anchors)
    torch.testing.assert_close(distance, torch.tensor(distances), atol=1e-3, rtol=0)
    method.distance.copy_(4 * distance)
    method.steps.fill_(4)
    method.epoch.fill_(6)
    method._begin_epoch(torch.tensor(7))
    assert method.strength.item() == pytest.approx(strength, abs=5e-5)
    assert method.distance.tolist() == [0, 0, 0]
    assert method.steps == 0


def test_divergence_is_the_symmetric_kl():
    u, a = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]])
    kl = lambda p, q: sum(float(x) * math.log(float(x) / float(y)) for x, y in zip(p, q, strict=True))  # noqa: E731
    expected = [0.5 * kl(u, row) + 0.5 * kl(row, u) for row in a]
    torch.testing.assert_close(divergences(u, a), torch.tensor(expected))


def test_classes_need_not_be_sorted_by_frequency():
    counts = (3, 50, 20, 5)
    consistent, uniform, reverse = anchor_distributions(class_prior(counts))
    torch.testing.assert_close(consistent, torch.tensor(counts) / 78)
    torch.testing.assert_close(uniform, torch.full((4,), 0.25))
    torch.testing.assert_close(reverse, torch.tensor([50, 3, 5, 20]) / 78)


class Slow:
    """The estimate and the strength as the equations have them, one image at a time."""

    def __init__(self):
        self.u, self.sums, self.strength, self.epoch, self.steps = [1 / CLASSES] * CLASSES, [0.0] * 3, 2.0, 0, 0
        pi = [count / sum(COUNTS) for count in COUNTS]
        self.anchors = [pi, [1 / CLASSES] * CLASSES, pi[::-1]]

    def begin(self, epoch):
        if epoch != self.epoch:
            if epoch >= 6:
                exponents = [math.exp(s / self.steps) for s in self.sums]
                self.strength = 2.0 * exponents[0] / sum(exponents)
            self.sums, self.epoch, self.steps = [0.0] * 3, epoch, 0

    def end(self, epoch, sure_classes):
        self.steps += 1
        if epoch >= 6 and sure_classes:
            g = [float(k in sure_classes) for k in range(CLASSES)]
            self.u = [0.9 * u + 0.1 * x / sum(g) for u, x in zip(self.u, g, strict=True)]
            for i, anchor in enumerate(self.anchors):
                terms = (u * math.log(u / a) + a * math.log(a / u) for u, a in zip(self.u, anchor, strict=True))
                self.sums[i] += 0.5 * sum(terms)


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


def test_steps_are_those_of_the_slow_version():
    """Three steps an epoch, through the epochs 4 to 8."""
    method, slow = tiny_method("acr", tau=TAU, estimate_decay=0.9), Slow()
    method.is_labeled[[2, 5]] = 1
    log_pi = torch.tensor([math.log(count / sum(COUNTS)) for count in COUNTS])
    strengths, absent = [], 0
    for step in range(15):
        epoch = 4 + step // 3
        slow.begin(epoch)
        batch = tiny_batch(method, seed=step)
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)
        labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        labels, size = batch.labels["labeled"].tolist(), len(weak.features)
        expected = dict.fromkeys(("labeled", "unlabeled", "balanced_labeled", "balanced_unlabeled"), 0.0)
        for i, y in enumerate(labels):
            expected["labeled"] += ce(labeled.logits["standard"][i], y) / len(labels)
            expected["balanced_labeled"] += ce(labeled.logits["balanced"][i] + 2 * log_pi, y) / len(labels)
        sure_classes = set()
        for u in range(size):
            z, z_b = weak.logits["standard"][u], weak.logits["balanced"][u].softmax(0)
            first, second = (z - slow.strength * log_pi).softmax(0), (z - 2 * log_pi).softmax(0)
            for v in range(2):
                if first.max() >= TAU or z.softmax(0).max() >= TAU:
                    row = strong.logits["standard"][v * size + u]
                    expected["unlabeled"] += ce(row, int(first.argmax())) / (2 * size)
                if second.max() >= TAU or z_b.max() >= TAU:
                    row = strong.logits["balanced"][v * size + u]
                    expected["balanced_unlabeled"] += ce(row, int(second.argmax())) / (2 * size)
            if z_b.max() >= TAU and u not in (2, 5):
                sure_classes.add(int(z_b.argmax()))
        absent += CLASSES - len(sure_classes)
        slow.end(epoch, sure_classes)

        out = tiny_step(method, batch, Context(step, epoch, epoch / 500))
        for name, value in expected.items():
            assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), (step, name)
        assert method.strength.item() == pytest.approx(slow.strength, rel=1e-5)
        torch.testing.assert_close(method.estimate, torch.tensor(slow.u))
        strengths.append(round(method.strength.item(), 4))
    assert absent > 0
    assert strengths[:6] == [2.0] * 6
    assert strengths[6:9] == [0.6667] * 3
    assert len(set(strengths)) == 4, "once an epoch, from the seventh on"
    shown = method.statistics(6)
    assert torch.equal(shown["acr/strength"], method.strength)
    assert torch.equal(shown["acr/unlabeled"], method.estimate)


def test_a_step_without_a_sure_image_leaves_the_estimate():
    method = tiny_method("acr", tau=1.0)
    tiny_step(method, tiny_batch(method), tiny_context(400))
    assert (method.estimate == 1 / CLASSES).all()
    assert method.distance.tolist() == [0, 0, 0]
    assert method.steps == 1


def test_labeled_rows_are_those_of_the_beginning():
    method = tiny_method("acr", tau=0.01)
    method.begin(0, SimpleNamespace(labeled=torch.arange(10)))
    assert method.is_labeled.sum() == 10
    tiny_step(method, tiny_batch(method), tiny_context(400))
    assert (method.estimate == 1 / CLASSES).all(), "all images of the batch are labeled ones"
    other = tiny_method("acr", tau=0.01)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.is_labeled, method.is_labeled), "a resumed run does not begin again"


def test_an_interrupted_epoch_goes_on_to_the_bit():
    method, other = (tiny_method("acr", tau=TAU) for _ in range(2))
    contexts = [Context(step, 6 + step // 4, 0.0) for step in range(12)]
    for step in range(6):
        tiny_step(method, tiny_batch(method, seed=step), contexts[step])
    other.load_state_dict(method.state_dict())
    for step in range(6, 12):
        outs = [tiny_step(m, tiny_batch(m, seed=step), contexts[step]) for m in (method, other)]
        assert torch.equal(outs[0].loss, outs[1].loss)
    for key, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert method.strength not in (0.0, 2.0)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "acr", tau=0.9, estimate_decay=0.5)
    assert state["strength"] not in (0.0, 2.0)
    assert len(state["estimate"].unique()) > 1
