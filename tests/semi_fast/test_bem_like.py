"""The completion of our own: boxes, partners, mixed images, weights and statistics, one image at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.errors import UserError
from semi_fast.methods.bem_like import effective_number
from semi_fast.nets import build_net
from semi_fast.parts.class_activation import activation_maps, box_mask
from semi_fast.parts.forward import forward_jointly
from tests.semi_fast.shared_steps import assert_two_processes_keep_the_state_of_one
from tests.semi_fast.tiny import (
    AVERAGED,
    CLASSES,
    COUNTS,
    TinyNet,
    tiny_averaged,
    tiny_batch,
    tiny_context,
    tiny_info,
    tiny_method,
    tiny_step,
)

TAU = 0.4  # the untrained tiny network reaches it for some images and misses it for others


def test_effective_numbers_are_the_test_vector():
    counts = torch.tensor([500, 299, 179, 107, 64, 38, 23, 13, 8, 5])
    expected = torch.tensor([393.6, 258.6, 164.0, 101.5, 62.0, 37.3, 22.8, 12.9, 7.97, 4.99])
    torch.testing.assert_close(effective_number(counts, 0.999), expected, atol=0.06, rtol=0)
    assert effective_number(torch.tensor([0.0, 0.5, 1.0]), 0.999).tolist() == pytest.approx([1.0] * 3)


def test_the_box_holds_all_that_is_shown():
    shown = torch.rand(50, 6, 9, generator=torch.Generator().manual_seed(0)) > 0.95
    assert not shown.flatten(1).any(1).all()
    for image, box in zip(shown, box_mask(shown), strict=True):
        places = [(y, x) for y in range(6) for x in range(9) if image[y, x]]
        for y in range(6):
            for x in range(9):
                inside = bool(places) and (
                    min(p[0] for p in places) <= y <= max(p[0] for p in places)
                    and min(p[1] for p in places) <= x <= max(p[1] for p in places)
                )
                assert box[y, x] == inside


def slow_map(net, head, image, k):
    """The activation map of one image for class k."""
    features = net.maps(image.unsqueeze(0))[0]
    weighted = torch.zeros(features.shape[1:])
    for d in range(len(features)):
        weighted += head.weight[k, d] * features[d]
    grown = F.interpolate(weighted[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    return (grown - grown.min()) / (grown.max() - grown.min())


@pytest.mark.parametrize("name", ["wrn10_1", "resnet50"])
def test_the_map_is_that_of_the_class(name):
    torch.manual_seed(0)
    net = build_net(name, bn_momentum=0.1).eval()
    head, images, classes = nn.Linear(net.num_features, 3), torch.randn(2, 3, 32, 32), torch.tensor([2, 0])
    with torch.no_grad():
        torch.testing.assert_close(net.maps(images).mean((2, 3)), net(images))
        shown = activation_maps(net, head.weight, images, classes)
        for i in range(2):
            expected = slow_map(net, head, images[i], int(classes[i]))
            torch.testing.assert_close(shown[i], expected, atol=1e-4, rtol=1e-4)
    assert shown.amax((1, 2)).tolist() == [1.0, 1.0]
    assert shown.amin((1, 2)).tolist() == [0.0, 0.0]


def test_a_network_without_maps_is_refused_and_a_constant_map_shows_nothing():
    class Plain(nn.Module):
        num_features = 2

    with pytest.raises(UserError, match=r"needs features by place \(n, d, h, w\)"):
        activation_maps(Plain(), torch.zeros(3, 2), torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64))
    net = TinyNet().eval()
    maps = activation_maps(net, torch.randn(3, 8), torch.zeros(1, 3, 4, 4), torch.zeros(1, dtype=torch.int64))
    assert (maps == 0).all(), "all places are as bright"


class Slow:
    """Counts and entropies as the equations have them."""

    def __init__(self):
        self.u, self.e = [0.0] * CLASSES, [[math.log(CLASSES)] * CLASSES for _ in range(2)]

    def effective(self):
        return [(1 - 0.99 ** max(1, n + u)) / (1 - 0.99) for n, u in zip(COUNTS, self.u, strict=True)]

    def probabilities(self, source):
        weights = [(1 / E) ** 0.7 * e**0.3 for E, e in zip(self.effective(), self.e[source], strict=True)]
        return [w / sum(weights) for w in weights]

    def weights(self):
        raw = [(1 / E) * (1 + e / math.log(CLASSES)) for E, e in zip(self.effective(), self.e[1], strict=True)]
        return [w * CLASSES / sum(raw) for w in raw]

    def update(self, source, classes, entropies):
        for k in set(classes):
            of_class = [h for h, c in zip(entropies, classes, strict=True) if c == k]
            self.e[source][k] = 0.9 * self.e[source][k] + 0.1 * sum(of_class) / len(of_class)


def entropy(p):
    return -sum(float(x) * math.log(float(x)) for x in p)


def ce(logits, target):
    return -float(logits.double().log_softmax(0)[target])


def test_steps_are_those_of_the_slow_version():
    options = {"entropy_share": 0.3, "effective_beta": 0.99, "decay": 0.9, "threshold": 0.6, "mix_weight": 0.5}
    method, slow = tiny_method("bem_like", tau=TAU, bank_size=3, **options), Slow()
    sources, boxes = set(), set()
    for step in range(5):
        batch, ctx = tiny_batch(method, seed=step, unlabeled=9), tiny_context(step)
        before = {key: value.clone() for key, value in method.state_dict().items()}
        draws = method.inputs(batch, tiny_context(step))
        mixed, prepared = method.prepare(batch, draws, tiny_averaged)
        weak, strong = batch.of("unlabeled", "weak"), batch.of("unlabeled", "strong")
        labels, size = batch.labels["labeled"].tolist(), len(weak)

        # The labeled images are in the ring before partners are drawn.
        counts = before["ring.pushed"].clone()
        for y in labels:
            counts[0, y] += 1
        counts = counts.clamp_max(3).tolist()
        uncertain = [entropy(AVERAGED.heads["standard"](AVERAGED.net(x[None]))[0].softmax(0).detach()) for x in weak]
        median = sorted(uncertain)[size // 2]
        for u in range(size):
            source = int(uncertain[u] <= median and sum(counts[1]) > 0)
            p = [w if counts[source][k] else 0.0 for k, w in enumerate(slow.probabilities(source))]
            edges = [sum(p[: k + 1]) for k in range(CLASSES)]
            k = next(k for k in range(CLASSES) if float(draws[u, 0]) * edges[-1] < edges[k])
            slot = int(float(draws[u, 1]) * counts[source][k])
            stored = method.ring.images.view(2, CLASSES, 3, 3, 4, 4)[source, k, slot]
            partner = (stored / 255 - 0.5) / 0.2
            with torch.no_grad():
                shown = slow_map(AVERAGED.net, AVERAGED.heads["standard"], partner, k) > 0.6
            rows, columns = shown.any(1).nonzero().flatten().tolist(), shown.any(0).nonzero().flatten().tolist()
            expected, area = strong[u].clone(), (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            for y in range(rows[0], rows[-1] + 1):
                for x in range(columns[0], columns[-1] + 1):
                    expected[:, y, x] = partner[:, y, x]
            torch.testing.assert_close(mixed.of("unlabeled", "mixed")[u], expected)
            assert prepared.partners[u] == k
            assert prepared.kept[u].item() == pytest.approx(1 - area / 16)
            sources.add(source)
            boxes.add(area)
        assert torch.equal(mixed.images[: len(batch.images)], batch.images)

        with torch.no_grad():
            joint = forward_jointly(method.net, method.heads, mixed)
        views, expected = joint["unlabeled"], dict.fromkeys(("labeled", "unlabeled", "mixed"), 0.0)
        of_labeled = joint["labeled"]["weak"].logits["standard"]
        for i, y in enumerate(labels):
            expected["labeled"] += ce(of_labeled[i], y) / len(labels)
        targets, entropies, used = [], [], [0] * CLASSES
        for u in range(size):
            p = views["weak"].logits["standard"][u].softmax(0)
            targets.append(int(p.argmax()))
            entropies.append(entropy(p))
            if p.max() >= TAU:
                used[targets[u]] += 1
                expected["unlabeled"] += ce(views["strong"].logits["standard"][u], targets[u]) / size
                z, kept = views["mixed"].logits["standard"][u], float(prepared.kept[u])
                both = kept * ce(z, targets[u]) + (1 - kept) * ce(z, int(prepared.partners[u]))
                expected["mixed"] += 0.5 * slow.weights()[targets[u]] * both / size
        slow.update(0, labels, [entropy(z.softmax(0)) for z in of_labeled])
        slow.update(1, targets, entropies)
        slow.u = [0.9 * u + 0.1 * 20 / size * n for u, n in zip(slow.u, used, strict=True)]
        assert 0 < sum(used) < size

        method.load_state_dict(before)
        out = tiny_step(method, batch, ctx)
        for name, value in expected.items():
            assert out.logs[f"loss/{name}"].item() == pytest.approx(value, rel=1e-4), (step, name)
        assert out.loss.item() == pytest.approx(sum(expected.values()), rel=1e-4)
        torch.testing.assert_close(method.unlabeled_counts, torch.tensor(slow.u))
        torch.testing.assert_close(method.entropies, torch.tensor(slow.e))
        assert (method.ring.pushed[1] - before["ring.pushed"][1]).tolist() == used
    assert sources == {0, 1}
    assert len(boxes) > 3
    torch.testing.assert_close(method.class_weights().mean(), torch.tensor(1.0))
    shown = method.statistics(6)
    torch.testing.assert_close(shown["mix/partners"], torch.tensor(slow.probabilities(0)))
    torch.testing.assert_close(shown["mix/entropy"], torch.tensor(slow.e[1]))


def test_images_come_from_the_ring_as_the_data_sets_mean_and_std_have_them():
    method = tiny_method("bem_like")
    assert method.ring.mean.flatten().tolist() == pytest.approx(tiny_info().mean)
    assert method.ring.std.flatten().tolist() == pytest.approx(tiny_info().std)
    assert method.ring.images.dtype == torch.uint8
    assert method.ring.images.shape == (2 * CLASSES * 64, 3, 4, 4)


def test_two_processes_keep_the_state_of_one(tmp_path):
    state = assert_two_processes_keep_the_state_of_one(tmp_path, "bem_like", tau=0.7, bank_size=4, decay=0.5)
    assert (state["ring.pushed"].sum(1) > 4).all()
    assert state["ring.images"].any()


def test_no_figure_of_the_paper_is_taken_for_its_own(root: Path):
    assert "bem_like" not in (root / "semi_fast/reporting/paper_tables.csv").read_text(encoding="utf-8")
    said = "completion of our own; the paper's text gives no equations here"
    for file in ("semi_fast/methods/bem_like.py", "README.md", "docs/methods.md"):
        assert said in (root / file).read_text(encoding="utf-8"), file
