"""CCL: the combined label, the two distributions, class scores, propagation, both contrastive losses."""

import math

import pytest
import torch

from semi_fast.parts.contrast import Projection, class_scores, propagate
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_batch, tiny_context, tiny_method, tiny_step

PRIOR = torch.tensor(COUNTS) / sum(COUNTS)


def unit(rows, size, seed=0):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def slow_scores(features, keys, members, temperature, without=False):
    """The softmax over classes of ln of the mean kernel of a class's keys."""
    rows = []
    for i, f in enumerate(features):
        means = []
        for k in range(members.shape[1]):
            over = [j for j in range(len(keys)) if not (without and j == i)]
            total = sum(float(members[j, k]) * math.exp(float(f @ keys[j]) / temperature) for j in over)
            means.append((total + 1e-6) / (sum(float(members[j, k]) for j in over) + 1e-6))
        rows.append([mean / sum(means) for mean in means])
    return torch.tensor(rows)


@pytest.mark.parametrize("without", [True, False])
def test_class_scores_are_the_slow_versions(without):
    features = unit(12, 6)
    members = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) * (torch.arange(12) % 3 > 0).unsqueeze(1)
    members[:, 3] = 0  # a class without keys
    scores = class_scores(features, features, members, 0.2, leave_out_self=without)
    expected = slow_scores(features, features, members, 0.2, without)
    torch.testing.assert_close(scores.exp(), expected, rtol=1e-4, atol=1e-6)


def test_keys_that_do_not_count_are_as_if_they_were_left_out():
    """Fixed shapes: masks in place of indexing, in the mean over the items too."""
    features, kept = unit(10, 6), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1, 1]).float()
    members = torch.rand(10, 4, generator=torch.Generator().manual_seed(1))
    masked = class_scores(features, features, members * kept.unsqueeze(1), 0.2, leave_out_self=True)
    some = kept > 0
    indexed = class_scores(features[some], features[some], members[some], 0.2, leave_out_self=True)
    torch.testing.assert_close(masked[some], indexed)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.9])
def test_propagation_solves_the_linear_system(alpha):
    features, p = unit(20, 6), torch.rand(20, 4, generator=torch.Generator().manual_seed(2)).softmax(1)
    S = torch.tensor([[math.exp(float(a @ b)) for b in features] for a in features]).double()
    S = S / S.sum(1, keepdim=True)
    expected = torch.linalg.solve(torch.eye(20).double() - alpha * S, (1 - alpha) * p.double())
    P = propagate(features, p, alpha)
    torch.testing.assert_close(P, expected.float())
    torch.testing.assert_close(P.sum(1), torch.ones(20))


def test_projections_have_unit_length_and_keep_no_statistics():
    projection = Projection(8)
    torch.testing.assert_close(projection(torch.randn(5, 8)).norm(dim=1), torch.ones(5))
    assert projection(torch.randn(5, 8)).shape == (5, 16)
    assert not list(projection.buffers())


def combined(weak, distributions, mu, strength=2.0):
    u, r = distributions
    share, rows = mu / (1 + mu), []
    for a, b in zip(weak["standard"], weak["balanced"], strict=True):
        rows.append([
            0.5 * (float(a[k]) - math.log((1 - share) * float(PRIOR[k]) + share * float(r[k]))
                   + (1 + strength / 2) * math.log(float(u[k])))
            + 0.5 * float(b[k])
            for k in range(CLASSES)
        ])  # fmt: skip
    return torch.tensor(rows)


@pytest.mark.parametrize("centers", ["own", "ones"])
def test_the_losses_are_the_slow_versions(centers):
    method = tiny_method("ccl", tau=0.4, energy=-1.2, centers=centers)
    method.distributions.copy_(torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.1, 0.2, 0.2, 0.2, 0.3]]))
    batch = tiny_batch(method)
    labels = batch.labels["labeled"].tolist()
    with torch.no_grad():
        joint = forward_jointly(method.net, method.heads, batch)
        parts = joint["labeled"]["strong"], joint["unlabeled"]["weak"], joint["unlabeled"]["strong"]
        f_l, f_w, f_s = method.projection(torch.cat([rows.features for rows in parts])).split([12, 10, 20])
        middle = method.centers(method.heads["balanced"].weight)
    pairs = ("labeled", "weak"), ("unlabeled", "weak"), ("unlabeled", "strong")
    labeled, weak, strong = (joint[stream][view].logits for stream, view in pairs)
    mu, r = 10 / 6, method.distributions[1]
    z = combined(weak, method.distributions, mu)
    q = z.softmax(1)
    confidence, target = q.max(1)
    energy = [-math.log(sum(math.exp(x) for x in row)) for row in z.tolist()]
    used, reliable = confidence >= 0.4, torch.tensor(energy) <= -1.2
    assert 0 < used.sum() < 10
    assert 0 < reliable.sum() < 10

    def ce(logits, y, shift=None):
        return -float((logits if shift is None else logits + 2 * shift.log()).log_softmax(0)[y])

    expected = dict.fromkeys(("labeled", "balanced_labeled", "unlabeled", "balanced_unlabeled"), 0.0)
    for i, y in enumerate(labels):
        expected["labeled"] += 0.7 * ce(labeled["standard"][i], y) / 6
        expected["balanced_labeled"] += 0.7 * ce(labeled["balanced"][i], y, PRIOR) / 6
    for i in range(20):
        if used[i % 10]:
            y = int(target[i % 10])
            expected["unlabeled"] += 0.7 * mu * ce(strong["standard"][i], y) / 20
            expected["balanced_unlabeled"] += 0.7 * mu * ce(strong["balanced"][i], y, r) / 20

    given = torch.eye(CLASSES)[labels].repeat(2, 1)
    own = torch.eye(CLASSES) if centers == "own" else torch.ones(CLASSES, CLASSES)
    keys, members = torch.cat([middle, f_l]), torch.cat([own, given])

    def propagated(f):
        S = (f @ f.T).softmax(1)
        return torch.linalg.solve(torch.eye(10) - 0.2 * S, 0.8 * slow_scores(f, keys, members, 0.1))

    P, P1, P2 = propagated(f_w), propagated(f_s[:10]), propagated(f_s[10:])
    sharp = P**4 / (P**4).sum(1, keepdim=True)
    mean = (P1 + P2) / 2
    terms = [-(sharp * P1.log()).sum(1), -(sharp * P2.log()).sum(1), -(mean * mean.log()).sum(1)]
    expected["neighbors"] = float(sum(terms).mean() / 3)

    both = reliable.repeat(2)  # here by indexing
    every = torch.cat([f_l, f_s[both]])
    soft = torch.cat([given, (q**4 / (q**4).sum(1, keepdim=True)).repeat(2, 1)[both]])
    log_p = slow_scores(every, every, soft, 0.1, without=True).log()
    expected["contrast"] = float(0.3 * -(soft * log_p).sum(1).mean())

    out = tiny_step(method, batch, tiny_context(0))
    for name, value in expected.items():
        assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-3), name
    assert out.logs["ccl/reliable"].item() == pytest.approx(float(reliable.float().mean()))
    assert torch.equal(out.pseudo.target, target)


class Labeled:
    """Rows 0, 1 and 2 are labeled, and among the unlabeled ones."""

    labeled = torch.arange(3)


def test_the_distributions_count_the_reliable_and_the_used_of_a_part_of_the_run():
    method = tiny_method("ccl", tau=0.4, energy=-1.2, refreshes=250, estimate_from=3)
    method.begin(0, Labeled())
    counts, expected = torch.ones(2, CLASSES), torch.full((2, CLASSES), 1 / CLASSES)
    refreshed = 0
    for step in range(12):
        batch = tiny_batch(method, seed=step)
        with torch.no_grad():
            weak = forward_jointly(method.net, method.heads, batch)["unlabeled"]["weak"].logits
        if step and step % 2 == 0:  # a part has two steps
            if step > 3:
                shares = counts / counts.sum(1, keepdim=True)
                expected = torch.stack([0.5 * (expected[0] + shares[0]), 0.9 * expected[1] + 0.1 * shares[1]])
                refreshed += 1
            counts = torch.ones(2, CLASSES)
        z = combined(weak, expected, 10 / 6)
        q = z.softmax(1)
        for i in range(10):
            if z[i].logsumexp(0) >= 1.2 and i > 2:
                counts[0] += q[i]
            if q[i].max() >= 0.4:
                counts[1] += q[i]
        tiny_step(method, batch, tiny_context(step))
        torch.testing.assert_close(method.distributions, expected)
        torch.testing.assert_close(method.counts, counts)
    assert refreshed == 4
    assert (counts > 1).any(1).all()


def test_labels_take_no_gradient_and_centers_follow_the_balanced_head():
    method = tiny_method("ccl", energy=0.0)
    batch = tiny_batch(method)
    joint = forward_jointly(method.net, method.heads, batch)
    weak = joint["unlabeled"]["weak"].logits
    for logits in weak.values():
        logits.retain_grad()
    method.objective(joint, batch.labels, batch.rows, None).loss.backward()
    assert all(logits.grad is None or not logits.grad.any() for logits in weak.values())
    assert all(parameter.grad.abs().sum() > 0 for parameter in method.centers[0].parameters() if parameter.dim() > 1)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "ccl", energy=-2.0, tau=0.4)
    assert not torch.equal(state["distributions"][0], torch.full((CLASSES,), 1 / CLASSES))
