"""The figures of the paper's tables 1 to 5 and those of other papers, looked up by data set, method and options."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from semi_fast.methods import check_options, method_names

TABLES = Path(__file__).with_name("paper_tables.csv")
OTHERS = Path(__file__).with_name("other_tables.csv")
RULES = Path(__file__).with_name("table_rules.yaml")
PaperRow = tuple[str, str]  # method and options, or the name of a method that the project does not have and ""
OWN = ("P-FAST", "P-FINETUNE")  # protocols of this project alone
LETTERS = {"n1": "n", "m1": "m", "gamma_l": "l", "gamma_u": "u"}  # in names of data folders


class Setting(NamedTuple):
    """A data set of the tables, a column; values as in the files, "" for none."""

    dataset: str
    resolution: str
    n1: str
    m1: str
    gamma_l: str
    gamma_u: str
    labeled_fraction: str

    @classmethod
    def of(cls, split: Mapping[str, Any], resolution: Any) -> Setting:
        """Of a line of the files, or of the split that a data folder's manifest has."""
        return cls(**{key: _word(split.get(key)) for key in cls._fields if key != "resolution"}, resolution=resolution)

    @property
    def label(self) -> str:
        """`cifar10-lt n500 m4000 l100 u1/100`, `imagenet127 64px`."""
        values = self._asdict()
        tail = [letter + values[key] for key, letter in LETTERS.items() if values[key]]
        return " ".join([self.dataset, *(tail or [f"{self.resolution}px"])])

    @property
    def folder(self) -> str:
        """The name that its data folder has by default."""
        return self.label.removesuffix("px").replace("1/", "rev").replace(" ", "-")

    @property
    def build(self) -> list[str]:
        """Arguments of data_prep/build.py that make it."""
        options = {"--" + key.replace("_", "-"): value for key, value in self._asdict().items() if value}
        name, size = options.pop("--dataset"), options.pop("--resolution")
        return [name, *(word for option in options.items() for word in option), "--res", size]


class PaperFigure(NamedTuple):
    """One published figure. std: over the runs; None where none is given."""

    table: int  # of the paper, 1 to 5; 0: of another paper
    name: str  # the method, as the paper names it
    method: str  # as this project's command line names it; "" for a method that it does not have
    options: str  # of the method, as on the command line ("alignment=true logit_adjustment=train")
    accuracy: float  # percent of the test images; mean of three runs where std is given
    std: float | None
    source: str = ""  # of another paper's
    note: str = ""

    def __str__(self) -> str:
        return f"{self.accuracy:.1f}" + ("" if self.std is None else f" ± {self.std:.2f}")

    @property
    def row(self) -> PaperRow:
        """What it is of."""
        return (self.method, self.options) if self.method else (self.name, "")


def beside_paper(protocol: str) -> bool:
    """Whether a published figure may stand beside runs of a protocol ("" for none): not where nobody trained so."""
    return protocol.partition(" ")[0] not in OWN


def paper_figures(split: Mapping[str, Any], resolution: int) -> list[PaperFigure]:
    """All figures of the paper for a data set, in the order of its tables; [] for a set that the paper does not have.

    Args:
        split: as a data folder's manifest has it. A set is the paper's when data set, counts and imbalance ratios are;
            whether the images were drawn at random or are the first of each class does not matter, nor whether labeled
            and unlabeled images are kept apart (``disjoint``): rows of both kinds of split are published side by side.
            The test images must not be taken from the training set.
        resolution: side of the images in pixels.
    """
    if split.get("test_from_train"):
        return []
    return list(figures_of(TABLES).get(Setting.of(split, str(resolution)), []))


def paper_figure(
    split: Mapping[str, Any], resolution: int, method: str, options: Mapping[str, Any] | None = None
) -> PaperFigure | None:
    """The paper's figure for a method on a data set, or None where it has none.

    Args:
        split, resolution: see `paper_figures`.
        method: as on the command line.
        options: the method's, resolved. Those in which the paper's rows of this method differ choose the row; there may
            be none for their values. Other options do not matter here: whoever compares shows them.
    """
    usual = check_options(method, {}) if method in method_names() else {}
    words = {key: _word(value) for key, value in {**usual, **(options or {})}.items()}
    every = [_options(f) for figures in figures_of(TABLES).values() for f in figures if f.method == method]
    chosen = {key: words.get(key, "") for row in every for key in row}
    for f in paper_figures(split, resolution):
        if f.method == method and {**{key: _word(usual.get(key)) for key in chosen}, **_options(f)} == chosen:
            return f
    return None


@cache
def figures_of(path: Path) -> dict[Setting, list[PaperFigure]]:
    """The figures of TABLES or OTHERS by data set, in the order of the file."""
    figures: dict[Setting, list[PaperFigure]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            figure = PaperFigure(
                table=int(row.get("table", 0)),
                accuracy=float(row["accuracy"]),
                std=float(row["std"]) if row["std"] else None,
                **{key: row.get(key, "") for key in ("name", "method", "options", "source", "note")},
            )
            figures.setdefault(Setting.of(row, row["resolution"]), []).append(figure)
    return figures


@cache
def _rules(path: Path) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return rules


def rule(**facts: str) -> dict[str, Any]:
    """What RULES says of a cell: of all rules that hold, lists joined and of other values the last one.

    Args:
        facts: a table, or method, options and the fields of a `Setting`, as text. A rule holds where each of its
            `where` is the fact of that name, or has it in a list.
    """
    found: dict[str, Any] = {"settings": [], "notes": []}
    for entry in _rules(RULES):
        where = {key: value if isinstance(value, list) else [value] for key, value in entry.get("where", {}).items()}
        if all(facts.get(key, "") in map(str, values) for key, values in where.items()):
            for key, value in entry.items():
                found[key] = [*found[key], *value] if isinstance(value, list) else value
    return found


def _options(figure: PaperFigure) -> dict[str, str]:
    return dict(word.split("=", 1) for word in figure.options.split())


def _word(value: Any) -> str:
    return "" if value is None else str(value).lower()
