"""The data sets that can be built, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

from data_prep.errors import UserError, unknown
from data_prep.recipes.base import LongTail, Opener, Recipe
from data_prep.recipes.whole import Folder, Imagenet127
from data_prep.sources.cifar import open_cifar
from data_prep.sources.digits import open_digits
from data_prep.sources.stl10 import open_stl10
from data_prep.sources.svhn import open_svhn

LONG_TAIL_OPTIONS = ("n1", "m1", "gamma_l", "gamma_u", "selection", "seed", "disjoint", "resolution")


class Entry(NamedTuple):
    """One line of `build.py list`.

    Long-tailed data sets have `open`, which opens the collection that they are drawn from, `defaults`, the split taken
    when no option is given, and `forms`, what --source may be ("" where it is not taken).
    """

    summary: str
    origin: str
    open: Opener | None = None
    defaults: dict[str, Any] | None = None
    forms: str = ""

    @property
    def source(self) -> str:
        """Where the images come from, with what --source may be."""
        return f"{self.origin}, or --source {self.forms}" if self.forms else self.origin

    @property
    def usual_split(self) -> str:
        """The default split in one line, "" where there is none."""
        words = {"n1": "n1", "m1": "m1", "gamma_l": "gamma_l", "gamma_u": "gamma_u", "resolution": "res"}
        split = self.defaults or {}
        return ", ".join(f"{word} {split[key]}" for key, word in words.items() if split.get(key))


CLASS_FOLDERS = "class folders in a folder, zip or tar"
CIFAR_FORMS = f"official archive (packed, unpacked, or packed anew as zip or tar), or {CLASS_FOLDERS}"
CATALOG: dict[str, Entry] = {
    "digits-lt": Entry(
        "Handwritten digits 0-9, 16x16",
        "comes with scikit-learn, no network",
        open_digits,
        {"n1": 30, "m1": 110, "gamma_l": "10", "gamma_u": "10", "resolution": 16},
    ),
    "cifar10-lt": Entry(
        "CIFAR-10, 10 classes, 32x32",
        "downloaded (170 MB)",
        partial(open_cifar, "cifar10"),
        {"n1": 500, "m1": 4000, "gamma_l": "100", "gamma_u": "100", "resolution": 32},
        CIFAR_FORMS,
    ),
    "cifar100-lt": Entry(
        "CIFAR-100, 100 classes, 32x32",
        "downloaded (169 MB)",
        partial(open_cifar, "cifar100"),
        {"n1": 50, "m1": 400, "gamma_l": "10", "gamma_u": "10", "resolution": 32},
        CIFAR_FORMS,
    ),
    "stl10-lt": Entry(
        "STL-10, 10 classes, 96x96 resized to 32x32, and its 100,000 unlabeled images",
        "downloaded (2.6 GB)",
        open_stl10,
        {"n1": 150, "m1": None, "gamma_l": "10", "gamma_u": None, "resolution": 32, "filter_name": "bilinear"},
        f"official archive, folder of its .bin files, or {CLASS_FOLDERS}",
    ),
    "svhn-lt": Entry(
        "House number digits 0-9, 32x32",
        "downloaded (246 MB)",
        open_svhn,
        {"n1": 500, "m1": 4000, "gamma_l": "100", "gamma_u": "100", "resolution": 32},
        f"folder of the .mat files, or {CLASS_FOLDERS}",
    ),
    "imagenet127": Entry(
        "ImageNet in 127 superclasses, any --res",
        "your ILSVRC2012 (folders or official tars) or downsampled ImageNet (.npz)",
    ),
    "folder": Entry("Your own images, any --res", "--labeled, --unlabeled and --test, or --csv"),
}
WHOLE: dict[str, type[Folder] | type[Imagenet127]] = {"folder": Folder, "imagenet127": Imagenet127}


def long_tail(dataset: str, **options: Any) -> LongTail:
    """The long-tailed recipe of a data set; options left out or None take its defaults.

    Raises: UserError for an unknown data set or option, or a value out of range.
    """
    entry = CATALOG.get(dataset)
    if entry is None or entry.open is None or entry.defaults is None:
        raise unknown("data set", dataset, [name for name, known in CATALOG.items() if known.open])
    given = _given(options, LONG_TAIL_OPTIONS)
    for key in ("m1", "gamma_u"):
        if entry.defaults[key] is None and key in given:
            raise UserError(f"{dataset} takes no --{key.replace('_', '-')}: its own unlabeled images are all taken.")
    usual = LongTail(dataset, **entry.defaults, opener=entry.open)
    recipe = replace(usual, **given)
    if recipe.resolution != usual.resolution:
        return replace(recipe, suffix=f"-{recipe.resolution}px")
    return replace(usual, name=dataset) if dataset == "digits-lt" and recipe == usual else recipe


def recipe(dataset: str, **options: Any) -> Recipe:
    """The recipe of any data set by name. Raises UserError."""
    if dataset not in CATALOG:
        raise unknown("data set", dataset, CATALOG)
    if dataset not in WHOLE:
        return long_tail(dataset, **options)
    kind = WHOLE[dataset]
    return kind(**_given(options, [field.name for field in fields(kind)]))


def _given(options: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The options that are not None. Raises: UserError for one that is not known."""
    for key in options:
        if key not in known:
            raise unknown("option", key, known)
    return {key: value for key, value in options.items() if value is not None}
