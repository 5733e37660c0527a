"""The folder of an unfinished build, <out>.building: which order it belongs to, and its removal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import remove_folder, replacing
from data_prep.recipes.orders import Order, source_digest
from data_prep.sources.images import Images

NOTE = "order"  # the file that says what is being built; the first one written


def work_folder(out: Path) -> Path:
    """Where the unfinished build of `out` lies."""
    return out.with_name(out.name + ".building")


def open_work(work: Path, order: Order, images: Mapping[str, Images]) -> None:
    """Make the folder of the unfinished build, or go on with the one that is there.

    Images that changed since are read again: the journal knows which. One of other options, or of another source, is
    only given up by --force.

    Raises: UserError.
    """
    facts = {
        **_choices(order),
        "places": order.absolute_inputs,
        "source": source_digest(images),
        "command": order.command,
    }
    if work.is_dir() and not _is_fresh(work):
        left = _read_note(work)
        difference = _difference(left, facts)
        if difference:
            _give_up(work, left, difference, order)
        elif left["source"] != facts["source"]:
            order.say(f"note: the source has changed since the build in {work} began; what changed is read again.")
    work.mkdir(exist_ok=True)
    with replacing(work / NOTE) as file:
        file.write(json.dumps(facts, indent=2).encode())


def put_away(work: Path, order: Order) -> None:
    """Remove what a build that is finished has left. What belongs to another order stays, and is told of."""
    if work.is_dir() and not (work / NOTE).is_file():
        return
    if work.is_dir() and _difference(_read_note(work), _choices(order), options_only=True):
        order.say(f"note: {work} holds an unfinished build of other options; remove it if it is not needed.")
    else:
        remove_folder(work)


def _choices(order: Order) -> dict[str, Any]:
    recipe = order.recipe
    return {"options": {**recipe.options(), "resolution": recipe.resolution, "filter": recipe.filter_name}}


def _is_fresh(work: Path) -> bool:
    """Whether the folder was only just made: it is empty, but for the note half written."""
    return all(path.name.startswith(f".{NOTE}.") for path in work.iterdir())


def _read_note(work: Path) -> dict[str, Any]:
    try:
        left = json.loads((work / NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{work} is where the unfinished build would lie, and holds something else (no file '{NOTE}'). Move it "
            "away, or give another --out."
        ) from None
    except ValueError:
        left = None
    shape = {"options": dict, "places": dict, "source": str, "command": str}
    whole = isinstance(left, dict) and all(isinstance(left.get(key), kind) for key, kind in shape.items())
    return left if whole else {key: kind() for key, kind in shape.items()}  # a damaged note is of no order


def _difference(left: Mapping[str, Any], facts: Mapping[str, Any], options_only: bool = False) -> str:
    """In which option an unfinished build differs, and how; "" when it is of this order."""
    for key, value in facts["options"].items():
        if left["options"].get(key) != value:
            return f"{key} is {left['options'].get(key)!r} there, {value!r} is asked for"
    if options_only or left["source"] == facts["source"] or left["places"] == facts["places"]:
        return ""
    option = next(
        key for key in {**left["places"], **facts["places"]} if left["places"].get(key) != facts["places"].get(key)
    )
    return (
        f"{option} is {left['places'].get(option)} there, {facts['places'].get(option)} with other images is asked for"
    )


def _give_up(work: Path, left: Mapping[str, Any], difference: str, order: Order) -> None:
    if not order.force:
        how = f"Go on with it ({left['command']}), give" if left["command"] else "Give"
        raise UserError(
            f"{work} holds an unfinished build of another order: {difference}. {how} another --out, or --force to give "
            "it up."
        )
    order.say(f"warning: gave up the unfinished build in {work}: {difference}.")
    remove_folder(work)
