"""Pseudo-labels counted on the device equal a plain loop over them."""

import collections

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.observe.health import Health
from semi_fast.observe.metrics import EASY_FROM
from semi_fast.parts.losses import PseudoLabels
from semi_fast.training.evaluate import class_groups
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import CLASSES, COUNTS, tiny_info

samples = st.lists(
    st.tuples(
        st.integers(0, CLASSES - 1),  # pseudo-label
        st.sampled_from([0.2, 0.7, 0.9499, EASY_FROM, 1.0, float("nan")]),
        st.booleans(),  # used
        st.integers(0, 19),  # row
    ),
    min_size=1,
    max_size=30,
)


def oracle(hidden, found):
    """The definitions, one image after another."""
    used = [(t, c, row) for t, c, mask, row in found if mask]
    n = len(found)
    easy = sum(c >= EASY_FROM for _, c, _ in used)
    figures = {"pseudo/easy": easy / n, "pseudo/hard": (len(used) - easy) / n, "pseudo/ultra_hard": 1 - len(used) / n}
    groups = {"": range(CLASSES), **{f"_{name}": m for name, m in class_groups(COUNTS).items()}}
    for name, members in groups.items():
        judged = [t == hidden[row] for t, _, row in used if hidden[row] in members]
        if judged:
            figures[f"pseudo/accuracy{name}"] = 100 * sum(judged) / len(judged)
    if used:
        counts = collections.Counter(t for t, _, _ in used)
        shares = [counts[k] / len(used) for k in range(CLASSES)]
        figures["pseudo_histogram"] = shares
        truth = [count / sum(COUNTS) for count in COUNTS]
        figures["pseudo/class_gap"] = sum(abs(a - b) for a, b in zip(shares, truth, strict=True)) / 2
    return figures


@settings(deadline=None, max_examples=60)
@given(
    hidden=st.lists(st.integers(-1, CLASSES - 1), min_size=20, max_size=20),
    steps=st.lists(samples, min_size=1, max_size=3),
)
def test_figures_equal_a_plain_loop(hidden, steps):
    health = Health(tiny_info(), torch.tensor(hidden))
    for step in steps:
        target, confidence, mask, rows = zip(*step, strict=True)
        health.add(PseudoLabels(torch.tensor(target), torch.tensor(confidence), torch.tensor(mask)), torch.tensor(rows))
    got = health.figures(health.take().double().tolist())
    wanted = oracle(hidden, [sample for step in steps for sample in step])
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value), name
    assert health.figures(health.take().double().tolist()) == {}, "counting starts anew"


def test_counting_never_waits_for_the_device():
    health = Health(tiny_info(), torch.arange(20) % CLASSES)
    pseudo = PseudoLabels(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.99, 0.1]), torch.tensor([True, True, False]))
    rows = torch.tensor([3, 4, 5])
    with SyncTrap():
        health.add(pseudo, rows)
        health.take()


def test_without_hidden_labels_there_is_no_accuracy():
    info = tiny_info()._replace(unlabeled_counts=None)
    health = Health(info, torch.full((20,), -1))
    health.add(PseudoLabels(torch.tensor([1]), torch.tensor([0.99]), torch.tensor([True])), torch.tensor([0]))
    figures = health.figures(health.take().double().tolist())
    assert figures == {
        "pseudo/easy": 1.0, "pseudo/hard": 0.0, "pseudo/ultra_hard": 0.0, "pseudo_histogram": [0, 1, 0, 0, 0],
    }  # fmt: skip
