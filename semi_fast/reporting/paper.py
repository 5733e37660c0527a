"""The figures of the paper's tables 1 to 5, looked up by what a data folder and a run say of themselves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from semi_fast.methods import check_options, method_names

TABLES = Path(__file__).with_name("paper_tables.csv")
SPLIT_KEYS = ("dataset", "n1", "m1", "gamma_l", "gamma_u", "labeled_fraction")


class PaperFigure(NamedTuple):
    """One cell of the paper's tables."""

    table: int  # 1 to 5
    name: str  # the method, as the paper names it
    method: str  # as this project's command line names it; "" for a method it does not have
    option: str  # of an ablation, as on the command line ("bank=fifo"); "" otherwise
    accuracy: float  # percent of the test images; mean of three runs where std is given
    std: float | None  # over the runs; None where the paper gives none

    def __str__(self) -> str:
        return f"{self.accuracy:g}" + ("" if self.std is None else f" ± {self.std:g}")


def paper_figures(split: Mapping[str, Any], resolution: int) -> list[PaperFigure]:
    """All figures of the paper for a data set, in the order of its tables; [] for a set that the paper does not have.

    Args:
        split: as a data folder's manifest has it. A set is the paper's when data set, counts and imbalance ratios are;
            whether the images were drawn at random or are the first of each class does not matter, but labeled and
            unlabeled images must not be kept apart (``disjoint``), nor the test images taken from the training set.
        resolution: side of the images in pixels.
    """
    if split.get("disjoint") or split.get("test_from_train"):
        return []
    return list(_by_setting().get(_setting(split, resolution), []))


def paper_figure(
    split: Mapping[str, Any], resolution: int, method: str, options: Mapping[str, Any] | None = None
) -> PaperFigure | None:
    """The paper's figure for a method on a data set, or None where it has none.

    Args:
        split, resolution: see `paper_figures`.
        method: as on the command line.
        options: the method's, resolved. Those that the paper's ablations change choose the row; two of them at once
            are no row of the paper. Other options do not matter here: whoever compares shows them.
    """
    rows = [f for figures in _by_setting().values() for f in figures if f.method == method]
    ablated = {f.option.partition("=")[0] for f in rows if f.option}
    usual = check_options(method, {}) if method in method_names() else {}
    given = {key: value for key, value in (options or {}).items() if key in ablated and value != usual.get(key)}
    chosen = [f"{key}={_word(value)}" for key, value in given.items()] or [""]
    fits = [f for f in paper_figures(split, resolution) if (f.method, [f.option]) == (method, chosen)]
    return fits[0] if fits else None


@cache
def _by_setting() -> dict[tuple[str, ...], list[PaperFigure]]:
    figures: dict[tuple[str, ...], list[PaperFigure]] = {}
    with TABLES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            figure = PaperFigure(
                table=int(row["table"]),
                name=row["name"],
                method=row["method"],
                option=row["options"],
                accuracy=float(row["accuracy"]),
                std=float(row["std"]) if row["std"] else None,
            )
            figures.setdefault(_setting(row, int(row["resolution"])), []).append(figure)
    return figures


def _setting(split: Mapping[str, Any], resolution: int) -> tuple[str, ...]:
    return (str(resolution), *(_word(split.get(key)) for key in SPLIT_KEYS))


def _word(value: Any) -> str:
    return "" if value is None else str(value).lower()
