"""Carrying out a build order: lock the folder, see what is there, build what is not."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import NoRoomError, is_full
from data_prep.recipes.catalog import recipe
from data_prep.recipes.orders import AS_JPEG, Order, as_command, check_order
from data_prep.sources.downloads import default_cache
from data_prep.work.assembly import assemble
from data_prep.work.existing import already_there
from data_prep.work.journal import build_lock
from data_prep.work.unfinished import work_folder


def build_dataset(
    name: str,
    out: Path | str | None = None,
    *,
    source: Path | str | None = None,
    cache: Path | str | None = None,
    workers: int | None = None,
    formats: Sequence[str] = (),
    shard_images: int | None = None,
    force: bool = False,
    on_bad_image: str = "error",
    allow_overlap: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
    command: str | None = None,
    **options: Any,
) -> Path:
    """Build a data set, or find it built: what `python data_prep/build.py NAME ...` does.

    Args:
        name: "digits-lt", "cifar10-lt", ... (`build.py list`).
        out: the folder to make; None takes data/<name with its split>, for plain digits-lt data/digits-lt.
        source: the raw data, None for a download where there is one.
        cache: where downloads are kept; None takes the user's cache folder.
        workers: processes that decode images; None takes one for each core.
        formats: "ffcv" adds .beton files ("ffcv:jpeg90": with the training images as JPEG of quality 90), "dali" tar
            shards of at most `shard_images` images (None: 10,000).
        force: replace a folder that holds something else, and give up an unfinished build of other options.
        on_bad_image: "error", or "skip" to leave unreadable images out.
        allow_overlap: accept test images of the user's own that are training images too.
        command: how to name this build in the manifest; None writes the command line of these arguments.
        options: the data set's own: n1, m1, gamma_l, gamma_u, selection, seed, disjoint, resolution, or labeled,
            unlabeled, test, csv, test_fraction, validation_fraction, fit, filter_name, exif.

    Returns: the folder.

    Raises: UserError.
    """
    chosen, jpeg = recipe(name, **options), AS_JPEG in formats
    if jpeg and "ffcv" in formats:
        raise UserError(f"--format ffcv and {AS_JPEG} are two forms of one file, train.beton. Give one of them.")
    folder = Path(out) if out is not None else Path("data") / chosen.folder_name()
    given = {**options, "source": source, "out": out, "shard_images": shard_images}
    given["allow_overlap"] = allow_overlap and chosen.chosen_test
    given["on_bad_image"] = None if on_bad_image == "error" else on_bad_image
    return carry_out(
        Order(
            recipe=chosen,
            out=folder,
            cache=Path(cache) if cache is not None else default_cache(),
            command=command or as_command(name, given),
            source=Path(source) if source is not None else None,
            workers=workers,
            formats=tuple("ffcv" if form == AS_JPEG else form for form in formats),
            beton="jpeg90" if jpeg else "raw",
            shard_images=shard_images,
            force=force,
            on_bad_image=on_bad_image,
            allow_overlap=allow_overlap,
            say=say,
            progress=progress,
        )
    )


def carry_out(order: Order) -> Path:
    """Build the folder, or find it built. Returns the folder.

    Interrupted at any moment, the same order goes on where it stood, and the folder is the same to the bit.

    Raises: UserError.
    """
    check_order(order)
    try:
        order.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {order.out.parent} ({error.strerror}). Give another --out.") from None
    try:
        with build_lock(order.out):
            work = work_folder(order.out)
            if not already_there(order, work):
                assemble(order, work)
    except OSError as error:
        raise _in_words(error, order.out) from error
    return order.out


def _in_words(error: OSError, out: Path) -> Exception:
    """A disk or a file system's refusal as a user's error; what names no file stays as it is."""
    if is_full(error):
        needed = f"a file of {error.needed / 1e6:,.1f} MB is needed, " if isinstance(error, NoRoomError) else ""
        room = f"{shutil.disk_usage(out.parent).free / 1e6:,.0f} MB free"
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if error.errno == errno.EFBIG and limit != resource.RLIM_INFINITY:
            room = f"ulimit -f allows {limit / 1e6:,.1f} MB"
        kept = work_folder(out) if work_folder(out).exists() else out
        return UserError(
            f"No room left for {out} ({needed}{room}). What is finished is kept in {kept}: make room and run the same "
            "command again, it goes on where it stood."
        )
    if error.filename is None:
        return error
    name = os.fsdecode(error.filename)
    return UserError(f"Cannot use {name} ({error.strerror}). Mend that, or give another --out, --source or --cache.")
