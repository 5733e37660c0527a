"""The data sets that can be built, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError, unknown
from data_prep.recipes import LongTail, Recipe
from data_prep.sources import Source


class Entry(NamedTuple):
    """One line of `build.py list`. `defaults`: the long-tailed split built when no option is given."""

    summary: str
    source: str
    defaults: dict[str, Any] | None


CATALOG = {
    "digits-lt": Entry(
        "Handwritten digits 0-9, 16x16",
        "comes with scikit-learn: no network",
        {"n1": 30, "m1": 110, "gamma_l": "10", "gamma_u": "10", "resolution": 16},
    ),
    "cifar10-lt": Entry(
        "CIFAR-10, 10 classes, 32x32",
        "downloaded (170 MB), or --source archive, folder or zip",
        {"n1": 500, "m1": 4000, "gamma_l": "100", "gamma_u": "100", "resolution": 32},
    ),
    "folder": Entry(
        "Your own images, any size",
        "--labeled, --unlabeled, --test",
        None,
    ),
}


def open_source(dataset: str, source: Path | None, cache: Path) -> Source:
    """Open the raw collection of a long-tailed data set. Raises UserError."""
    if dataset == "digits-lt":
        from data_prep.sources.digits import DigitsSource

        if source is not None:
            raise UserError("digits-lt comes with scikit-learn and takes no --source.")
        return DigitsSource()
    from data_prep.sources.cifar import open_cifar

    return open_cifar(dataset.removesuffix("-lt"), source, cache)


def long_tail(dataset: str, **options: Any) -> LongTail:
    """The long-tailed recipe of a data set; options left out or None take its defaults.

    Raises: UserError for an unknown data set or option, or a value out of range.
    """
    entry = CATALOG.get(dataset)
    if entry is None or entry.defaults is None:
        raise unknown("data set", dataset, [name for name, e in CATALOG.items() if e.defaults])
    for key in options:
        if key not in LongTail.__dataclass_fields__:
            raise unknown("option", key, [*LongTail.__dataclass_fields__])
    given = {key: value for key, value in options.items() if value is not None}
    recipe = LongTail(dataset, **{**entry.defaults, **given})
    if dataset == "digits-lt" and recipe == LongTail(dataset, **entry.defaults):
        return LongTail(dataset, **entry.defaults, name=dataset)
    return recipe


def recipe(dataset: str, **options: Any) -> Recipe:
    """The recipe of any data set by name. Raises UserError."""
    if dataset not in CATALOG:
        raise unknown("data set", dataset, CATALOG)
    if dataset == "folder":
        from data_prep.recipes import Folder

        return Folder(**options)
    return long_tail(dataset, **options)
