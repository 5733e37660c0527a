"""Images that are there twice: test images among the training images, labeled ones among --disjoint unlabeled ones, and
labeled ones of two classes.

What a network is tested on, it must not have seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.folder.writers import ImageRows
from data_prep.recipes.base import Plan
from data_prep.recipes.orders import Order

SHOWN = 3
COPIES = "labeled_copies.json"
Digests = Mapping[str, list[bytes]]  # part -> the hash of every row's pixels


def pixel_digests(path: Path) -> list[bytes]:
    """The hash of every image's pixels in an .npy."""
    with ImageRows(path) as images:
        return [hashlib.blake2b(i.tobytes(), digest_size=16).digest() for block in images.blocks() for i in block]


def check_labels(plan: Plan, digests: Digests, *, test: bool) -> None:
    """Raises: UserError when labeled images of the same pixels have different labels.

    Args:
        test: whether to compare the test images too.
    """
    validation = [] if plan.validation is None else plan.validation.tolist()
    rows = [("train", row) for row in [*plan.labeled.tolist(), *validation]]
    rows += [("test", row) for row in range(len(digests["test"]))] if test else []
    labels = {part: plan.labels(part).tolist() for part in digests}
    first: dict[bytes, tuple[str, int]] = {}
    pairs = []
    for part, row in rows:
        known = first.setdefault(digests[part][row], (part, row))
        if labels[known[0]][known[1]] != labels[part][row]:
            pairs.append((known, (part, row)))
    if pairs:
        shown = " and ".join(f"{_name(plan, *one)} is '{plan.class_names[labels[one[0]][one[1]]]}'" for one in pairs[0])
        more = f", and {len(pairs) - 1:,} more pairs like it" if len(pairs) > 1 else ""
        raise UserError(f"The same image has two labels: {shown}{more}. Keep one of each pair.")


def same_pixels(plan: Plan, digests: Digests, *, test: bool) -> NDArray[np.int64]:
    """For every training image the index of one with its pixels, the same for all of them; for one in no row its own.

    Args:
        test: whether the test images are training images that are held out; they have the same indices in both
            collections.
    """
    same = np.arange(len(plan.images["train"]))
    first: dict[bytes, int] = {}
    for part in ("train", "test") if test else ("train",):
        for index, digest in zip(plan.rows[part].tolist(), digests[part], strict=True):
            same[index] = first.setdefault(digest, index)
    return same


def copies_of_tested(digests: Digests) -> list[int]:
    """The training rows with the pixels of a test image."""
    tested = set(digests["test"])
    return [row for row, digest in enumerate(digests["train"]) if digest in tested]


def check_overlap(order: Order, plan: Plan, digests: Digests, work: Path) -> int:
    """How many test images are also labeled or unlabeled: the same file, a link, a copy, or the same pixels at the
    resolution of the data set.

    With --disjoint, unlabeled images are compared with the labeled ones in the same way.

    Raises: UserError when the images are of the user's own choice, of test images unless the order allows it. A
        published set is taken as it is, with a warning.
    """
    if order.recipe.options()["disjoint"]:
        _check_disjoint(order, plan, digests["train"], work)
    tested, labeled = digests["test"], set(plan.labeled.tolist())
    rows: dict[bytes, int] = {}
    for row in copies_of_tested(digests):
        digest = digests["train"][row]
        if row in labeled or digest not in rows:
            rows[digest] = row
    pairs = [(row, rows[digest]) for row, digest in enumerate(tested) if digest in rows]
    if not pairs:
        return 0
    seen = sum(row in labeled for _, row in pairs)
    first = ", ".join(f"{_name(plan, 'test', a)} is {_name(plan, 'train', b)}" for a, b in pairs[:SHOWN])
    found = (
        f"{len(pairs):,} of {len(plan.rows['test']):,} test images are also training images, {seen:,} of them labeled "
        f"({first}{', ...' if len(pairs) > SHOWN else ''})"
    )
    if order.recipe.chosen_test and not order.allow_overlap:
        raise UserError(f"{found}. Take them out of one of the two, or go on with --allow-overlap.")
    order.say(f"warning: {found}.")
    return len(pairs)


def _check_disjoint(order: Order, plan: Plan, digests: list[bytes], work: Path) -> None:
    """Tell of unlabeled images with the pixels of a labeled one. Raises: UserError when they are the user's own."""
    labeled = {digests[row]: row for row in plan.labeled.tolist()}
    pairs = [(row, labeled[digests[row]]) for row in plan.unlabeled.tolist() if digests[row] in labeled]
    if not pairs:
        return
    first = ", ".join(f"{_name(plan, 'train', a)} is {_name(plan, 'train', b)}" for a, b in pairs[:SHOWN])
    found = (
        f"{len(pairs):,} of {len(plan.unlabeled):,} unlabeled images are copies of labeled ones, the same at "
        f"{order.recipe.resolution} pixels ({first}{', ...' if len(pairs) > SHOWN else ''}), in spite of --disjoint"
    )
    if order.recipe.chosen_test:
        with replacing(work / COPIES) as file:
            listed = [{"unlabeled": _name(plan, "train", a), "labeled": _name(plan, "train", b)} for a, b in pairs]
            file.write(json.dumps(listed, indent=2).encode())  # ASCII: a file name may be no valid Unicode
        raise UserError(f"{found}; all are in {work / COPIES}. Take them out of --unlabeled, or leave out --disjoint.")
    order.say(f"warning: {found}.")


def _name(plan: Plan, part: str, row: int) -> str:
    return plan.images[part].name(int(plan.rows[part][row]))
