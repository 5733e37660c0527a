"""Evaluation against counting by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from semi_fast.nets import build_net
from semi_fast.training.evaluate import batch_size, class_groups, evaluate, metrics


class Fixed(nn.Module):
    """Predicts the class written into the first pixel; its second head is off by one."""

    reported = "first"

    def predict(self, x):
        k = x[:, 0, 0, 0].long()
        return {"first": nn.functional.one_hot(k, 4).float(), "second": nn.functional.one_hot((k + 1) % 4, 4).float()}


def batches(predicted, true, size=3):
    for i in range(0, len(true), size):
        x = torch.zeros(len(true[i : i + size]), 3, 2, 2)
        x[:, 0, 0, 0] = torch.tensor(predicted[i : i + size]).float()
        yield x, torch.tensor(true[i : i + size])


def test_counts_agree_with_a_plain_loop():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 3, 50).tolist(), rng.integers(0, 4, 50).tolist()
    model = Fixed().train()
    found = evaluate(model, batches(predicted, true), [9, 5, 2, 1])
    assert list(found) == ["first", "second"]
    table = np.zeros((4, 4), dtype=int)
    for t, p in zip(true, predicted, strict=True):
        table[t, p] += 1
    assert (found["first"].confusion == table).all()
    assert found["first"].accuracy == pytest.approx(
        100 * sum(t == p for t, p in zip(true, predicted, strict=True)) / 50
    )
    assert found["first"].balanced == pytest.approx(np.mean([100 * table[k, k] / table[k].sum() for k in range(3)]))
    assert found["first"].per_class[3] is None  # no test image of class 3
    assert found["second"].accuracy < found["first"].accuracy or found["first"].accuracy < 50
    assert model.training


def test_groups_are_thirds_by_labeled_count():
    assert class_groups([500, 299, 179, 107, 64, 38, 23, 13, 8, 5]) == {
        "many": [0, 1, 2],
        "medium": [3, 4, 5, 6],
        "few": [7, 8, 9],
    }
    assert class_groups([1, 50, 10]) == {"many": [1], "medium": [2], "few": [0]}
    assert class_groups([3, 9]) == {"many": [1], "few": [0]}


def test_group_accuracies_are_means_of_their_classes():
    figures = metrics(np.array([[8, 2, 0], [0, 5, 5], [0, 9, 1]]), [30, 20, 10])
    assert figures.groups == {"many": 80.0, "medium": 50.0, "few": 10.0}
    assert figures.scalars("eval")["eval/few"] == 10.0


def test_shares_of_several_processes_add_up_and_an_empty_one_adds_nothing(monkeypatch):
    """What each rank counts is gathered as it is; here the other ranks' counts stand ready."""
    true, predicted = [0, 1, 2, 2, 1, 0, 3], [0, 2, 2, 2, 1, 1, 3]
    whole = evaluate(Fixed(), batches(predicted, true), [9, 5, 2, 1])
    kept = []
    monkeypatch.setattr("semi_fast.training.evaluate.gather_objects", lambda counted: kept.append(counted) or [counted])
    for share in (slice(0, 4), slice(4, 7)):
        evaluate(Fixed(), batches(predicted[share], true[share]), [9, 5, 2, 1])
    first, second = kept
    monkeypatch.setattr("semi_fast.training.evaluate.gather_objects", lambda nothing: [nothing, first, second])
    shared = evaluate(Fixed(), [], [9, 5, 2, 1])
    assert list(shared) == list(whole)
    for name in whole:
        assert (shared[name].confusion == whole[name].confusion).all()


def test_a_compiled_prediction_sees_one_shape_and_the_figures_stay():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 11).tolist(), rng.integers(0, 4, 11).tolist()
    model, shapes = Fixed(), []

    def predict(x):
        shapes.append((tuple(x.shape), x.stride()))
        return model.predict(x)

    whole = evaluate(model, batches(predicted, true), [9, 5, 2, 1])
    laid_out = ((x.contiguous(memory_format=torch.channels_last), y) for x, y in batches(predicted, true))
    filled = evaluate(model, laid_out, [9, 5, 2, 1], predict=predict)
    assert len(shapes) == 4
    assert set(shapes) == {((3, 3, 2, 2), (12, 1, 6, 3))}
    for name, figures in whole.items():
        assert (filled[name].confusion == figures.confusion).all()


def test_the_network_of_training_compiles_once_more_for_all_of_an_evaluation():
    """Whatever its own compilation, and whatever its weights have become in between."""
    from torch._dynamo.testing import CompileCounter

    class Small(Fixed):
        def __init__(self):
            super().__init__()
            self.net, self.head = build_net("wrn10_1", bn_momentum=0.1), nn.Linear(64, 4)

        def predict(self, x):
            return {"first": self.head(self.net(x))}

    model, counter = Small(), CompileCounter()
    model.net.compile(backend="eager")
    predict = torch.compile(model.predict, dynamic=False, backend=counter)
    images = list(batches([1, 2, 3, 1], [1, 2, 3, 1]))
    for _ in range(2):
        model.head.bias.data[1] += 9
        found, plain = (evaluate(model, images, [9, 5, 2, 1], predict=p)["first"] for p in (predict, None))
        assert (found.confusion == plain.confusion).all()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("images", "side", "device", "size"),
    [
        (10_000, 32, "cuda", 2_000),
        (6_350, 64, "cuda", 489),
        (10_000, 32, "cpu", 127),
        (359, 16, "cpu", 359),
        (7, 1024, "cpu", 1),
        (0, 32, "cpu", 1),
    ],
)
def test_batches_of_an_evaluation_are_large_on_a_gpu_and_alike(images, side, device, size):
    assert batch_size(images, side, torch.device(device)) == size
    assert -(-images // size) * size - images < max(1, -(-images // size)), "hardly filled up"
