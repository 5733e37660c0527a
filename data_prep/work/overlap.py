"""Test images that are training images too: what a network is tested on, it must not have seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.folder.writers import ImageRows
from data_prep.recipes.base import Plan
from data_prep.recipes.orders import Order

SHOWN = 3


def check_overlap(order: Order, plan: Plan, train: Path, test: Path) -> int:
    """How many test images are also labeled or unlabeled: the same file, a link, a copy, or the same pixels at the
    resolution of the data set.

    Args:
        train, test: the plan's rows as arrays of images, .npy.

    Raises: UserError when the test set is of the user's own choice, unless the order allows it. A published one is
        taken as it is, with a warning.
    """
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


def _digests(path: Path) -> Iterator[bytes]:
    """The hash of every image's pixels."""
    with ImageRows(path) as images:
        for block in images.blocks():
            yield from (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in block)


def _name(plan: Plan, part: str, row: int) -> str:
    return plan.images[part].name(int(plan.rows[part][row]))
