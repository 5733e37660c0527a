"""Carrying out a build order: lock the folder, see what is there, build what is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep.assembly import PARTS, Order, assemble, entries, write_formats
from data_prep.beton import require_ffcv
from data_prep.dali import SHARD_IMAGES
from data_prep.errors import UserError, unknown
from data_prep.journal import build_lock
from data_prep.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from data_prep.writers import is_full

FORMATS = ("array", "ffcv", "dali")
ON_BAD = ("error", "skip")


def build_dataset(
    name: str,
    out: Path | str | None = None,
    *,
    source: Path | str | None = None,
    cache: Path | str | None = None,
    workers: int | None = None,
    formats: Sequence[str] = (),
    shard_images: int = SHARD_IMAGES,
    force: bool = False,
    on_bad_image: str = "error",
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
        formats: "ffcv" adds .beton files, "dali" tar shards of at most `shard_images` images.
        force: replace a folder that holds something else.
        on_bad_image: "error", or "skip" to leave unreadable images out.
        command: how to name this build in the manifest; None writes the plain command.
        options: the data set's own: n1, m1, gamma_l, gamma_u, selection, seed, disjoint, or labeled, unlabeled, test,
            resolution.

    Returns: the folder.

    Raises: UserError.
    """
    from data_prep.catalog import recipe
    from data_prep.downloads import default_cache

    what = recipe(name, **options)
    folder = Path(out) if out is not None else Path("data") / what.folder_name()
    return carry_out(
        Order(
            recipe=what,
            out=folder,
            cache=Path(cache) if cache is not None else default_cache(),
            command=command or f"python data_prep/build.py {name}",
            source=Path(source) if source is not None else None,
            workers=workers,
            formats=tuple(formats),
            shard_images=shard_images,
            force=force,
            on_bad_image=on_bad_image,
            say=say,
            progress=progress,
        )
    )


def carry_out(order: Order) -> Path:
    """Build the folder, or find it built. Returns the folder.

    Interrupted at any moment, the same order goes on where it stood, and the folder is the same to the bit.

    Raises: UserError.
    """
    _check(order)
    out = order.out
    if not out.name or out.name == "..":
        raise UserError(f"--out must name the folder to make, got '{out}'.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make {out.parent} ({error.strerror}). Give another --out.") from None
    with build_lock(out):
        work = out.with_name(out.name + ".building")
        try:
            if _already_there(order):
                shutil.rmtree(work, ignore_errors=True)
            else:
                assemble(order, work)
        except OSError as error:
            if not is_full(error):
                raise
            free = shutil.disk_usage(out.parent).free
            raise UserError(
                f"No room left for {out} ({free / 1e6:,.0f} MB free). What is finished is kept in {work}: make room "
                "and run the same command again, it goes on where it stood."
            ) from None
    return out


def _check(order: Order) -> None:
    for name in order.formats:
        if name not in FORMATS:
            raise unknown("--format", name, FORMATS)
    if order.on_bad_image not in ON_BAD:
        raise unknown("--on-bad-image", order.on_bad_image, ON_BAD)
    if order.workers is not None and order.workers < 1:
        raise UserError(f"--workers must be 1 or more, got {order.workers}.")
    if order.shard_images < 1:
        raise UserError(f"--shard-images must be 1 or more, got {order.shard_images}.")
    if "ffcv" in order.formats:
        require_ffcv()


def _already_there(order: Order) -> bool:
    """Whether `out` holds what is asked for, after adding formats that it lacks. Raises UserError when it differs."""
    out = order.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():  # --force replaces data sets, never a folder of something else
        raise UserError(f"{out} exists and is no data set (no {MANIFEST_NAME}). Give another --out, or remove it.")
    if order.force:
        return False
    manifest = read_manifest(out)
    wanted = {**order.recipe.options(), "resolution": order.recipe.resolution}
    have = {**manifest.split, "resolution": manifest.resolution}
    for key in wanted:
        if have.get(key) != wanted[key]:
            raise UserError(
                f"{out} holds another data set: {key} is {have.get(key)!r} there, {wanted[key]!r} is asked for. "
                "Give another --out, or --force to replace it."
            )
    if order.source is not None:
        found = order.recipe.open(order.source, order.cache).description
        if found != manifest.source:
            raise UserError(
                f"{out} was built from {manifest.source}, {found} is asked for. Give another --out, or --force to "
                "replace it."
            )
    added = _add_formats(order, manifest)
    order.say(f"{out} is there already" + (f"; added {', '.join(added)}." if added else "."))
    return True


def _add_formats(order: Order, manifest: Manifest) -> list[str]:
    """Add formats to a finished folder; its manifest names them when they are whole."""
    _remove_unlisted(order.out, manifest)
    added = write_formats(order.out, order.formats, order.shard_images)
    if added:
        write_manifest(order.out, manifest.model_copy(update={"files": entries(order.out)}))
    return added


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Take away what an interrupted call wrote and the manifest does not know."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for part in PARTS:
        if f"{part}.beton" not in manifest.files:
            (folder / f"{part}.beton").unlink(missing_ok=True)
        if f"{part}-dali/order.npy" not in manifest.files:
            shutil.rmtree(folder / f"{part}-dali", ignore_errors=True)
