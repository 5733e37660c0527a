"""SimPro: its losses, written out, and the estimates of both priors over several parts of a run."""

import math

import pytest
import torch

from semi_fast.methods.simpro import begins_part
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_step


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def cross_entropy(scores, target):
    """Against a distribution."""
    return -sum(t * math.log(p) for t, p in zip(target, softmax(scores), strict=True))


class SlowSimPro:
    """The equations, image by image, in Python's numbers."""

    def __init__(self, tau, strength):
        self.tau, self.strength = tau, strength
        self.u, self.r = [1 / CLASSES] * CLASSES, [count / sum(COUNTS) for count in COUNTS]
        self.A, self.B = [0.0] * CLASSES, [0.0] * CLASSES

    def shifted(self, logits, prior):
        return [z + math.log(p**self.strength + 1e-12) for z, p in zip(logits.tolist(), prior, strict=True)]

    def losses(self, joint, labels):
        logits = {(s, v): rows.logits["standard"] for s, views in joint.items() for v, rows in views.items()}
        weak, strong = logits["unlabeled", "weak"], logits["unlabeled", "strong"]
        rho = (20 / len(weak)) / (sum(COUNTS) / len(labels))
        labeled = unlabeled = 0.0
        for view in ("weak", "strong"):
            for row, label in zip(logits["labeled", view], labels.tolist(), strict=True):
                onehot = [float(k == label) for k in range(CLASSES)]
                labeled += cross_entropy(self.shifted(row, self.r), onehot) / (2 * len(labels))
        for u, row in enumerate(weak):
            q = softmax(self.shifted(row, self.u))
            if max(q) >= self.tau:
                self.A = [a + x for a, x in zip(self.A, q, strict=True)]
                for v in range(2):
                    unlabeled += cross_entropy(self.shifted(strong[v * len(weak) + u], self.r), q) / (2 * len(weak))
        for label in labels.tolist():
            self.B[label] += 1
        return labeled / rho, unlabeled

    def refresh(self):
        both = [a + b for a, b in zip(self.A, self.B, strict=True)]
        self.u = [0.9 * u + 0.1 * a / (sum(self.A) + 1) for u, a in zip(self.u, self.A, strict=True)]
        self.r = [0.9 * r + 0.1 * x / sum(both) for r, x in zip(self.r, both, strict=True)]
        self.A, self.B = [0.0] * CLASSES, [0.0] * CLASSES


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_losses_and_priors_are_those_of_the_equations_over_several_refreshes(strength):
    method, slow = tiny_method("simpro", tau=0.5, strength=strength, refreshes=3), SlowSimPro(0.5, strength)
    for step in range(9):
        batch = tiny_batch(method, seed=step)
        if step in (3, 6):
            slow.refresh()
        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, batch)
        labeled, unlabeled = slow.losses(joint, batch.labels["labeled"])
        out = tiny_step(method, batch, tiny_context(step, 9))
        assert out.logs["loss/labeled"].item() == pytest.approx(labeled, rel=1e-4)
        assert out.logs["loss/unlabeled"].item() == pytest.approx(unlabeled, rel=1e-4)
        assert method.unlabeled_prior.tolist() == pytest.approx(slow.u, rel=1e-5)
        assert method.loss_prior.tolist() == pytest.approx(slow.r, rel=1e-5)
    assert 0 < out.logs["pseudo/used"] < 1


def test_the_pseudo_labels_are_soft_and_those_of_the_estimated_prior():
    method, plain = tiny_method("simpro", tau=0.3), tiny_method("simpro", tau=0.3)
    method.unlabeled_prior.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
    batch = tiny_batch(method)
    assert (tiny_step(method, batch, tiny_context(1)).pseudo.target == 4).all()
    assert not (tiny_step(plain, batch, tiny_context(1)).pseudo.target == 4).all()


@pytest.mark.parametrize(("steps", "parts"), [(43_000, 86), (100, 7), (5, 86), (999, 1)])
def test_the_parts_of_a_run_begin_where_their_share_of_it_is_done(steps, parts):
    begin = [
        step for step in range(steps) if begins_part(tiny_context(0)._replace(step=step, progress=step / steps), parts)
    ]
    assert begin == sorted({math.ceil(part * steps / parts) for part in range(1, parts)} - {steps})
    if steps == 43_000:
        assert begin == list(range(500, 43_000, 500))


def test_its_state_is_saved_and_goes_on():
    method, other = tiny_method("simpro", tau=0.3), tiny_method("simpro", tau=0.3)
    for step in range(5):
        tiny_step(method, tiny_batch(method, seed=step), tiny_context(step, 20))
    other.load_state_dict(method.state_dict())
    for step in range(5, 9):
        batch, ctx = tiny_batch(method, seed=step), tiny_context(step, 20)
        assert torch.equal(tiny_step(method, batch, ctx).loss, tiny_step(other, batch, ctx).loss)
    assert torch.equal(method.loss_prior, other.loss_prior)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "simpro", tau=0.3, refreshes=250)
    assert state["unlabeled_prior"].unique().numel() == CLASSES
