"""A finished folder: whether it holds what is asked for, and what it lacks."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import sha256_of
from data_prep.folder.dali import SHARD_IMAGES
from data_prep.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from data_prep.recipes.base import Plan
from data_prep.recipes.orders import Order, check_unread, lasting
from data_prep.sources.containers import split_archive_path
from data_prep.sources.images import Images, Source
from data_prep.work.assembly import PARTS, entries, fill_all, write_formats
from data_prep.work.journal import Journal
from data_prep.work.unfinished import open_work, put_away

REMEDY = "Give another --out, or --force to replace it."


def already_there(order: Order, work: Path) -> bool:
    """Whether `out` holds what is asked for, after adding formats that it lacks.

    Args:
        work: the folder of the unfinished build, for comparisons that need one.

    Raises: UserError when it holds something else.
    """
    out = order.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():  # --force replaces data sets, never a folder of something else
        raise UserError(f"{out} exists and is no data set (no {MANIFEST_NAME}). Give another --out, or remove it.")
    if order.force:
        return False
    manifest = read_manifest(out)
    _compare_options(order, manifest)
    compared = _compare_source(order, manifest, work)
    added = _add_formats(order, manifest, compared or manifest)
    built = "" if compared or not manifest.origin.places else f", built from {manifest.source}"
    order.say(f"{out} is there already{built}" + (f"; added {', '.join(added)}." if added else "."))
    put_away(work, order)
    return True


def _compare_options(order: Order, manifest: Manifest) -> None:
    wanted: dict[str, Any] = {**order.recipe.options(), "resolution": order.recipe.resolution}
    have: dict[str, Any] = {**manifest.split, "resolution": manifest.resolution}
    origin = manifest.origin
    if not _gone(order, manifest):
        wanted["val_labels"], have["val_labels"] = order.val_labels_digest(), origin.val_labels
    if "train-dali/order.npy" in manifest.files and order.shard_images is not None:
        wanted["shard_images"], have["shard_images"] = order.shard_images, origin.shard_images
    for key, value in wanted.items():
        if have.get(key) != value:
            raise UserError(
                f"{order.out} holds another data set: {key} is {have.get(key)!r} there, {value!r} is asked for. "
                f"{REMEDY}"
            )
    skipped = sum(manifest.split.get("skipped", {}).values())
    if skipped and order.on_bad_image == "error":
        raise UserError(
            f"{order.out} was built with --on-bad-image skip and lacks {skipped:,} unreadable images, error is asked "
            "for. Add --on-bad-image skip, give another --out, or --force to replace it."
        )


def _gone(order: Order, manifest: Manifest) -> list[Path]:
    """What is not there any more of the places that the folder was built from, if just these are asked for."""
    if manifest.origin.places != order.places_in_full:
        return []
    return [path for path in order.places.values() if not split_archive_path(path)[0].exists()]


def _compare_source(order: Order, manifest: Manifest, work: Path) -> Manifest | None:
    """The manifest, brought up to date, when the source gives what is in the folder; None when there is none to ask.

    Raises: UserError when it gives something else.
    """
    gone = _gone(order, manifest)
    if gone:
        order.say(f"note: {gone[0]} is not there any more, so the folder cannot be compared with it.")
        return None
    if not order.places and not order.recipe.source_at_hand():
        return None
    source = order.recipe.open(order.source, order.cache)
    images = order.recipe.images(source)
    check_unread(order, images)
    now = order.origin(images)
    if now.source != manifest.origin.source:
        order.say(
            f"note: the source's files are not those {order.out} was built from, or were changed or copied since; "
            "comparing the images."
        )
        _compare_images(order, manifest, source, images, work)
    facts = {"origin": manifest.origin.model_copy(update={"source": now.source, "places": now.places})}
    return manifest.model_copy(update={**facts, "source": source.description})


def _compare_images(order: Order, manifest: Manifest, source: Source, images: Mapping[str, Images], work: Path) -> None:
    """Raises UserError unless the images give the arrays of the folder, to the bit."""
    if not manifest.split.get("skipped"):  # then the choice of rows can be told at once
        plan = order.recipe.plan(source, dict(images), {part: set(source.unusable(part)) for part in PARTS})
        if not _same_rows(plan, manifest, order.out):
            raise _other(order, manifest, source)
    open_work(work, order, images)
    with Journal(work / "journal") as journal:
        plan, arrays, _ = fill_all(order, source, dict(images), work, journal)
    same = _same_rows(plan, manifest, order.out) and all(
        sha256_of(arrays[part].path) == manifest.files[f"{part}.npy"].sha256 for part in PARTS
    )
    shutil.rmtree(work)
    if not same:
        raise _other(order, manifest, source)


def _same_rows(plan: Plan, manifest: Manifest, folder: Path) -> bool:
    """Whether a plan has the folder's classes, labels and split."""
    expected = {"labeled_rows": plan.labeled, "unlabeled_rows": plan.unlabeled}
    expected |= {f"{part}_labels": plan.labels(part) for part in PARTS}
    return list(plan.class_names) == manifest.class_names and all(
        np.array_equal(np.load(folder / f"{name}.npy"), rows) for name, rows in expected.items()
    )


def _other(order: Order, manifest: Manifest, source: Source) -> UserError:
    return UserError(
        f"{order.out} holds other images: it was built from {manifest.source}, {source.description} is asked for and "
        f"differs. {REMEDY}"
    )


def _add_formats(order: Order, before: Manifest, manifest: Manifest) -> list[str]:
    """Add formats to a finished folder; its manifest names them when they are whole. `before`: as it was read."""
    _remove_unlisted(order.out, manifest)
    shard_images = order.shard_images or SHARD_IMAGES
    added = write_formats(order.out, order.formats, shard_images)
    if added:
        manifest = manifest.model_copy(update={"files": entries(order.out)})
        manifest.command = lasting(manifest.command, formats_of(manifest))
    if "dali" in added:
        manifest.origin = manifest.origin.model_copy(update={"shard_images": shard_images})
    if manifest != before:
        write_manifest(order.out, manifest)
    return added


def formats_of(manifest: Manifest) -> list[str]:
    """The formats that a folder has besides the arrays."""
    files = {"ffcv": "train.beton", "dali": "train-dali/order.npy"}
    return [name for name, file in files.items() if file in manifest.files]


def _remove_unlisted(folder: Path, manifest: Manifest) -> None:
    """Take away what an interrupted call wrote and the manifest does not know."""
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for part in PARTS:
        if f"{part}.beton" not in manifest.files:
            (folder / f"{part}.beton").unlink(missing_ok=True)
        if f"{part}-dali/order.npy" not in manifest.files:
            shutil.rmtree(folder / f"{part}-dali", ignore_errors=True)
