"""TRAS: the transformation, both heads, against the equations written out."""

from __future__ import annotations

import math

import pytest
import torch

from semi_fast.methods import Context
from semi_fast.methods.tras import transformation
from semi_fast.parts.forward import forward_jointly
from semi_fast.parts.priors import class_prior
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_prepared, tiny_step

TAU = 0.4  # the untrained tiny network reaches it for some images and misses it for others
LONG_TAIL = (500, 299, 179, 107, 64, 38, 23, 13, 8, 5)


def test_strengths_are_the_test_vector():
    expected = torch.tensor([2.0079, 2.0132, 2.0220, 2.0368, 2.0616, 2.1037, 2.1713, 2.3031, 2.4925, 2.7880])
    torch.testing.assert_close(transformation(class_prior(LONG_TAIL), 2.0, 2.0), expected, atol=5e-5, rtol=0)


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


@pytest.mark.parametrize(("views", "epoch", "temperature"), [(2, 11, 2.0), (1, 499, 3.0), (2, 10, 2.0)])
def test_the_loss_is_the_slow_versions(views, epoch, temperature):
    options = {"transfer_scale": 3.0, "transfer_offset": 1.0, "teacher_temperature": temperature}
    method = tiny_method("tras", tau=TAU, strong_views=views, **options)
    batch = tiny_batch(method)
    with torch.no_grad():
        joint = forward_jointly(method.net, method.heads, batch)
    labeled, weak, strong = joint["labeled"]["weak"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
    pi = [count / sum(COUNTS) for count in COUNTS]
    log_pi = torch.tensor([math.log(p) for p in pi])
    strength = [3.0 * (1 / p) / sum(1 / q for q in pi) + 1.0 for p in pi]
    expected = dict.fromkeys(("labeled", "unlabeled", "balanced_labeled", "balanced_unlabeled"), 0.0)
    labels, size, sure = batch.labels["labeled"].tolist(), len(weak.features), [0, 0]
    for i, y in enumerate(labels):
        expected["labeled"] += ce(labeled.logits["standard"][i], y) / len(labels)
        if epoch >= 11:
            expected["balanced_labeled"] += ce(labeled.logits["balanced"][i] + log_pi, y) / len(labels)
    for u in range(size):
        p = (weak.logits["standard"][u] - log_pi).softmax(0)
        p_b = weak.logits["balanced"][u].softmax(0)
        k = int(p_b.argmax())
        sure[0] += int(p.max() >= TAU)
        sure[1] += int(p_b.max() >= TAU)
        for v in range(views):
            row = v * size + u
            if p.max() >= TAU:
                expected["unlabeled"] += ce(strong.logits["standard"][row], int(p.argmax())) / (views * size)
            if p_b.max() >= TAU and epoch >= 11:
                q = ((strong.logits["standard"][row] - strength[k] * log_pi) / temperature).softmax(0)
                terms = (float(q[j]) * ce(strong.logits["balanced"][row], j) for j in range(CLASSES))
                expected["balanced_unlabeled"] += sum(terms) / (views * size)
    assert 0 < sure[0] < size
    assert 0 < sure[1] < size

    out = tiny_step(method, batch, Context(epoch, epoch, epoch / 500))
    for name, value in expected.items():
        assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-5), name
    assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-5)
    assert out.logs["pseudo/used"].item() == pytest.approx(sure[0] / size)
    assert out.logs["pseudo/balanced_used"].item() == pytest.approx(sure[1] / size if epoch >= 11 else 0.0)


def test_the_standard_head_learns_nothing_from_what_it_teaches():
    method = tiny_method("tras", tau=0.01)
    batch, prepared = tiny_prepared(method, tiny_batch(method), tiny_context(400))
    joint = forward_jointly(method.net, method.heads, batch)
    logits = joint["unlabeled"]["strong"].logits
    other = {**joint["unlabeled"], "strong": joint["unlabeled"]["strong"]._replace(logits=dict(logits))}
    other["strong"].logits["standard"] = leaf = logits["standard"].detach().requires_grad_()
    teacher = method.teacher(leaf, torch.zeros(len(leaf), dtype=torch.int64))
    assert not teacher.requires_grad
    torch.testing.assert_close(teacher.sum(1), torch.ones(len(leaf)))
    out = method.objective({**joint, "unlabeled": other}, batch.labels, batch.rows, prepared)
    (given,) = torch.autograd.grad(out.loss, leaf)
    adjusted = joint["unlabeled"]["weak"].logits["standard"].detach() - method.prior.log()
    alone = torch.nn.functional.cross_entropy(leaf, adjusted.argmax(1).repeat(2))
    (expected,) = torch.autograd.grad(alone, leaf)
    torch.testing.assert_close(given, expected)


def test_classes_without_labels_leave_the_strengths_finite():
    strengths = transformation(class_prior((5, 0, 3)), 2.0, 2.0)
    torch.testing.assert_close(strengths, torch.tensor([2.0, 4.0, 2.0]))
