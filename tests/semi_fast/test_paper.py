"""The paper's figures are found by the split a data folder records, and by nothing that only looks like it."""

from __future__ import annotations

import csv

import pytest

from data_prep.recipes.catalog import long_tail, recipe
from data_prep.recipes.whole import Imagenet127
from semi_fast.config import merge, parse_override
from semi_fast.methods import check_options, method_names
from semi_fast.reporting.paper import OTHERS, TABLES, Setting, figures_of, paper_figure, paper_figures


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


@pytest.mark.parametrize(
    ("method", "options", "table", "accuracy"),
    [
        ("supervised", {"logit_adjustment": "train"}, 1, 53.3),
        ("supervised", {"logit_adjustment": "posthoc"}, 1, None),
        ("fixmatch", {"logit_adjustment": "train", "tau": 0.9}, 1, 75.3),
        ("fixmatch", {"logit_adjustment": "pseudo"}, 1, None),
        ("darp", {"logit_adjustment": "train"}, 1, 76.6),
        ("crest", {}, 1, 76.3),
        ("crest", {"alignment": False}, 1, None),
        ("crest", {"alignment": True, "logit_adjustment": "train"}, 1, 76.7),
        ("abc", {}, 1, 78.9),
        ("abc", {"refine": "daso"}, 1, 80.1),
        ("crest", {"alignment": False}, 2, 70.7),
        ("crest", {}, 2, 62.9),
        ("seval", {}, 2, 79.2),
    ],
)
def test_composite_rows_are_a_method_with_options(method, options, table, accuracy):
    figure = paper_figure(cifar10(gamma_u="1/100" if table == 2 else "100"), 32, method, check_options(method, options))
    assert (figure and (figure.table, figure.accuracy)) == (accuracy and (table, accuracy))


def test_a_row_is_one_method_with_valid_options_wherever_it_stands():
    for path in (TABLES, OTHERS):
        figures = [figure for column in figures_of(path).values() for figure in column]
        for figure in figures:
            same = {f.row for f in figures if (f.table, f.name, f.source) == (figure.table, figure.name, figure.source)}
            assert same == {figure.row}, figure.name
            if figure.method in method_names():
                check_options(figure.method, merge({}, *map(parse_override, figure.options.split())))
            assert "bem" not in figure.method, "nothing of ours is compared with BEM"


def test_settings_are_named_and_built_as_the_data_sets_are():
    for setting in figures_of(TABLES):
        name, *words = setting.build
        kinds = {"n1": int, "m1": int, "res": int, "labeled_fraction": float}
        keys = [word.removeprefix("--").replace("-", "_") for word in words[::2]]
        options = {key: kinds.get(key, str)(value) for key, value in zip(keys, words[1::2], strict=True)}
        built = recipe(name, resolution=options.pop("res"), **options)
        assert built.folder_name() == setting.folder
        assert Setting.of(built.options(), str(built.resolution)) == setting


def test_what_is_not_in_the_paper_has_no_figure():
    assert paper_figure(cifar10(), 32, "semi", check_options("semi", {"ea": False, "plce": False})) is None
    assert paper_figure(cifar10(), 64, "semi") is None
    assert paper_figure(cifar10(n1=499), 32, "semi") is None
    assert paper_figure(cifar10(gamma_u="middle:100"), 32, "semi") is None
    assert paper_figure(Imagenet127(resolution=64, labeled_fraction=0.2).options(), 64, "semi") is None
    assert paper_figure(Imagenet127(resolution=64, test_from_train=True).options(), 64, "semi") is None
    assert paper_figure(Imagenet127(resolution=64).options(), 64, "supervised") is None
    assert paper_figures({"dataset": "folder", "disjoint": False}, 32) == []
    assert paper_figure(cifar10(selection="random", seed=3), 32, "semi").accuracy == 80.3
    assert paper_figure(cifar10(disjoint=True), 32, "semi").accuracy == 80.3, "both kinds of split are published"
