"""A finished folder: whether it holds what is asked for, and the formats that it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import remove
from data_prep.folder.dali import SHARD_IMAGES
from data_prep.folder.finished import record_path
from data_prep.folder.formats import FORMS, words, write_formats
from data_prep.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from data_prep.folder.verify import check_files
from data_prep.recipes.orders import Order, check_unread, command_to_keep
from data_prep.sources.containers import split_archive_path
from data_prep.work.unfinished import put_away


def already_there(order: Order, work: Path) -> bool:
    """Whether `out` holds what is asked for, by its manifest's facts, after adding formats that it lacks.

    Args:
        work: the folder of the unfinished build, removed when it is of this order.

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
    missing = _missing_sources(order, manifest)
    _compare_options(order, manifest, val_labels=not missing)
    if missing:
        order.say(f"note: {missing[0]} is not there any more, so the folder cannot be compared with it.")
    current = None if missing else _compare_source(order, manifest)
    added = _add_formats(order, manifest, current or manifest)
    built = "" if current or not manifest.origin.places else f", built from {manifest.source}"
    order.say(f"{out} is there already{built}" + (f"; added {', '.join(added)}." if added else "."))
    put_away(work, order)
    return True


def _missing_sources(order: Order, manifest: Manifest) -> list[Path]:
    """The inputs that the folder was built from and that are not there any more, if just those are asked for."""
    if manifest.origin.places != order.absolute_inputs:
        return []
    return [path for path in order.inputs.values() if not split_archive_path(path)[0].exists()]


def _compare_options(order: Order, manifest: Manifest, *, val_labels: bool) -> None:
    """Raises: UserError that names every option which differs."""
    wanted: dict[str, Any] = {**order.recipe.options(), "resolution": order.recipe.resolution}
    plain = {"fit": "squash", "filter": "box", "exif": "stored"}  # of a folder made before there was a choice
    present: dict[str, Any] = {**plain, **manifest.split, "resolution": manifest.resolution}
    if val_labels:
        wanted["val_labels"], present["val_labels"] = order.val_labels_digest(), manifest.origin.val_labels
    if "dali" in manifest.formats and order.shard_images is not None:
        wanted["shard_images"], present["shard_images"] = order.shard_images, manifest.origin.shard_images
    if "ffcv" in manifest.formats and "ffcv" in order.formats:
        wanted["train.beton"], present["train.beton"] = order.beton, manifest.origin.beton
    differences = [
        f"{key} is {present.get(key)!r} there, {value!r} is asked for"
        for key, value in wanted.items()
        if present.get(key) != value
    ]
    if differences:
        raise UserError(
            f"{order.out} holds another data set: {'; '.join(differences)}. Give another --out, or --force to replace "
            "it."
        )
    skipped = sum(manifest.split.get("skipped", {}).values())
    if skipped and order.on_bad_image == "error":
        raise UserError(
            f"{order.out} was built with --on-bad-image skip and lacks {skipped:,} unreadable images, error is asked "
            "for. Add --on-bad-image skip, give another --out, or --force to replace it."
        )
    overlap = manifest.split.get("test_overlap", 0)
    if overlap and order.recipe.chosen_test and not order.allow_overlap:
        raise UserError(
            f"{order.out} was built with --allow-overlap: {overlap:,} of its test images are also training images. Add "
            "--allow-overlap, give another --out, or --force to replace it."
        )


def _compare_source(order: Order, manifest: Manifest) -> Manifest | None:
    """The manifest with the source's present name and place; None when there is no source to ask.

    Raises: UserError when the source is not the one that the folder was built from.
    """
    if not order.inputs and not order.recipe.source_at_hand():
        return None
    source = order.recipe.open(order.source, order.cache)
    images = order.recipe.images(source)
    check_unread(order, images)
    origin = order.origin(images)
    if origin.source != manifest.origin.source:
        now = "what is there now" if source.description == manifest.source else source.description
        raise UserError(
            f"The source changed: {order.out} was built from {manifest.source}; {now} differs (names, sizes or times "
            "of change of its files). Add --force to rebuild, or give another --out."
        )
    moved = manifest.origin.model_copy(update={"places": origin.places})
    return manifest.model_copy(update={"origin": moved, "source": source.description})


def _add_formats(order: Order, before: Manifest, manifest: Manifest) -> list[str]:
    """Add formats to a finished folder; its manifest names them when they are whole. `before`: as it was read.

    Raises: UserError when a file is not as it was written: nothing is added to a damaged folder.
    """
    for leftover in order.out.glob(".*.tmp"):
        remove(leftover)
    added = [name for name in FORMS if name in order.formats and name not in manifest.formats]
    if added:
        check_files(order.out, manifest, order.progress)
        shard_images = order.shard_images or SHARD_IMAGES
        files = {**manifest.files, **write_formats(order.out, added, shard_images, manifest.fingerprint, order.beton)}
        manifest = manifest.model_copy(update={"files": dict(sorted(files.items()))})
        if "dali" in added:
            manifest.origin = manifest.origin.model_copy(update={"shard_images": shard_images})
        if "ffcv" in added:
            manifest.origin = manifest.origin.model_copy(update={"beton": order.beton})
        shard_option = order.shard_images if "dali" in added else None
        manifest.command = command_to_keep(
            manifest.command, words(manifest.formats, manifest.origin.beton), shard_option
        )
    if manifest != before:
        write_manifest(order.out, manifest)
    for name in manifest.formats:  # what the manifest lists needs no record
        remove(record_path(order.out, name))
    return added
