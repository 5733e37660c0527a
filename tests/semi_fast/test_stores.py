"""What earlier steps saw: rows written by a mask, draws by weight, the feature pool and the ring of images."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch

from semi_fast.parts.stores import FeaturePool, ImageRing, power_law, weighted_order, write_some
from tests.semi_fast.sync_trap import SyncTrap

K = 4


@pytest.mark.parametrize("chosen", [[], [0], [1, 3], [0, 1, 2, 3, 4]])
def test_chosen_rows_are_written_and_no_other(chosen):
    table = torch.arange(12.0).view(6, 2)
    places, values = torch.tensor([5, 2, 0, 3, 1]), -torch.arange(1.0, 11).view(5, 2)
    expected, mask = table.clone(), torch.zeros(5, dtype=torch.bool)
    for i in chosen:
        expected[places[i]], mask[i] = values[i], True
    with SyncTrap():
        write_some(table, places, values, mask)
    assert torch.equal(table, expected)


def test_places_come_by_weight():
    """The first of the order, over 10,000 draws, within four standard errors of its share."""
    weights, draws = torch.tensor([1.0, 4.0, 0.0, 2.0, 3.0]), 10_000
    uniform = torch.rand(draws, 5, generator=torch.Generator().manual_seed(0))
    orders = torch.stack([weighted_order(weights, u) for u in uniform])
    assert (orders[:, -1] == 2).all(), "what has no weight comes last"
    assert (orders.sort(1).values == torch.arange(5)).all()
    for place, weight in enumerate(weights.tolist()):
        share, expected = float((orders[:, 0] == place).float().mean()), weight / 10
        assert abs(share - expected) <= 4 * math.sqrt(expected * (1 - expected) / draws)
    both = torch.tensor([math.inf, 1.0, math.inf])
    assert weighted_order(both, torch.tensor([0.0, 0.99, 0.5])).tolist() == [0, 2, 1]


def test_power_law():
    torch.testing.assert_close(power_law(torch.tensor([8, 2, 4]), 2.0), torch.tensor([1 / 16, 1.0, 1 / 4]))


class SlowPool:
    """The pool as its rule has it, one candidate at a time."""

    def __init__(self, size, power):
        self.places, self.power = [None] * size, power

    def rates(self):
        counts = [max(1, sum(place is not None and place[1] == k for place in self.places)) for k in range(K)]
        phi = [count**-self.power for count in counts]
        return [x / max(phi) for x in phi]

    def put(self, features, classes, mask, uniform, leaving):
        rates, order = self.rates(), [i for i, place in enumerate(self.places) if place is None]
        keys = {}
        for i, place in enumerate(self.places):
            if place is not None:
                weight = max(1 - rates[place[1]], 1e-12)
                keys[i] = math.log(weight) - math.log(-math.log(min(max(leaving[i], 1e-12), 1 - 2**-24)))
        order += sorted(keys, key=lambda i: -keys[i])
        entered = 0
        for feature, k, offered, u in zip(features, classes, mask, uniform, strict=True):
            if offered and u < rates[k] and entered < len(self.places):
                self.places[order[entered]] = (feature, k)
                entered += 1
        return entered


@pytest.mark.parametrize("size", [5, 12])
def test_the_pool_is_the_slow_one(size):
    pool, slow = FeaturePool(K, 2, size, 1.5), SlowPool(size, 1.5)
    generator, entered = torch.Generator().manual_seed(0), 0
    for step in range(40):
        features = torch.randn(7, 2, generator=generator)
        classes = (torch.rand(7, generator=generator) ** 3 * K).long()  # mostly class 0
        mask = torch.rand(7, generator=generator) < (0.0 if step == 20 else 0.6)
        uniform, leaving = torch.rand(7, generator=generator), torch.rand(size, generator=generator)
        with SyncTrap():
            pool.put(features, classes, mask, uniform, leaving)
        entered += slow.put(features.tolist(), classes.tolist(), mask.tolist(), uniform.tolist(), leaving.tolist())
        for i, place in enumerate(slow.places):
            assert pool.classes[i] == (-1 if place is None else place[1])
            assert pool.features[i].tolist() == ([0.0, 0.0] if place is None else place[0])
    assert entered > 2 * size, "it must have been full"
    assert torch.bincount(pool.classes, minlength=K).tolist() == pool.counts().tolist()


def test_more_than_a_pool_holds():
    pool = FeaturePool(K, 1, 3, 0.0)
    zeros = torch.zeros(5, dtype=torch.int64)
    pool.put(torch.arange(5.0).view(5, 1), zeros, zeros == 0, torch.zeros(5), torch.rand(3))
    assert pool.features.flatten().tolist() == [0, 1, 2]


def test_rare_classes_stay_in_a_full_pool():
    pool, generator = FeaturePool(K, 1, 40, 3.0), torch.Generator().manual_seed(0)
    for _ in range(300):
        classes = torch.multinomial(torch.tensor([0.8, 0.1, 0.06, 0.04]), 16, replacement=True, generator=generator)
        everything = torch.ones(16, dtype=torch.bool)
        draws = torch.rand(16, generator=generator), torch.rand(40, generator=generator)
        pool.put(torch.zeros(16, 1), classes, everything, *draws)
    assert pool.counts().sum() == 40
    assert pool.counts().min() >= 7
    assert pool.counts().max() <= 14


def test_draws_from_the_pool_differ_and_follow_the_weights():
    pool = FeaturePool(K, 1, 10, 0.0)
    weights = torch.tensor([1.0, 4.0, 2.0, 1.0])
    features, _, there = pool.draw(weights, 6, torch.rand(10))
    assert not there.any()
    classes = torch.tensor([0, 0, 1, 2])
    pool.put(torch.arange(1.0, 5).view(4, 1), classes, torch.ones(4, dtype=torch.bool), torch.zeros(4), torch.rand(10))
    first, draws = torch.zeros(5), 1500
    for uniform in torch.rand(draws, 10, generator=torch.Generator().manual_seed(0)):
        features, drawn, there = pool.draw(weights, 6, uniform)
        assert there.tolist() == [True] * 4 + [False] * 2
        assert sorted(features[:4].flatten().tolist()) == [1, 2, 3, 4]
        assert drawn[:4].tolist() == [int(classes[int(f) - 1]) for f in features[:4]]
        first[int(features[0])] += 1
    for number, share in enumerate((1 / 8, 1 / 8, 4 / 8, 2 / 8), 1):
        assert abs(float(first[number]) / draws - share) <= 4 * math.sqrt(share * (1 - share) / draws)


def test_the_ring_holds_the_newest_of_each_class_and_source():
    ring = ImageRing(2, K, 3, 1, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    slow = [[deque(maxlen=3) for _ in range(K)] for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for step in range(15):
        packed = torch.randint(256, (9, 3, 1, 1), generator=generator, dtype=torch.uint8)
        classes = (torch.rand(9, generator=generator) ** 2 * K).long()  # often more than three of a class in a step
        mask = torch.rand(9, generator=generator) < 0.7
        with SyncTrap():
            ring.push(step % 2, packed, classes, mask)
        for image, k, taken in zip(packed, classes.tolist(), mask.tolist(), strict=True):
            if taken:
                slow[step % 2][k].append(image)
        images = ring.images.view(2, K, 3, 3, 1, 1)
        for source in range(2):
            for k in range(K):
                count = len(slow[source][k])
                assert ring.counts[source, k] == count
                held = {tuple(x.flatten().tolist()) for x in images[source, k, :count]}
                assert held == {tuple(x.flatten().tolist()) for x in slow[source][k]}


def test_images_come_back_as_they_were():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ring = ImageRing(1, 1, 256, 2, mean, std)
    pixels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 2, 2)
    normalized = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(ring.pack(normalized), pixels)
    zeros = torch.zeros(256, dtype=torch.int64)
    ring.push(0, ring.pack(normalized), zeros, zeros == 0)
    drawn, _ = ring.draw(zeros, torch.ones(1, 1), torch.stack([torch.zeros(256), torch.arange(256) / 256], 1))
    torch.testing.assert_close(drawn, normalized)
    half = ring.pack(normalized.bfloat16()).int() - pixels.int()
    assert half.abs().max() <= 1, "bfloat16 has 8 bits"


def test_draws_from_the_ring_follow_the_weights_of_the_classes_there_are():
    ring = ImageRing(2, K, 2, 1, (0.0,) * 3, (1.0,) * 3)
    classes = torch.tensor([0, 2, 2, 3])
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 1, 1)
    ring.push(1, images, classes, torch.ones(4, dtype=torch.bool))
    weights, n = torch.tensor([[9.0] * K, [1.0, 5.0, 6.0, 3.0]]), 20_000
    uniform = torch.rand(n, 2, generator=torch.Generator().manual_seed(0))
    drawn, labels = ring.draw(torch.ones(n, dtype=torch.int64), weights, uniform)
    numbers = (drawn[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(classes[numbers], labels)
    for number, share in enumerate((0.1, 0.3, 0.3, 0.3)):
        got = float((numbers == number).float().mean())
        assert abs(got - share) <= 4 * math.sqrt(share * (1 - share) / n), number
    largest = torch.full((1, 2), 1 - 2**-24)
    assert ring.draw(torch.ones(1, dtype=torch.int64), weights, largest)[1].item() == 3
