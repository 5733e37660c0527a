"""The data sets that can be built, by name."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import UserError, unknown
from data_prep.recipes.base import LongTail, Recipe
from data_prep.recipes.whole import Folder, Imagenet127
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
    "cifar100-lt": Entry(
        "CIFAR-100, 100 classes, 32x32",
        "downloaded (169 MB), or --source archive, folder or zip",
        {"n1": 50, "m1": 400, "gamma_l": "10", "gamma_u": "10", "resolution": 32},
    ),
    "stl10-lt": Entry(
        "STL-10, 10 classes, 96x96 resized to 32x32, and its 100,000 unlabeled images",
        "downloaded (2.6 GB), or --source archive or folder",
        {"n1": 150, "m1": None, "gamma_l": "10", "gamma_u": None, "resolution": 32, "filter_name": "bilinear"},
    ),
    "svhn-lt": Entry(
        "House number digits 0-9, 32x32",
        "downloaded (246 MB), or --source folder of the .mat files",
        {"n1": 500, "m1": 4000, "gamma_l": "100", "gamma_u": "100", "resolution": 32},
    ),
    "imagenet127": Entry(
        "ImageNet in 127 superclasses, any --res",
        "your ILSVRC2012 (folders or official tars) or downsampled ImageNet (.npz)",
        None,
    ),
    "folder": Entry(
        "Your own images, any --res",
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
    if dataset == "stl10-lt":
        from data_prep.sources.stl10 import open_stl10

        return open_stl10(source, cache)
    if dataset == "svhn-lt":
        from data_prep.sources.svhn import SvhnSource

        return SvhnSource(source, cache)
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
    for key in ("m1", "gamma_u"):
        if entry.defaults[key] is None and key in given:
            raise UserError(f"{dataset} takes no --{key.replace('_', '-')}: its own unlabeled images are all taken.")
    resolution = given.get("resolution", entry.defaults["resolution"])
    if resolution != entry.defaults["resolution"]:
        given["suffix"] = f"-{resolution}px"
    recipe = LongTail(dataset, **{**entry.defaults, **given})
    if dataset == "digits-lt" and recipe == LongTail(dataset, **entry.defaults):
        return LongTail(dataset, **entry.defaults, name=dataset)
    return recipe


def recipe(dataset: str, **options: Any) -> Recipe:
    """The recipe of any data set by name. Raises UserError."""
    if dataset not in CATALOG:
        raise unknown("data set", dataset, CATALOG)
    if CATALOG[dataset].defaults is not None:
        return long_tail(dataset, **options)
    kind: type[Folder] | type[Imagenet127] = Folder if dataset == "folder" else Imagenet127
    known = [field.name for field in fields(kind)]
    for key in options:
        if key not in known:
            raise unknown("option", key, known)
    return kind(**{key: value for key, value in options.items() if value is not None})
