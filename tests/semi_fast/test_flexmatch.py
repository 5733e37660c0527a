"""FlexMatch: its thresholds, the last confident label of every image, several processes."""

from __future__ import annotations

import pytest
import torch

from semi_fast.methods import flexmatch
from semi_fast.parts.forward import Rows, forward_jointly
from semi_fast.parts.losses import PseudoLabels
from tests.semi_fast.tiny import CLASSES, FEATURES, tiny_batch, tiny_context, tiny_info, tiny_method, tiny_step

LATE = tiny_context(400)
TAU = 0.6  # the untrained tiny network reaches it for some images and misses it for others


class Slow:
    """Curriculum pseudo-labeling as its equations have it, one image at a time."""

    def __init__(self, images, classes=CLASSES, tau=TAU, warmup=True):
        self.last = [-1] * images
        self.classes, self.tau, self.warmup = classes, tau, warmup

    def thresholds(self):
        sigma = [self.last.count(k) for k in range(self.classes)]
        most = max(*sigma, self.last.count(-1)) if self.warmup else max(sigma)
        beta = [s / most if most else 0.0 for s in sigma]
        return [self.tau * b / (2 - b) for b in beta]

    def step(self, probabilities, rows):
        """The mask of a step."""
        thresholds = self.thresholds()
        mask = []
        for p, row in zip(probabilities.tolist(), rows, strict=True):
            k = p.index(max(p))
            mask.append(max(p) >= thresholds[k])
            if max(p) >= self.tau:
                self.last[row] = k
        return mask


def step_on(method, weak_logits, rows):
    """One step on logits given in advance; the strong views are the weak ones."""
    count = len(rows)
    unlabeled = Rows(torch.zeros(count, FEATURES), {"standard": weak_logits})
    labeled = Rows(torch.zeros(2, FEATURES), {"standard": torch.zeros(2, CLASSES)})
    joint = {"labeled": {"weak": labeled}, "unlabeled": {"weak": unlabeled, "strong": unlabeled}}
    labels = {"labeled": torch.zeros(2, dtype=torch.int64)}
    return method.objective(joint, labels, {"unlabeled": torch.tensor(rows)}, None)


def test_thresholds_are_the_test_vector():
    """sigma = [40, 10, 0] and 50 images without a confident label yet."""
    info = tiny_info()._replace(num_classes=3, labeled_counts=(3, 2, 1), num_train=200, num_unlabeled=100)
    method = flexmatch.FlexMatch(tiny_method("flexmatch").net, info)
    method.learned.copy_(torch.tensor([40, 10, 0]))
    torch.testing.assert_close(method.thresholds(), torch.tensor([0.6333, 0.1056, 0.0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(method.statistics(6)["flexmatch/threshold"], method.thresholds())
    method.learned.copy_(torch.tensor([60, 30, 10]))  # all learned: compared among themselves
    torch.testing.assert_close(method.thresholds(), 0.95 * torch.tensor([1.0, 0.5 / 1.5, 1 / 11]))


def test_everything_passes_before_the_first_confident_label():
    method = tiny_method("flexmatch")
    assert (method.thresholds() == 0).all()
    out = step_on(method, torch.zeros(4, CLASSES), [0, 1, 2, 3])
    assert out.pseudo.mask.all()
    assert (method.last == -1).all()
    assert method.learned.sum() == 0


@pytest.mark.parametrize("warmup", [True, False])
def test_masks_and_labels_are_those_of_the_slow_version(warmup):
    method = tiny_method("flexmatch", tau=TAU, threshold_warmup=warmup)
    method.num_unlabeled = 12
    slow = Slow(12, warmup=warmup)
    generator = torch.Generator().manual_seed(0)
    masked = relabeled = 0
    for _ in range(30):
        logits = torch.randn(8, CLASSES, generator=generator) * 2 + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0])
        rows = torch.randint(12, (8,), generator=generator).tolist()  # an image may come twice
        before = list(slow.last)
        torch.testing.assert_close(method.thresholds(), torch.tensor(slow.thresholds()))
        out = step_on(method, logits, rows)
        mask = slow.step(logits.softmax(1), rows)
        assert out.pseudo.mask.tolist() == mask
        assert torch.where(method.last < 0, -1, method.last % CLASSES)[:12].tolist() == slow.last
        assert method.learned.tolist() == [slow.last.count(k) for k in range(CLASSES)]
        masked += len(mask) - sum(mask)
        relabeled += sum(old not in (-1, new) for old, new in zip(before, slow.last, strict=True))
    assert masked > 10
    assert relabeled > 10
    assert (method.last[12:] == -1).all()


def test_the_later_label_of_an_image_met_twice_stays():
    method = tiny_method("flexmatch", tau=TAU)
    one, two = 9.0 * torch.eye(CLASSES)[[1, 2]]
    step_on(method, torch.stack([one, two, two, one]), [5, 5, 7, 7])
    assert method.last[[5, 7]].remainder(CLASSES).tolist() == [2, 1]
    assert method.learned.tolist() == [0, 1, 1, 0, 0]
    step_on(method, torch.stack([one, 0 * two]), [5, 7])
    assert method.learned.tolist() == [0, 2, 0, 0, 0], "an unsure prediction takes no label away"


def test_the_loss_of_a_step_is_fixmatchs_with_its_own_mask():
    method = tiny_method("flexmatch", tau=TAU, strong_views=2, unlabeled_weight=0.5)
    method.learned.copy_(torch.tensor([20, 19, 18, 17, 15]))
    batch = tiny_batch(method)
    with torch.no_grad():
        unlabeled = forward_jointly(method.net, method.heads, batch)["unlabeled"]
    p = unlabeled["weak"].logits["standard"].softmax(1)
    thresholds = method.thresholds()
    out = tiny_step(method, batch, LATE)
    strong = -unlabeled["strong"].logits["standard"].log_softmax(1)
    total = used = 0
    for u in range(len(p)):
        k = int(p[u].argmax())
        if p[u, k] >= thresholds[k]:
            used += 1
            total += float(strong[u, k] + strong[len(p) + u, k])
    assert 0 < used < len(p)
    assert out.logs["loss/unlabeled"].item() == pytest.approx(0.5 * total / (2 * len(p)), rel=1e-5)
    assert out.logs["pseudo/used"].item() == pytest.approx(used / len(p))


def test_ranks_keep_the_state_of_one_process(monkeypatch):
    """Two ranks with half of the batch each: what the first hands out is given to it with the second's."""
    whole, shared = tiny_method("flexmatch", tau=TAU), tiny_method("flexmatch", tau=TAU)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        logits = torch.randn(8, CLASSES, generator=generator) * 3
        rows = torch.randint(6, (8,), generator=generator)
        confidence, target = logits.softmax(1).max(1)
        pseudo = PseudoLabels(target, confidence, confidence >= TAU)
        step_on(whole, logits, rows.tolist())
        second = torch.stack([rows[4:], target[4:], pseudo.mask[4:].long()], 1)
        monkeypatch.setattr(flexmatch, "gather_ranks", lambda x, other=second: torch.stack([x, other]))
        step_on(shared, logits[:4], rows[:4].tolist())
        monkeypatch.undo()
    assert whole.learned.sum() > 0
    for key in ("last", "learned", "seen"):
        assert torch.equal(shared.state_dict()[key], whole.state_dict()[key]), key
