"""Long-tailed counts and selections."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.recipes.splits import fraction_counts, long_tail_counts, parse_gamma, select

PUBLISHED = [
    (500, "100", [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]),
    (4000, "100", [4000, 2397, 1437, 861, 516, 309, 185, 111, 66, 40]),
    (4000, "1/100", [40, 66, 111, 185, 309, 516, 861, 1437, 2397, 4000]),
    (1500, "100", [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]),
    (3000, "100", [3000, 1798, 1078, 646, 387, 232, 139, 83, 50, 30]),
    (500, "150", [500, 286, 164, 94, 53, 30, 17, 10, 5, 3]),
    (1500, "150", [1500, 859, 492, 282, 161, 92, 53, 30, 17, 10]),
    (4000, "1", [4000] * 10),
]
SUMS = [
    (10, 4000, 100, 9922), (10, 4000, 150, 9329), (10, 3000, 150, 6996),
    (100, 50, 10, 1911), (100, 400, 10, 15651), (100, 150, 10, 5835), (100, 300, 10, 11720),
    (100, 50, 20, 1545), (100, 400, 20, 12719), (100, 150, 20, 4741), (100, 300, 20, 9527),
    (10, 150, 10, 609), (10, 450, 10, 1835), (10, 150, 20, 507), (10, 450, 20, 1528),
]  # fmt: skip


@pytest.mark.parametrize(("first", "gamma", "expected"), PUBLISHED)
def test_counts_are_the_published_ones(first: int, gamma: str, expected: list[int]) -> None:
    assert long_tail_counts(first, parse_gamma(gamma), 10) == expected


@pytest.mark.parametrize(("classes", "first", "gamma", "total"), SUMS)
def test_totals_are_the_published_ones(classes: int, first: int, gamma: int, total: int) -> None:
    assert sum(long_tail_counts(first, parse_gamma(str(gamma)), classes)) == total


@given(st.integers(0, 5000), st.fractions(1, 400, max_denominator=7), st.integers(2, 60))
def test_each_count_is_the_exact_floor(first: int, ratio: Fraction, classes: int) -> None:
    counts = long_tail_counts(first, parse_gamma(str(ratio)), classes)
    last = classes - 1
    assert counts[0] == first
    assert counts[-1] == int(Fraction(first) / ratio)
    for k, n in enumerate(counts):  # n <= first * ratio^(-k/last) < n + 1, in integers
        assert Fraction(n) ** last * ratio**k <= Fraction(first) ** last < Fraction(n + 1) ** last * ratio**k


def test_gamma_forms() -> None:
    assert parse_gamma("1/100") == parse_gamma("0.01")
    assert (parse_gamma("1/100").slug, parse_gamma("100").slug, parse_gamma("1").slug) == ("rev100", "100", "1")
    assert str(parse_gamma("0.01")) == "1/100"
    assert [parse_gamma(text).slug for text in ("middle:100", "head-tail:12.5")] == ["middle100", "head-tail25over2"]
    assert [str(parse_gamma(text)) for text in (" middle:100", "head-tail:12.5")] == ["middle:100", "head-tail:25/2"]
    for wrong in ("x", "0", "-3", "1/0", "", "middle", "middle:", "middle:1/100", "tail:100", ":100", "rev:100"):
        with pytest.raises(UserError, match=f"--gamma-u is a ratio .* middle:100 or head-tail:100, got '{wrong}'"):
            parse_gamma(wrong)


SHAPES = [
    (10, 4000, "middle:100", [66, 185, 516, 1437, 4000, 2397, 861, 309, 111, 40]),
    (10, 4000, "head-tail:100", [4000, 1437, 516, 185, 66, 40, 111, 309, 861, 2397]),
    (5, 400, "middle:16", [50, 200, 400, 100, 25]),
    (5, 400, "head-tail:16", [400, 100, 25, 50, 200]),
    (3, 9, "middle:1", [9, 9, 9]),
]


@pytest.mark.parametrize(("classes", "first", "gamma", "expected"), SHAPES)
def test_shapes_deal_the_same_counts_out_from_the_middle_or_from_both_ends(classes, first, gamma, expected) -> None:
    assert long_tail_counts(first, parse_gamma(gamma), classes) == expected
    ratio = gamma.partition(":")[2]
    assert sorted(expected, reverse=True) == long_tail_counts(first, parse_gamma(ratio), classes)


@given(
    st.lists(st.integers(0, 3), min_size=40, max_size=120),
    st.integers(1, 8),
    st.integers(0, 12),
    st.sampled_from(["first", "random"]),
    st.booleans(),
)
def test_selection_keeps_its_promises(labels: list[int], n: int, m: int, selection: str, disjoint: bool) -> None:
    classes = np.array([*labels, 0, 1, 2, 3])
    counts, more = [n, n, 1, 1], [m, 1, m, 0]
    split = select(classes, tuple("abcd"), counts, more, selection=selection, seed=3, disjoint=disjoint)
    labeled, unlabeled = split.rows[split.labeled], split.rows[split.unlabeled]
    assert np.array_equal(np.union1d(labeled, unlabeled), split.rows)
    assert all(np.all(np.diff(part) > 0) for part in (split.rows, split.labeled, split.unlabeled))
    short = 0
    for k in range(4):
        have = int(np.sum(classes == k))
        assert np.sum(classes[labeled] == k) == min(counts[k], have)
        expected = min(have, counts[k] + more[k]) - (min(counts[k], have) if disjoint else 0)
        assert np.sum(classes[unlabeled] == k) == expected
        short += have < counts[k] + more[k]
        if selection == "first":
            assert np.array_equal(labeled[classes[labeled] == k], np.flatnonzero(classes == k)[: counts[k]])
    assert len(split.shortfalls) == short
    overlap = set(labeled) & set(unlabeled)
    assert overlap == (set() if disjoint else set(labeled))


def test_random_selection_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(3), 50)
    draw = [select(labels, tuple("abc"), [5] * 3, [9] * 3, selection="random", seed=s).rows.tolist() for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]
    # Fixed for good: a split must be the same with every version of NumPy.
    assert select(labels, tuple("abc"), [3, 0, 0], [0] * 3, selection="random", seed=1).rows.tolist() == [3, 5, 24]


def test_a_class_without_images_is_an_error() -> None:
    with pytest.raises(UserError, match="Class 'b' has no training image, the split asks for 2"):
        select(np.array([0, 0, 2]), tuple("abc"), [2, 2, 1], [0, 0, 0])


def test_fraction_counts_round_half_up_and_leave_no_class_out() -> None:
    assert fraction_counts([1300, 25, 4, 1, 0], 0.1) == [130, 3, 1, 1, 0]
    assert fraction_counts([10, 3], 1.0) == [10, 3]
