"""Images that are there twice: test images among the training images, and labeled ones among --disjoint unlabeled ones.

What a network is tested on, it must not have seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.folder.writers import ImageRows
from data_prep.recipes.base import Plan
from data_prep.recipes.orders import Order

SHOWN = 3
COPIES = "labeled_copies.json"


def check_overlap(order: Order, plan: Plan, train: Path, test: Path) -> int:
    """How many test images are also labeled or unlabeled: the same file, a link, a copy, or the same pixels at the
    resolution of the data set.

    Args:
        train, test: the plan's rows as arrays of images, .npy.

    With --disjoint, unlabeled images are compared with the labeled ones in the same way.

    Raises: UserError when the images are of the user's own choice, of test images unless the order allows it. A
        published set is taken as it is, with a warning.
    """
    if order.recipe.options()["disjoint"]:
        _check_disjoint(order, plan, train)
    tested = list(_digests(test))
    wanted, labeled = set(tested), set(plan.labeled.tolist())
    rows: dict[bytes, int] = {}
    for row, digest in enumerate(_digests(train)):
        if digest in wanted and (row in labeled or digest not in rows):
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


def _check_disjoint(order: Order, plan: Plan, train: Path) -> None:
    """Tell of unlabeled images with the pixels of a labeled one. Raises: UserError when they are the user's own."""
    digests = list(_digests(train))
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
        with replacing(train.parent / COPIES) as file:
            listed = [{"unlabeled": _name(plan, "train", a), "labeled": _name(plan, "train", b)} for a, b in pairs]
            file.write(json.dumps(listed, indent=2).encode())  # ASCII: a file name may be no valid Unicode
        raise UserError(
            f"{found}; all are in {train.parent / COPIES}. Take them out of --unlabeled, or leave out --disjoint."
        )
    order.say(f"warning: {found}.")


def _digests(path: Path) -> Iterator[bytes]:
    """The hash of every image's pixels."""
    with ImageRows(path) as images:
        for block in images.blocks():
            yield from (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in block)


def _name(plan: Plan, part: str, row: int) -> str:
    return plan.images[part].name(int(plan.rows[part][row]))
