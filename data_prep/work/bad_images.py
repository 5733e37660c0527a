"""Images that cannot be used: listed in a file, and an error or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import replacing
from data_prep.recipes.orders import Order
from data_prep.sources.images import BadImage

BAD_IMAGES = "bad_images.json"
SHOWN = 5
BadByPart = Mapping[str, Mapping[int, BadImage]]  # part -> index in its collection -> what is wrong


def report_bad(order: Order, bad: BadByPart, work: Path) -> None:
    """Tell of bad images. Raises: UserError unless they are to be skipped."""
    if order.on_bad_image == "error":
        write_bad(work, bad)
        raise UserError(_message(bad, work))
    order.say(f"warning: left out {sum(map(len, bad.values())):,} unreadable images")


def write_bad(folder: Path, bad: BadByPart) -> None:
    """Write their names and reasons, by part, as `bad_images.json` of the folder."""
    listed = {
        part: [{"name": b.name, "reason": b.reason} for _, b in sorted(items.items())] for part, items in bad.items()
    }
    with replacing(folder / BAD_IMAGES) as file:
        file.write(json.dumps(listed, indent=2).encode())  # ASCII: a file name may be no valid Unicode


def _message(bad: BadByPart, work: Path) -> str:
    listed = [item for items in bad.values() for item in items.values()]
    first = ", ".join(f"{item.name} ({item.reason})" for item in listed[:SHOWN])
    more = f" and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return (
        f"{len(listed):,} images cannot be used: {first}{more}; all are in {work / BAD_IMAGES}. Mend them, or leave "
        "them out with --on-bad-image skip."
    )
