"""The paper's figures are found by the split a data folder records, and by nothing that only looks like it."""

from __future__ import annotations

import csv

import pytest

from data_prep.recipes.catalog import long_tail
from data_prep.recipes.whole import Imagenet127
from semi_fast.methods import check_options
from semi_fast.reporting.paper import TABLES, paper_figure, paper_figures


def cifar10(n1=500, m1=4000, gamma_l="100", gamma_u="100", **more):
    return long_tail("cifar10-lt", n1=n1, m1=m1, gamma_l=gamma_l, gamma_u=gamma_u, **more).options()


@pytest.mark.parametrize(
    ("split", "resolution", "method", "expected"),
    [
        (cifar10(), 32, "supervised", (1, 47.3, 0.95)),
        (cifar10(), 32, "semi", (1, 80.3, 0.41)),
        (cifar10(n1=1500, m1=3000, gamma_l="150", gamma_u="150"), 32, "supervised", (1, 58.2, 0.29)),
        (cifar10(gamma_u="1/100"), 32, "semi", (2, 83.5, 1.85)),
        (long_tail("cifar100-lt", gamma_u="1/10").options(), 32, "fixmatch", (3, 44.2, 0.43)),
        (long_tail("stl10-lt", n1=450, gamma_l="20").options(), 32, "semi", (2, 78.6, 0.90)),
        (Imagenet127(resolution=64).options(), 64, "semi", (4, 61.4, None)),
        (Imagenet127(resolution=32).options(), 32, "fixmatch", (4, 29.7, None)),
    ],
)
def test_a_cell_of_each_table(split, resolution, method, expected):
    figure = paper_figure(split, resolution, method, check_options(method, {}))
    assert (figure.table, figure.accuracy, figure.std) == expected


def test_every_row_of_the_file_is_found_under_its_own_setting():
    with TABLES.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 238
    for row in rows:
        split = {key: row[key] or None for key in ("dataset", "n1", "m1", "gamma_l", "gamma_u", "labeled_fraction")}
        cells = [(f.name, f.accuracy) for f in paper_figures(split, int(row["resolution"]))]
        assert (row["name"], float(row["accuracy"])) in cells
        assert len(cells) == len(set(cells))
        assert 0 < float(row["accuracy"]) < 100


@pytest.mark.parametrize(
    ("options", "accuracy"),
    [
        ({"bank": "fifo"}, 78.7),
        ({"oheml": False}, 77.4),
        ({"ea": False}, 79.7),
        ({"plce": False}, 79.5),
        ({"balanced_head": False}, 76.4),
        ({"tau": 0.8}, 80.3),
    ],
)
def test_ablations_are_rows_of_table_5(options, accuracy):
    resolved = check_options("semi", options)
    assert paper_figure(cifar10(), 32, "semi", resolved).accuracy == accuracy


def test_what_is_not_in_the_paper_has_no_figure():
    assert paper_figure(cifar10(), 32, "semi", check_options("semi", {"ea": False, "plce": False})) is None
    assert paper_figure(cifar10(), 64, "semi") is None
    assert paper_figure(cifar10(n1=499), 32, "semi") is None
    assert paper_figure(cifar10(gamma_u="middle:100"), 32, "semi") is None
    assert paper_figure(cifar10(disjoint=True), 32, "semi") is None
    assert paper_figure(Imagenet127(resolution=64, labeled_fraction=0.2).options(), 64, "semi") is None
    assert paper_figure(Imagenet127(resolution=64, test_from_train=True).options(), 64, "semi") is None
    assert paper_figure(Imagenet127(resolution=64).options(), 64, "supervised") is None
    assert paper_figures({"dataset": "folder", "disjoint": False}, 32) == []
    assert paper_figure(cifar10(selection="random", seed=3), 32, "semi").accuracy == 80.3
