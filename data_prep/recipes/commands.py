"""Build commands as text: the one that a manifest keeps, and the one that makes a folder which is missing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

PROGRAM = "python data_prep/build.py"
LONG_TAILED = ("digits-lt", "cifar100-lt", "cifar10-lt", "stl10-lt", "svhn-lt")
FLAGS = {"resolution": "--res"}  # options whose flag is not their own name
# A part of a long-tailed folder's name -> the option that it stands for, and how its value is written there.
PARTS: tuple[tuple[str, str, str], ...] = (
    (r"n(\d+)", "n1", "{0}"),
    (r"m(\d+)", "m1", "{0}"),
    (r"l(\d+)", "gamma_l", "{0}"),
    (r"l(\d+)over(\d+)", "gamma_l", "{0}/{1}"),
    (r"u(\d+)", "gamma_u", "{0}"),
    (r"u(\d+)over(\d+)", "gamma_u", "{0}/{1}"),
    (r"urev(\d+)", "gamma_u", "1/{0}"),
    (r"urev(\d+)over(\d+)", "gamma_u", "{1}/{0}"),
    (r"random", "selection", "random"),
    (r"s(\d+)", "seed", "{0}"),
    (r"(\d+)px", "resolution", "{0}"),
)
IMAGENET_PARTS: tuple[tuple[str, str, str], ...] = (
    (r"(\d+)", "resolution", "{0}"),
    (r"f(\d*\.?\d+)", "labeled_fraction", "{0}"),
    (r"first", "selection", "first"),
    (r"s(\d+)", "seed", "{0}"),
)
WHOLE_NUMBERS = ("n1", "m1", "seed", "resolution")


def as_command(name: str, options: Mapping[str, Any]) -> str:
    """`NAME --option value ...` of the options that are given: neither None nor False; True makes a bare flag."""
    words = [name]
    for key, value in options.items():
        if value is None or value is False:
            continue
        words.append(FLAGS.get(key, "--" + key.replace("_", "-")))
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def lasting(command: str, formats: Sequence[str]) -> str:
    """The command as a manifest keeps it: it makes the folder with all the formats that it has, and forces nothing."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word == "--format":
            next(words, None)
        elif word != "--force" and not word.startswith("--format="):
            kept.append(word)
    return shlex.join([*kept, *(["--format", ",".join(formats)] if formats else [])])


def guess_command(folder: Path) -> str:
    """The arguments of build.py that most likely make `folder`, from its name.

    data/imagenet127-64 -> imagenet127 --res 64; data/cifar10-lt-n500-m4000-l100-urev100 -> cifar10-lt --n1 500
    --m1 4000 --gamma-l 100 --gamma-u 1/100. A name that says nothing gives NAME. Where the command by itself would
    make a folder of another name, --out is added.
    """
    from data_prep.recipes.catalog import recipe

    known = next((name for name in (*LONG_TAILED, "imagenet127") if folder.name.startswith(name)), None)
    if known is None:
        return "NAME"
    options = _options(folder.name.removeprefix(known), IMAGENET_PARTS if known == "imagenet127" else PARTS)
    try:
        own = Path("data") / recipe(known, **options).folder_name()
    except UserError:  # a name that no build gives
        options, own = {}, None
    return as_command(known, {**options, "out": None if own == folder else folder})


def _options(rest: str, parts: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in rest.strip("-").split("-"):
        if part == "disjoint":
            found["disjoint"] = True
        for pattern, option, form in parts:
            match = re.fullmatch(pattern, part)
            if match:
                value = form.format(*match.groups())
                whole = option in WHOLE_NUMBERS
                found[option] = int(value) if whole else float(value) if option == "labeled_fraction" else value
    return found
