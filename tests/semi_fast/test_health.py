"""Pseudo-labels counted on the device equal a plain loop over them."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semi_fast.observe.health import Health, Idleness, hidden_counts
from semi_fast.observe.metrics import EASY_FROM
from semi_fast.parts.losses import PseudoLabels
from semi_fast.training.evaluate import class_groups
from tests.semi_fast.sync_trap import SyncTrap
from tests.semi_fast.tiny import CLASSES, COUNTS

CPU = torch.device("cpu")
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


def oracle(hidden, unlabeled, found):
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
        labels = [hidden[row] for row in unlabeled]
        if labels and -1 not in labels:
            truth = [labels.count(k) / len(labels) for k in range(CLASSES)]
            figures["pseudo/class_gap"] = sum(abs(a - b) for a, b in zip(shares, truth, strict=True)) / 2
    return figures


@settings(deadline=None, max_examples=60)
@given(
    hidden=st.integers(-1, 0).flatmap(lambda low: st.lists(st.integers(low, CLASSES - 1), min_size=20, max_size=20)),
    unlabeled=st.lists(st.integers(0, 19), unique=True, max_size=20),
    steps=st.lists(samples, min_size=1, max_size=3),
)
def test_figures_equal_a_plain_loop(hidden, unlabeled, steps):
    health = Health(COUNTS, np.array(hidden), np.array(unlabeled, np.int64), CPU)
    for step in steps:
        target, confidence, mask, rows = zip(*step, strict=True)
        pseudo = PseudoLabels(torch.tensor(target), torch.tensor(confidence), torch.tensor(mask))
        health.add(pseudo.table(torch.tensor(rows)))
    got = health.figures(health.take().double().tolist())
    wanted = oracle(hidden, unlabeled, [sample for step in steps for sample in step])
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value), name
    assert health.figures(health.take().double().tolist()) == {}, "counting starts anew"


def test_counting_never_waits_for_the_device():
    health = Health(COUNTS, np.arange(20) % CLASSES, np.arange(20), CPU)
    pseudo = PseudoLabels(torch.tensor([0, 1, 2]), torch.tensor([0.9, 0.99, 0.1]), torch.tensor([True, True, False]))
    rows = torch.tensor([3, 4, 5])
    with SyncTrap():
        health.add(pseudo.table(rows))
        health.take()


def test_without_hidden_labels_there_is_no_accuracy():
    health = Health(COUNTS, np.full(20, -1), np.arange(20), CPU)
    pseudo = PseudoLabels(torch.tensor([1]), torch.tensor([0.99]), torch.tensor([True]))
    health.add(pseudo.table(torch.tensor([0])))
    figures = health.figures(health.take().double().tolist())
    assert figures == {
        "pseudo/easy": 1.0, "pseudo/hard": 0.0, "pseudo/ultra_hard": 0.0, "pseudo_histogram": [0, 1, 0, 0, 0],
    }  # fmt: skip


def test_hidden_counts_are_those_of_all_unlabeled_images_or_none():
    hidden = np.array([0, 2, 2, -1, 1])
    assert hidden_counts(hidden, np.array([1, 2, 4]), 4) == [0, 1, 2, 0]
    assert hidden_counts(hidden, np.array([1, 3]), 4) is None
    assert hidden_counts(hidden, np.array([], np.int64), 4) is None


def read_windows(windows, threshold=0.95, first=0):
    """What is said about log windows of 100 steps each, by the share of pseudo-labels used and their confidence."""
    said = []
    idleness = Idleness(threshold, first, said.append)
    for number, (used, confidence) in enumerate(windows, 1):
        figures = {"pseudo/used": used, "pseudo/confidence": confidence}
        idleness.read(first + 100 * number, {name: value for name, value in figures.items() if value is not None})
    return said


def test_pseudo_labels_that_are_never_used_are_said_once():
    warning = "warning: no pseudo-label has been used for 500 steps"
    advice = "Lower method.tau if that does not change."
    assert read_windows([(0.0, 0.3)] * 4) == []
    assert read_windows([(0.0, 0.3)] * 4 + [(0.01, 0.5)] + [(0.0, 0.3)] * 4) == []
    full = f"{warning} (mean confidence 0.312, threshold method.tau=0.95). {advice}"
    assert read_windows([(0.0, 0.312)] * 20) == [full]
    assert read_windows([(0.01, 0.5)] + [(0.0, 0.312)] * 5, first=7000) == [full]
    assert read_windows([(0.0, 0.3)] * 5, threshold=None) == [f"{warning} (mean confidence 0.300)."]
    assert read_windows([(0.0, None)] * 5, threshold=None) == [f"{warning}."]
    assert read_windows([(None, None)] * 20) == [], "a method that has no pseudo-labels"
